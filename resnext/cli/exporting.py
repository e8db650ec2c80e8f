"""``resnext export``."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from resnext import save_pretrained, unfuse_
from resnext.checkpoint_files import write_atomically
from resnext.cli.arguments import Options
from resnext.cli.checkpointing import Trained, load_trained
from resnext.cli.errors import CommandError

_NAMES = {"torch": "model.pt2", "onnx": "model.onnx", "folder": "model"}


def run(options: Options) -> None:
    """Write a trained model for use elsewhere; its input is a batch of any size of preprocessed images.

    Raises:
        CommandError: There is no such checkpoint, or a package is missing.
        OSError: The file cannot be written.
    """
    trained = load_trained(options.checkpoint, plain=options.plain or options.format == "onnx")
    folder = trained.path if trained.path.is_dir() else trained.path.parent
    path = options.out or folder / _NAMES[options.format]
    {"torch": _write_program, "onnx": _write_onnx, "folder": _write_folder}[options.format](trained, path)
    print(path)


def _about(trained: Trained) -> dict[str, str]:
    """What a user of the file needs to know, as texts."""
    return {
        "class_names": json.dumps(trained.class_names),
        "preprocessing": json.dumps(trained.preprocessing.as_dict()),
    }


def _example(trained: Trained) -> torch.Tensor:
    size = trained.preprocessing.image_size
    return torch.zeros(2, 3, size, size)


def _write_program(trained: Trained, path: Path) -> None:
    batch = torch.export.Dim("batch")
    with torch.no_grad():  # or the program would be one for training
        program = torch.export.export(trained.model, (_example(trained),), dynamic_shapes=({0: batch},))

    def write(file: Path) -> None:
        with open(file, "wb") as stream:
            torch.export.save(program, stream, extra_files=_about(trained))

    write_atomically(path, write)


def _write_onnx(trained: Trained, path: Path) -> None:
    model: nn.Module = unfuse_(trained.model)
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise CommandError("expected onnxscript for --format onnx, got none; pip install onnx onnxscript") from None
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):  # where the exporter tells of its progress
        program: Any = torch.onnx.export(
            model,
            (_example(trained),),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    program.model.metadata_props.update(_about(trained))
    write_atomically(path, lambda file: program.save(str(file), external_data=False))


def _write_folder(trained: Trained, path: Path) -> None:
    about, model = trained.preprocessing, cast(Any, trained.model)
    size = about.image_size
    model.pretrained_cfg = {"input_size": [3, size, size], "crop_pct": size / about.resize_size}  # timm's names
    save_pretrained(model, path, class_names=trained.class_names, mean=about.mean, std=about.std)
