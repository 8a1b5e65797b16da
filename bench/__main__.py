"""Every script by its name: `python -m bench` lists them, `python -m bench NAME [...]` runs one
from the repository's root.
"""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
#: What is no case of its own: what the scripts share, and cases of pytest.
SHARED = (
    "__main__",
    "common",
    "oracle",
    "peers",
    "device",
    "device_solve",
    "gpu_plots",
    "test_functional",
    "test_head",
)


def cases() -> dict[str, str]:
    """Name of every case and its question: the first line of the script's docstring."""
    scripts = sorted(path for path in FOLDER.glob("*.py") if path.stem not in SHARED)
    documented = {
        path.stem: ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "" for path in scripts
    }
    return {name: text.partition("\n")[0] for name, text in documented.items()}


def main(arguments: list[str]) -> int:
    table = cases()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__.splitlines()[0])
        for name, question in table.items():
            print(f"  {name:16} {question}")
        return 0
    if arguments[0] not in table:
        print(f"no case {arguments[0]!r}; python -m bench lists them", file=sys.stderr)
        return 2
    script = FOLDER / f"{arguments[0]}.py"
    sys.path[:0] = [str(FOLDER), str(FOLDER.parent), str(FOLDER.parent / "kernels")]
    sys.argv = [str(script), *arguments[1:]]
    runpy.run_path(str(script), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
