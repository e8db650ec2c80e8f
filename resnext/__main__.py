"""`python -m resnext`: the command line (`resnext.cli`)."""

import sys

from resnext.cli import main

if __name__ == "__main__":
    sys.exit(main())
