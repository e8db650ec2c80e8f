"""``resnext predict``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torchvision.datasets.folder import default_loader

from resnext.cli import folders, plots
from resnext.cli.arguments import Options
from resnext.cli.checkpointing import Trained, load_trained
from resnext.cli.distributed import pick_device
from resnext.cli.engine import Placement
from resnext.cli.errors import CommandError
from resnext.cli.logs import table, write_text


class Prediction(NamedTuple):
    """What a model says about an image.

    Attributes:
        path: The image.
        true: Its class, if it lies in a folder of a class's name.
        classes: The likeliest classes, likeliest first.
        probabilities: Theirs.
    """

    path: Path
    true: str | None
    classes: list[str]
    probabilities: list[float]


def run(options: Options) -> None:
    """Classify images; print, and write a table and a picture if wanted.

    Raises:
        CommandError: There is no such checkpoint or image, or an image cannot be read.
        OSError: Something cannot be written.
    """
    trained = load_trained(options.checkpoint)
    paths = folders.image_files(options.images)
    bad = folders.unreadable([str(path) for path in paths])
    if options.bad_images == "refuse":
        folders.refuse(bad)
    for path in bad:
        print(f"skipped, unreadable: {path}", file=sys.stderr)
    paths = [path for path in paths if str(path) not in set(bad)]
    if not paths:
        raise CommandError("expected readable images, got none; give others")

    predictions = _predict(trained, paths, Placement(pick_device(options.device)), options)
    for each in predictions:
        true = f", true: {each.true}" if each.true else ""
        print(f"{each.path}: {each.classes[0]} ({each.probabilities[0]:.1%}){true}")
    if options.out:
        write_text(options.out, as_json(predictions) if options.out.suffix == ".json" else as_csv(predictions))
    if options.grid:
        plots.save(_grid(predictions[: options.grid_images]), options.grid)


def _predict(trained: Trained, paths: list[Path], placement: Placement, options: Options) -> list[Prediction]:
    model, transform = placement.model(trained.model), trained.preprocessing.transform()
    top = min(options.top, len(trained.class_names))
    predictions = []
    for start in range(0, len(paths), options.batch_size):
        part = paths[start : start + options.batch_size]
        images = torch.stack([transform(default_loader(str(path))) for path in part])
        with torch.no_grad():
            likeliest = model(placement.images(images)).softmax(dim=1).topk(top)
        for path, labels, values in zip(part, likeliest.indices.tolist(), likeliest.values.tolist(), strict=True):
            folder = path.resolve().parent.name
            true = folder if folder in trained.class_names else None
            predictions.append(Prediction(path, true, [trained.class_names[label] for label in labels], values))
    return predictions


def as_json(predictions: list[Prediction]) -> str:
    """A list of objects with ``path``, ``true`` and ``predictions``."""
    return (
        json.dumps(
            [
                {
                    "path": str(each.path),
                    "true": each.true,
                    "predictions": [
                        {"class": name, "probability": value}
                        for name, value in zip(each.classes, each.probabilities, strict=True)
                    ],
                }
                for each in predictions
            ],
            indent=2,
        )
        + "\n"
    )


def as_csv(predictions: list[Prediction]) -> str:
    """A table with the columns ``path``, ``true``, ``class_1``, ``probability_1``, ``class_2`` and so on."""
    rows = []
    for each in predictions:
        row: dict[str, Any] = {"path": str(each.path), "true": each.true or ""}
        for index, (name, value) in enumerate(zip(each.classes, each.probabilities, strict=True), start=1):
            row |= {f"class_{index}": name, f"probability_{index}": f"{value:.6f}"}
        rows.append(row)
    return table(rows)


def _grid(predictions: list[Prediction]) -> Any:
    titles = [
        f"{each.classes[0]} ({each.probabilities[0]:.0%})" + (f"\ntrue: {each.true}" if each.true else "")
        for each in predictions
    ]
    right = [None if each.true is None else each.true == each.classes[0] for each in predictions]
    return plots.grid([default_loader(str(each.path)) for each in predictions], titles, right)
