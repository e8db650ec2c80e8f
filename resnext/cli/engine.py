"""One epoch of training, and testing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torchmetrics import MetricCollection, SumMetric
from torchmetrics.classification import MulticlassAccuracy
from tqdm import tqdm

from resnext.cli.errors import CommandError

Batch = tuple[Tensor, Tensor]


class Scores(NamedTuple):
    """Means over images."""

    accuracy: float
    loss: float


@dataclass(frozen=True)
class Placement:
    """Where and in what precision a model computes.

    Attributes:
        device: Where.
        amp: The dtype of mixed precision, if any.
        channels_last: Whether images are laid out so.
    """

    device: torch.device
    amp: torch.dtype | None = None
    channels_last: bool = True

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of every forward pass."""
        return torch.autocast(self.device.type, self.amp, enabled=self.amp is not None)

    def images(self, images: Tensor) -> Tensor:
        """A batch of images where and as the model wants it."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return images.to(self.device, non_blocking=True, memory_format=layout)

    def model(self, model: nn.Module) -> nn.Module:
        """The model where and as it should be, in place."""
        layout: dict[str, Any] = {"memory_format": torch.channels_last} if self.channels_last else {}
        return model.to(self.device, **layout)

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Images and labels, where and as the model wants them."""
        for images, labels in loader:
            yield self.images(images), labels.to(self.device, non_blocking=True)


def choose_amp(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype of mixed precision that ``--amp`` means on a device.

    Raises:
        CommandError: The device does not have it.
    """
    if name == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if name == "fp16" and device.type == "cpu":
        raise CommandError("expected a GPU for --amp fp16, got a CPU; pass --amp bf16 or off")
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def progress_bar(name: str, images: int, show: bool) -> tqdm[Any]:
    """A progress bar with images per second, where standard error is a terminal."""
    return tqdm(
        desc=name, total=images, unit=" images", leave=False, disable=None if show else True, dynamic_ncols=True
    )


class _Tally:
    """Scores of what has been seen so far."""

    def __init__(self, class_count: int, device: torch.device) -> None:
        self.accuracy = MulticlassAccuracy(class_count, average="micro", validate_args=False).to(device)
        # Sums, as MeanMetric either waits for the GPU in each step to look for NaN, or ignores weights.
        self.loss, self.images = (
            SumMetric(nan_strategy="disable").set_dtype(torch.float64).to(device) for _ in range(2)
        )

    def update(self, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        """Count a batch, with the sum of its losses."""
        self.accuracy.update(logits, labels)
        self.loss.update(loss)
        self.images.update(len(labels))

    def scores(self) -> Scores:
        """Of all processes."""
        return Scores(float(self.accuracy.compute()), float(self.loss.compute() / self.images.compute()))


@dataclass
class Trainer:
    """What one epoch of training needs.

    Attributes:
        model: The model, perhaps wrapped for several processes.
        optimizer: Of its parameters.
        scaler: Of the loss, for fp16.
        criterion: The loss, summed over a batch.
        placement: Where and how to compute.
        class_count: Number of classes.
        processes: How many share the batches.
        accumulate: Batches for one step.
        clip_norm: The largest norm of the gradient, if limited.
        ema: Averaged weights, if wanted.
    """

    model: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    criterion: nn.Module
    placement: Placement
    class_count: int
    processes: int = 1
    accumulate: int = 1
    clip_norm: float | None = None
    ema: AveragedModel | None = None

    def epoch(self, loader: Iterable[Batch], sizes: Sequence[int], bar: tqdm[Any]) -> Scores:
        """Train on every batch.

        Args:
            loader: This process's shares of the batches.
            sizes: Of the batches of all processes together.
            bar: Is told how many images are done.

        Returns:
            Scores of all processes' images, each before the step that learned from it.

        Raises:
            CommandError: The loss is not finite.
        """
        self.model.train()
        tally = _Tally(self.class_count, self.placement.device)
        self.optimizer.zero_grad(set_to_none=True)
        for index, (images, labels) in enumerate(self.placement.batches(loader)):
            first = index - index % self.accumulate
            joined = sum(sizes[first : first + self.accumulate])
            last = index + 1 == min(first + self.accumulate, len(sizes))
            with self._synchronised(last):
                with self.placement.autocast():
                    logits = self.model(images)
                    loss = self.criterion(logits, labels)
                # DDP takes the mean over the processes: so it is the mean over the images of a step.
                self.scaler.scale(loss * (self.processes / joined)).backward()
            if last:
                self._step()
            tally.update(logits.detach(), labels, loss.detach())
            bar.update(sizes[index])
        scores = tally.scores()
        if not math.isfinite(scores.loss):
            raise CommandError(f"expected a finite training loss, got {scores.loss}; lower --lr or pass --clip-norm 1")
        return scores

    @contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        """Average gradients over the processes only in the last backward before a step."""
        apart = isinstance(self.model, DistributedDataParallel) and not last
        with self.model.no_sync() if apart else nullcontext():  # type: ignore[operator]
            yield

    def _step(self) -> None:
        if self.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update_parameters(self.model.module if self.processes > 1 else self.model)  # type: ignore[arg-type]


def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    placement: Placement,
    class_count: int,
    bar: tqdm[Any],
    metrics: MetricCollection | None = None,
) -> Scores:
    """Test a model on every batch.

    Args:
        model: The model, not wrapped.
        loader: This process's share of the images.
        placement: Where and how to compute.
        class_count: Number of classes.
        bar: Is told how many images are done.
        metrics: Are updated too.

    Returns:
        Scores of all processes' images; the loss is cross-entropy.
    """
    model.eval()
    tally = _Tally(class_count, placement.device)
    with torch.no_grad():
        for images, labels in placement.batches(loader):
            with placement.autocast():
                logits = model(images)
            logits = logits.float()
            tally.update(logits, labels, nn.functional.cross_entropy(logits, labels, reduction="sum"))
            if metrics is not None:
                metrics.update(logits, labels)
            bar.update(len(labels))
    return tally.scores()
