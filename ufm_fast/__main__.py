"""``python -m ufm_fast``: the command line, as torchrun starts it on several ranks."""

import sys

from ufm_fast.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
