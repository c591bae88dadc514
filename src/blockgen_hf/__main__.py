"""`python -m blockgen_hf` is the command `blockgen-hf`."""

import sys

from .cli import main


if __name__ == "__main__":
    sys.exit(main())
