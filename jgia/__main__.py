"""``python -m jgia`` is ``jgia``."""

import sys

from jgia.cli import main

if __name__ == "__main__":
    sys.exit(main())
