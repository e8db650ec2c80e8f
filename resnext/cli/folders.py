"""Folders of images: one folder for each class, checked before anything is trained on them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader

from resnext.cli.errors import CommandError

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what PIL raises for a damaged file


class _Folder(ImageFolder):
    """Without hidden folders, which editors and notebooks leave behind."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        names, _ = super().find_classes(directory)
        classes = [name for name in names if not name.startswith(".")]
        if not classes:
            raise FileNotFoundError(directory)
        return classes, {name: number for number, name in enumerate(classes)}


def _is_image(path: str) -> bool:
    """By its name; hidden files, which some systems keep beside images under their names, are none."""
    name = os.path.basename(path).lower()
    return name.endswith(IMG_EXTENSIONS) and not name.startswith(".")


def parts(root: Path) -> tuple[Path, Path | None]:
    """The folder of training images and that of test images, None if one folder is to be split.

    Raises:
        CommandError: There is no such folder, or it has training images only.
    """
    if not root.is_dir():
        raise CommandError(
            f"expected --data to be digits, synthetic, cifar10 or a folder of images, got {root}; check the path"
        )
    if not (root / "train").is_dir():
        return root, None
    for name in ("val", "test"):
        if (root / name).is_dir():
            return root / "train", root / name
    raise CommandError(f"expected a folder val or test beside {root / 'train'}, got none; add it, or give {root}/train")


def read_folder(root: Path) -> ImageFolder:
    """The images of a folder that has one folder for each class.

    Raises:
        CommandError: There are fewer than two classes, or one without images.
    """
    try:
        found = _Folder(str(root), is_valid_file=_is_image, allow_empty=True)
    except FileNotFoundError:
        raise CommandError(f"expected a folder for each class in {root}, got none; sort the images into some") from None
    check_classes(found, root)
    return found


def check_classes(found: ImageFolder, root: Path) -> None:
    """Raise a `CommandError` if there are fewer than two classes, or one without images."""
    if len(found.classes) < 2:
        raise CommandError(f"expected at least two classes in {root}, got only {found.classes[0]}; add another")
    check_none_is_empty(found.targets, found.classes, str(root))


def check_none_is_empty(labels: Sequence[int], class_names: Sequence[str], where: str) -> None:
    """Raise a `CommandError` if a class has no images."""
    if empty := sorted(set(range(len(class_names))) - set(labels)):
        names = _some([class_names[label] for label in empty])
        raise CommandError(f"expected images of every class in {where}, got none of {names}; add some, or remove it")


def unreadable(paths: Sequence[str]) -> list[str]:
    """Those of the image files that cannot be read to their end."""

    def broken(path: str) -> bool:
        try:
            default_loader(path)
        except UNREADABLE:
            return True
        return False

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return [path for path, bad in zip(paths, pool.map(broken, paths), strict=True) if bad]


def refuse(bad: Sequence[str]) -> None:
    """Raise a `CommandError` that lists unreadable images, if there are any."""
    if bad:
        raise CommandError(
            f"expected readable images, got {len(bad)} that are not: {_some(bad)}; "
            "replace or remove them, or pass --bad-images skip"
        )


def without(found: ImageFolder, bad: Sequence[str]) -> None:
    """Drop images, by their paths, in place."""
    found.samples = found.imgs = [sample for sample in found.samples if sample[0] not in set(bad)]
    found.targets = [label for _, label in found.samples]


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The image files among paths and in the folders among them, in order.

    Raises:
        CommandError: A path does not exist, or there is no image at all.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(file for file in path.rglob("*") if _is_image(str(file)))
        elif path.is_file():
            files.append(path)
        else:
            raise CommandError(f"expected images or folders, got {path}, which does not exist; check the path")
    if not files:
        raise CommandError(f"expected images, got none in {_some([str(path) for path in paths])}; check the path")
    return files


def _some(names: Sequence[str]) -> str:
    """The first few of a list."""
    return ", ".join(names) if len(names) <= 8 else f"{', '.join(names[:7])} and {len(names) - 7} more"
