"""The command line in a process of its own, as ``python -m resnext``: python -m tests.cli train ...

With torchvision as the tests have it (see conftest), which a user of a CPU build beside a CUDA build would not. After
``--double`` everything is computed in float64, where rounding cannot grow to anything during a short training.
"""

import sys

import torch

from resnext.cli import main

from . import conftest  # noqa: F401


def compute_in_double() -> None:
    from resnext.cli.engine import Placement

    images = Placement.images
    Placement.images = lambda self, batch: images(self, batch).double()  # type: ignore[method-assign]
    torch.set_default_dtype(torch.float64)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if "--double" in arguments:
        arguments.remove("--double")
        compute_in_double()
    sys.exit(main(arguments))
