"""Data loaders whose images, order and random changes do not depend on how many processes there are.

So a run goes on after a stop as if there had been none, and several processes do what one would.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from math import ceil
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from resnext.cli.distributed import Processes
from resnext.cli.errors import CommandError, one_line
from resnext.cli.folders import UNREADABLE


def derived_seed(*parts: int) -> int:
    """A seed made of several numbers."""
    return random.Random("/".join(map(str, parts))).getrandbits(63)


class Samples(Dataset[Any]):
    """A dataset with a transform, whose random numbers depend on seed, epoch and index of the image only.

    Attributes:
        epoch: The epoch, counted from 1.
    """

    def __init__(self, dataset: Any, transform: Any, seed: int = 0) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        try:
            image, label = self.dataset[index]
        except UNREADABLE as error:
            raise CommandError(f"could not read image {index} ({one_line(error)}); check the data") from error
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(derived_seed(self.seed, self.epoch, index))
        try:
            return self.transform(image), label
        finally:
            torch.set_rng_state(state)


class JoinedBatches(Sampler[list[int]]):
    """Shuffled batches of all processes together, of which each process gets its share.

    All images are used, in batches as equal as possible: a last batch of one image has no variance for batch norm,
    and one of two or three gives gradients that can undo an epoch.

    Args:
        images: How many there are.
        batch_size: The largest batch, of all processes together.
        processes: Who asks.
        seed: Of the order.

    Attributes:
        epoch: The order is another in each.
        sizes: Of the batches.

    Raises:
        CommandError: Some process would get fewer than two images.
    """

    def __init__(self, images: int, batch_size: int, processes: Processes, seed: int) -> None:
        self.images, self.batch_size, self.processes, self.seed = images, batch_size, processes, seed
        self.epoch = 0
        least = 2 * processes.count
        if min(images, batch_size) < least:
            raise CommandError(
                f"expected two images at a time for each of {processes.count} processes, got {images} images in "
                f"batches of {batch_size}; use more images, a larger --batch-size or fewer processes"
            )
        number = min(ceil(images / batch_size), images // least)
        self.sizes = [len(part) for part in torch.arange(images).tensor_split(number)]

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
        for batch in torch.randperm(self.images, generator=generator).split(self.sizes):
            yield batch[self.processes.rank :: self.processes.count].tolist()


def training_loader(
    samples: Samples, batch_size: int, processes: Processes, workers: int
) -> tuple[DataLoader[Any], JoinedBatches]:
    """Batches in another order in each epoch, and their sampler; see `JoinedBatches`."""
    batches = JoinedBatches(len(samples), batch_size, processes, samples.seed)
    return _loader(samples, batches, processes, workers), batches


def evaluation_loader(samples: Samples, batch_size: int, processes: Processes, workers: int) -> DataLoader[Any]:
    """Batches in order; each process gets its share of the images, each image once."""
    indices = range(processes.rank, len(samples), processes.count)
    return _loader(samples, BatchSampler(indices, batch_size, drop_last=False), processes, workers)


def _loader(samples: Samples, batches: Any, processes: Processes, workers: int) -> DataLoader[Any]:
    # Workers live for one epoch: they have copies of the samples, with the number of the epoch.
    return DataLoader(samples, batch_sampler=batches, num_workers=workers, pin_memory=processes.device.type == "cuda")
