"""Where each file of this folder runs.

The decorator of a kernel reads TRITON_INTERPRET when it is imported, so values are tested in a process of their own
(tests/test_kernels.py starts it), and the compile gate in one without it. On a CUDA device the value tests run compiled.
"""

import os
from importlib.util import find_spec

import torch

if find_spec("triton") is None:  # macOS, Windows, bare CPU builds
    collect_ignore_glob = ["test_*.py"]
elif os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore = ["test_compile.py", "test_bench.py"]
elif not torch.cuda.is_available():
    collect_ignore = ["test_interpreter.py", "test_interpreter_fp8.py"]
