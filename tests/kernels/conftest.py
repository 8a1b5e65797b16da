"""What of this folder does not run: all of it without triton; under its interpreter, what compiles
(see ../conftest.py).
"""

import os
from importlib.util import find_spec

if find_spec("triton") is None:  # macOS, Windows, bare CPU builds
    collect_ignore_glob = ["test_*.py"]
elif os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore = ["test_compile.py", "test_bench.py"]
