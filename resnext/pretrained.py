"""Folders that hold a model: `save_pretrained` and `from_pretrained`, on the disk or the Hugging Face hub.

The files are those of timm: ``config.json`` and ``model.safetensors``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn

from resnext.checkpoint_files import save_checkpoint, without_data_parallel, write_atomically
from resnext.checkpoints import load_checkpoint
from resnext.features import FeatureMaps
from resnext.models import create_model
from resnext.resnet import ResNet

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Path:
    """Save a model so that `from_pretrained` can build it again: ``config.json`` and ``model.safetensors``.

    What is not given is taken from ``model.pretrained_cfg``, where `from_pretrained` left it.

    Args:
        model: A model with ``config``: from `create_model`, a builder, or `from_pretrained`.
        folder: Where to save; made if need be.
        class_names: A name for each class.
        mean: Of each channel, subtracted from images with values from 0 to 1.
        std: Of each channel, by which images are then divided.

    Returns:
        The folder.

    Raises:
        ImportError: safetensors is not installed.
        OSError: The files cannot be written.
        TypeError: ``model`` has no ``config``, or was built with arguments that cannot be written as JSON.
        ValueError: The number of ``class_names`` is not the model's.
    """
    folder = Path(folder)
    model = without_data_parallel(model)
    arguments = dict(getattr(model, "config", None) or {})
    if "architecture" not in arguments:
        raise TypeError(
            f"save_pretrained: expected a model with a config, got a {type(model).__name__}; "
            "build it by resnext.create_model, or use resnext.save_checkpoint"
        )
    architecture, num_classes = arguments.pop("architecture"), arguments.pop("num_classes")
    if class_names is not None and len(class_names) != num_classes:
        raise ValueError(
            f"save_pretrained: expected {num_classes} class_names, got {len(class_names)}; give one for each class"
        )
    given = {"label_names": class_names, "mean": mean, "std": std}
    config = {
        "architecture": architecture,
        "num_classes": num_classes,
        "model_args": arguments,
        "pretrained_cfg": {
            **getattr(model, "pretrained_cfg", {}),
            **{key: list(value) for key, value in given.items() if value is not None},
        },
        "resnext_version": _version(),
    }
    try:
        text = json.dumps(config, indent=2) + "\n"
    except TypeError as error:
        raise TypeError(
            f"save_pretrained: expected arguments that JSON can hold, got {arguments} for {architecture} ({error}); "
            "use resnext.save_checkpoint, and build the model in code"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(model, folder / _WEIGHTS, {"resnext_version": config["resnext_version"]})
    write_atomically(folder / _CONFIG, lambda file: file.write_text(text))
    return folder


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    **overrides: Any,
) -> ResNet | FeatureMaps:
    """Build the model that a folder holds, and load its weights.

    Args:
        source: A folder from `save_pretrained`, or a name on the Hugging Face hub, ``"owner/name"``, also one of timm's
            if `list_models` knows its architecture. Only such a name downloads anything.
        revision: A branch, tag or commit on the hub.
        cache_dir: Where downloads are kept; None: where huggingface_hub keeps them.
        **overrides: Arguments of the model that differ from the saved ones. With another ``num_classes`` the saved
            classifier is skipped, with a warning; with another ``in_chans`` the first convolution is adapted, as
            `load_checkpoint` says.

    Returns:
        The model, in evaluation mode. Its ``pretrained_cfg`` holds what was saved about images and classes:
        ``label_names``, ``mean``, ``std``.

    Raises:
        FileNotFoundError: There is no such folder, or a file is missing there.
        ImportError: safetensors is not installed, or huggingface_hub is needed and is not.
        RuntimeError: The weights are not those of the model.
        ValueError: The configuration is damaged or names no model known here, or an override is wrong.
    """
    path = _locate(source, _CONFIG, revision, cache_dir)
    try:
        config = json.loads(path.read_text())
        architecture, num_classes = config["architecture"], config["num_classes"]
        saved = {"num_classes": num_classes, **config.get("model_args", {})}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"from_pretrained: expected a configuration with architecture and num_classes, got {path} ({error!r}); "
            "save the model anew with resnext.save_pretrained"
        ) from error
    arguments = {**saved, **overrides}
    # The weights of a whole model are loaded into a whole model, of which features are then a part.
    part = (
        {} if "features_only" in saved else {key: arguments.pop(key, None) for key in ("features_only", "out_indices")}
    )
    model = create_model(architecture, **arguments)
    load_checkpoint(model, _locate(source, _WEIGHTS, revision, cache_dir))
    if part.get("features_only") and isinstance(model, ResNet):
        model = FeatureMaps(model, part["out_indices"])
    about = dict(config.get("pretrained_cfg", {}))
    if arguments["num_classes"] != num_classes:
        about.pop("label_names", None)
    cast(Any, model).pretrained_cfg = about
    return model.eval()


def _locate(source: str | os.PathLike[str], filename: str, revision: str | None, cache_dir: str | Path | None) -> Path:
    """The path of one of a model's files, downloaded if ``source`` is a name on the hub and no folder."""
    if Path(source).is_dir():
        path = Path(source) / filename
        if not path.is_file():
            raise FileNotFoundError(
                f"from_pretrained: expected {_CONFIG} and {_WEIGHTS} in {source}, got no {filename}; "
                "save with resnext.save_pretrained, or use resnext.load_checkpoint for other files"
            )
        return path
    name = str(source).removeprefix("hf-hub:")
    if not isinstance(source, str) or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise FileNotFoundError(
            f"from_pretrained: expected a folder or a name on the Hugging Face hub like 'owner/name', got {source!s}; "
            "check the path, or use resnext.create_model for a new model"
        )
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ImportError(
            f"from_pretrained: expected huggingface_hub for {name!r}, which is no folder here, got none installed; "
            "pip install huggingface_hub, or give a folder"
        ) from error
    return Path(hf_hub_download(name, filename, revision=revision, cache_dir=cache_dir))


def _version() -> str:
    from resnext import __version__  # which is set only after the package has imported this module

    return __version__
