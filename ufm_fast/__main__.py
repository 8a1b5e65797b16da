"""``python -m ufm_fast``: the command line, as torchrun starts it on several ranks.

A rank ends without the interpreter's shutdown: threads of torch's exchanges may still run there,
after another rank has gone too, and C++ then ends the process by a signal ("terminate called
without an active exception") whatever its exit code was.
"""

import os
import sys

from ufm_fast.cli.app import main
from ufm_fast.runs.ranks import flush, started

if __name__ == "__main__":
    code = main()
    if started():
        flush()
        os._exit(code)
    sys.exit(code)
