"""The data of the commands: digits, synthetic, CIFAR-10 or a folder of images."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, Subset
from torchvision.datasets import CIFAR10, FakeData, ImageFolder
from torchvision.datasets.utils import check_integrity

from resnext.cli import folders
from resnext.cli.arguments import Options
from resnext.cli.distributed import Processes
from resnext.cli.errors import CommandError, mendable
from resnext.cli.preprocessing import Preprocessing


class Data(NamedTuple):
    """Images and labels, as yet unprocessed.

    Attributes:
        train: Pairs of an image, PIL's or (C, H, W) uint8, and a label, for training.
        test: The same for testing.
        class_names: By label.
        kind: Of `Preprocessing.training_transform`.
        preprocessing: What suits them.
        workers: How many processes should load them.
    """

    train: Dataset[Any]
    test: Dataset[Any]
    class_names: list[str]
    kind: str
    preprocessing: Preprocessing
    workers: int = min(4, os.cpu_count() or 1)


_HALF = (0.5, 0.5, 0.5)
_CIFAR = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_data(options: Options, processes: Processes) -> Data:
    """Open the data that ``--data`` names, and check it.

    Args:
        options: Those of the group data, ``image_size`` among them.
        processes: Who looks at the files: the first for all.

    Raises:
        CommandError: It is missing, damaged, or not for classification.
    """
    sources = {"digits": _digits, "synthetic": _synthetic, "cifar10": _cifar10}
    data = sources.get(options.data, _folder)(options, processes)
    if options.image_size:
        data = data._replace(preprocessing=data.preprocessing.scaled(options.image_size))
    if options.limit:
        data = data._replace(
            train=_at_most(options.limit, data.train, options.split_seed),
            test=_at_most(options.limit, data.test, options.split_seed),
        )
    return data


def _digits(options: Options, processes: Processes) -> Data:
    """scikit-learn's copy of the UCI handwritten digits, 8x8 pixels; a fifth of each class for testing."""
    with mendable(ImportError):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    digits = load_digits()
    images = (torch.from_numpy(digits.images) * (255 / 16)).round().to(torch.uint8)[:, None]
    labels = digits.target.tolist()
    train, test = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    pairs: Any = list(zip(images, labels, strict=True))  # all that a data set needs to be
    preprocessing = Preprocessing(32, 32, _HALF, _HALF)
    names = [str(name) for name in digits.target_names]
    return Data(Subset(pairs, train), Subset(pairs, test), names, "digits", preprocessing, workers=0)


def _synthetic(options: Options, processes: Processes) -> Data:
    """Random pixels and labels, for trying things out."""
    size = options.image_size or 32
    shape = (3, size, size)
    train, test = FakeData(1024, shape, 10), FakeData(256, shape, 10, random_offset=1024)
    return Data(train, test, [str(label) for label in range(10)], "objects", Preprocessing(size, size, _HALF, _HALF))


def _cifar10(options: Options, processes: Processes) -> Data:
    root, archive = options.root, options.root / CIFAR10.filename

    def unpack() -> None:
        if archive.is_file() and not check_integrity(str(archive), CIFAR10.tgz_md5):
            raise CommandError(f"expected the archive of CIFAR-10, got {archive}, damaged or another; get it anew")
        if options.download or (archive.is_file() and not (root / CIFAR10.base_folder).is_dir()):
            CIFAR10(root, download=True)  # only unpacks if the archive is there

    processes.from_first(unpack)
    try:
        train, test = CIFAR10(root, train=True), CIFAR10(root, train=False)
    except RuntimeError:
        raise CommandError(
            f"expected CIFAR-10 in {root}, got neither {CIFAR10.base_folder} nor {CIFAR10.filename} there, or damaged "
            "ones; pass --download, or --root where they are"
        ) from None
    return Data(train, test, list(train.classes), "objects", Preprocessing(32, 32, *_CIFAR))


def _folder(options: Options, processes: Processes) -> Data:
    train_root, test_root = folders.parts(Path(options.data))
    train = folders.read_folder(train_root)
    test = folders.read_folder(test_root) if test_root else None
    if test and test_root and test.classes != train.classes:
        only = sorted(set(train.classes) ^ set(test.classes))
        raise CommandError(
            f"expected the same classes in {train_root} and {test_root}, got only in one of them: {', '.join(only)}; "
            "complete the other"
        )
    if options.check_images:
        _check(options, processes, [(train, train_root)] + ([(test, test_root)] if test and test_root else []))

    preprocessing = Preprocessing(224, 256, *_IMAGENET)
    if test:
        return Data(train, test, train.classes, "photos", preprocessing)
    kept, held_out = _split(train.targets, options.val_fraction, options.split_seed)
    for part, where in ((kept, "the training part"), (held_out, "the test part")):
        labels = [train.targets[index] for index in part]
        folders.check_none_is_empty(labels, train.classes, f"{where} of {train_root} (--val-fraction)")
    return Data(Subset(train, kept), Subset(train, held_out), train.classes, "photos", preprocessing)


def _split(labels: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """The numbers of images for training, and of those held out: a fraction of each class, and at least one."""
    of_class: dict[int, list[int]] = {}
    for index in torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist():
        of_class.setdefault(labels[index], []).append(index)
    kept, held_out = list[int](), list[int]()
    for indices in of_class.values():
        number = max(round(fraction * len(indices)), 1) if fraction else 0
        held_out += indices[:number]
        kept += indices[number:]
    return kept, held_out


def _check(options: Options, processes: Processes, found: Sequence[tuple[ImageFolder, Path]]) -> None:
    """Look for unreadable images, and refuse or skip them."""
    paths = [path for folder, _ in found for path, _ in folder.samples]
    bad = processes.from_first(lambda: folders.unreadable(paths))
    if options.bad_images == "refuse":
        folders.refuse(bad)
    for folder, root in found:
        folders.without(folder, bad)
        folders.check_classes(folder, root)
    if processes.first:
        for path in bad:
            print(f"skipped, unreadable: {path}", file=sys.stderr)


def _at_most(number: int, dataset: Any, seed: int) -> Dataset[Any]:
    """A dataset, or as many of its images if it has more, always the same."""
    if len(dataset) <= number:
        return dataset
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return Subset(dataset, order[:number].tolist())
