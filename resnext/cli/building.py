"""The model of a command, and the weights that it starts from."""

from __future__ import annotations

import os
import warnings
from typing import Any

from torch import nn

from resnext import ResNet, create_model, load_checkpoint, unfuse_
from resnext.cli.errors import CommandError, mendable


def build_model(name: str, model_args: list[tuple[str, Any]], plain: bool = False, **arguments: Any) -> ResNet:
    """Build a model by its name and the values of ``--model-arg``.

    Raises:
        CommandError: There is no such model or argument.
    """
    if taken := sorted({name for name, _ in model_args} & arguments.keys()):
        raise CommandError(f"expected {', '.join(taken)} of the data, got --model-arg {taken[0]} too; leave it out")
    with mendable(ValueError, TypeError):
        model = create_model(name, **{**arguments, **dict(model_args)})
    if not isinstance(model, ResNet):
        raise CommandError("expected a whole model, got --model-arg features_only; leave it out")
    if plain:
        unfuse_(model)
    return model


def start_from(model: nn.Module, weights: str) -> str:
    """Load weights that a run starts from: a checkpoint, or torchvision's by their name.

    Returns:
        What was loaded and skipped.

    Raises:
        CommandError: There are no such weights, or they are another model's.
    """
    source: Any = weights
    if not os.path.exists(weights):
        from torchvision.models import get_weight

        try:
            source = get_weight(weights).get_state_dict(progress=True)
        except (ValueError, AttributeError):
            raise CommandError(
                f"expected --weights to be a file or the name of torchvision's weights, got {weights}; check the path, "
                "or give a name like ResNet50_Weights.IMAGENET1K_V2"
            ) from None
    with warnings.catch_warnings(), mendable(ValueError, RuntimeError, ImportError):
        warnings.simplefilter("ignore")  # the report says the same
        report = load_checkpoint(model, source)
    return "; ".join([f"weights: {len(report.loaded_keys)} tensors from {weights}", *report.notes])
