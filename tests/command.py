"""The command line in a process of its own, as ``python -m resnext``: python -m tests.command train ...

With torchvision as the tests have it (see conftest), which a user of a CPU build beside a CUDA build would not.
"""

import sys

from resnext.cli import main

from . import conftest  # noqa: F401

if __name__ == "__main__":
    sys.exit(main())
