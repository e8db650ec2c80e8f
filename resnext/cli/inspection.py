"""``resnext summary``."""

from __future__ import annotations

from pathlib import Path

from resnext import summary
from resnext.cli.arguments import Options
from resnext.cli.building import build_model
from resnext.cli.errors import CommandError, mendable


def run(options: Options) -> None:
    """Print the table of a model, named or from a checkpoint.

    Raises:
        CommandError: There is no such model, or it cannot take such images.
    """
    if Path(options.model).exists():
        from resnext.cli.checkpointing import load_trained  # which needs torchvision

        if options.model_arg:
            raise CommandError("expected --model-arg with the name of a model only, got it with a checkpoint")
        trained = load_trained(Path(options.model), options.plain)
        model = trained.model
        size = options.image_size or trained.preprocessing.image_size
    else:
        model = build_model(options.model, options.model_arg, options.plain)
        size = options.image_size or (32 if options.model.endswith("_cifar") else 224)
    channels = next(model.parameters()).shape[1]
    with mendable(ImportError, RuntimeError, ValueError):
        summary(model, (options.batch_size, channels, size, size), depth=options.depth)
