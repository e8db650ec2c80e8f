"""Pictures: curves of a run, confusion matrix, grid of classified images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torchmetrics.utilities.plot import plot_confusion_matrix

from resnext.checkpoint_files import write_atomically

_MANY_CLASSES = 25  # beyond which numbers and names would not be legible


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=80))


def curves(history: Sequence[dict[str, Any]]) -> Figure:
    """Loss and accuracy of each epoch, in training and in testing."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    epochs = [record["epoch"] for record in history]
    for axes, name, title in zip(figure.subplots(1, 2), ("loss", "acc"), ("Loss", "Accuracy"), strict=True):
        for part in ("train", "test"):
            values = [record[f"{part}_{name}"] for record in history]
            axes.plot(epochs, values, marker=".", label=f"{part}: {values[-1]:.3f}")
        axes.set(title=title, xlabel="Epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def confusion(matrix: Tensor, class_names: Sequence[str]) -> Figure:
    """How many images of each true class (rows) were given each class (columns)."""
    legible = len(class_names) <= _MANY_CLASSES
    side = 2 + 0.45 * min(len(class_names), _MANY_CLASSES)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    labels = list(class_names) if legible else None
    plot_confusion_matrix(matrix, ax=axes, add_text=legible, labels=labels, cmap="Blues")  # type: ignore[arg-type]
    return figure


def grid(images: Sequence[Any], titles: Sequence[str], right: Sequence[bool | None]) -> Figure:
    """Images with what was predicted above each: green if it is right, red if not, black if nobody knows."""
    columns = min(6, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(2 * columns, 2.3 * rows), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, image, title, correct in zip(figure.axes, images, titles, right, strict=False):
        axes.imshow(image)
        color = {True: "green", False: "red", None: "black"}[correct]
        axes.set_title(title, fontsize=8, color=color)
    return figure
