"""What a run keeps on the disk to go on, and what others need to use its model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from resnext import ResNet, from_pretrained, load_checkpoint, read_checkpoint, unfuse_
from resnext.cli.arguments import Options
from resnext.cli.building import build_model
from resnext.cli.errors import CommandError, mendable
from resnext.cli.preprocessing import Preprocessing

BEST, LAST = "best.pth", "last.pth"
# Arguments with which a run may go on although they are others than it began with: but for rounding, they leave its
# results alone.
_FREE = {
    "channels_last",
    "check_images",
    "compile",
    "deterministic",
    "device",
    "download",
    "epochs",
    "out",
    "overwrite",
    "progress",
    "resume",
    "root",
    "tensorboard",
    "workers",
}


class Trained(NamedTuple):
    """A model from a checkpoint.

    Attributes:
        model: In evaluation mode, on the CPU.
        class_names: By label.
        preprocessing: What is to be done to images.
        arguments: Of the training, empty if unknown.
        path: The file or folder.
    """

    model: ResNet
    class_names: list[str]
    preprocessing: Preprocessing
    arguments: dict[str, Any]
    path: Path


def describe(model: ResNet, class_names: list[str], preprocessing: Preprocessing, options: Options) -> dict[str, Any]:
    """What a checkpoint says about its model and run: plain values, which load with ``weights_only=True``."""
    arguments = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(options).items()
        if key not in ("command", "given", "out", "overwrite", "resume")
    }
    return {
        "config": model.config,
        "class_names": class_names,
        "preprocessing": preprocessing.as_dict(),
        "arguments": arguments,
    }


def read_run(path: Path) -> dict[str, Any]:
    """Read a run's checkpoint.

    Raises:
        CommandError: There is none, or it is damaged or something else.
    """
    with mendable(ValueError, FileNotFoundError):
        checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint, Mapping) or not {"config", "class_names", "preprocessing"} <= checkpoint.keys():
        raise CommandError(
            f"expected a checkpoint from resnext train, got {path} without class names; "
            "start a run from such weights with resnext train --weights"
        )
    return dict(checkpoint)


def resumed(options: Options, checkpoint: Mapping[str, Any]) -> Options:
    """The arguments of a run that goes on: those it began with, but for those given now that may change.

    Raises:
        CommandError: The checkpoint has nothing to go on from, or other arguments are given than it began with.
    """
    if "optimizer" not in checkpoint:
        raise CommandError(f"expected a run's {LAST} to resume, got one without optimizer; give {LAST}")
    began: dict[str, Any] = checkpoint["arguments"]
    free = _FREE - ({"epochs"} if began["schedule"] == "cosine" else set())
    for name in sorted(set(options.given) - free):
        if (given := getattr(options, name)) != began.get(name):
            raise CommandError(
                f"expected --{name.replace('_', '-')} {began.get(name)} as the run began with, got {given}; "
                "leave it out, or start a new run"
            )
    result = Options(**{**vars(options), **began})
    for name in options.given:
        setattr(result, name, getattr(options, name))
    result.root = Path(result.root)
    return result


def load_trained(path: Path, plain: bool = False) -> Trained:
    """Build the model of a checkpoint and load its weights, averaged ones if there are any.

    Args:
        path: A run's checkpoint, its folder, or a folder from `resnext.save_pretrained`.
        plain: Whether to undo the fusion.

    Raises:
        CommandError: There is nothing of the kind.
    """
    if path.is_dir() and (path / BEST).is_file():
        path = path / BEST
    if path.is_dir():
        with mendable(ValueError, RuntimeError, FileNotFoundError, ImportError):
            model = from_pretrained(path)
        about: dict[str, Any] = getattr(model, "pretrained_cfg", {})
        if not isinstance(model, ResNet) or not {"label_names", "mean", "std"} <= about.keys():
            raise CommandError(
                f"expected class names, mean and std in {path}, got none; save them with resnext.save_pretrained"
            )
        size = int(about.get("input_size", [3, 224, 224])[-1])  # timm's names, as in `exporting`
        resize_size = round(size / about.get("crop_pct", 0.875))
        preprocessing = Preprocessing(size, resize_size, tuple(about["mean"]), tuple(about["std"]))
        trained = Trained(model, list(about["label_names"]), preprocessing, {}, path)
    else:
        checkpoint = read_run(path)
        config = dict(checkpoint["config"])
        model = build_model(config.pop("architecture"), list(config.items()))
        with mendable(ValueError, RuntimeError):
            load_checkpoint(model, checkpoint)
        preprocessing = Preprocessing.from_dict(checkpoint["preprocessing"])
        trained = Trained(model.eval(), checkpoint["class_names"], preprocessing, checkpoint["arguments"], path)
    if plain:
        unfuse_(trained.model)
    return trained
