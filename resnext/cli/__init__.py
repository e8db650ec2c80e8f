"""The command line: ``resnext train | evaluate | predict | summary | export``.

Each command is a module, imported when it is called, so that ``resnext --help`` needs none of the packages that
training does.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

import torch

from resnext.cli.arguments import Options, parse
from resnext.cli.errors import CommandError, Interrupted, one_line

_MODULES = {
    "train": "training",
    "evaluate": "evaluation",
    "predict": "prediction",
    "summary": "inspection",
    "export": "exporting",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: What stands behind ``resnext`` on the command line; None: that of this process.

    Returns:
        The exit code: 0, or 2 after an error that the user can mend, of which one line on standard error tells, or
        130 after Ctrl-C.

    Raises:
        SystemExit: From argparse: after ``--help``, or with 2 for arguments that it does not understand.
    """
    options = parse(arguments)
    code = 2
    try:
        _command(options.command)(options)
        return 0
    except Interrupted as error:
        message, code = one_line(error), 130
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except torch.OutOfMemoryError as error:
        message = f"out of GPU memory ({one_line(error)}); lower --batch-size, and raise --accumulate instead"
    except (CommandError, OSError) as error:
        message = one_line(error)
    print(f"resnext {options.command}: {message}", file=sys.stderr)
    return code


def _command(name: str) -> Callable[[Options], None]:
    """The function that runs a command."""
    try:
        module = importlib.import_module(f"resnext.cli.{_MODULES[name]}")
    except ImportError as error:
        raise CommandError(
            f"expected the packages of resnext[train], got {one_line(error)}; pip install 'resnext[train]'"
        ) from error
    except RuntimeError as error:  # torchvision, when its compiled operators do not fit this torch
        raise CommandError(
            f"expected a torchvision made for torch {torch.__version__}, got one that does not import "
            f"({one_line(error)}); install builds of the two that belong together, both for CPUs or both for CUDA"
        ) from error
    return module.run
