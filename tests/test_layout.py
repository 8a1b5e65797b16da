"""The house: who may import whom, what importing costs, and how the two packages are laid out."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "ufm_fast").rglob("*.py"))
#: Modules by height; one may import those below it and its own.
_FLOORS = (
    "errors version",
    "arguments stopwatch targets dense_targets weighted_targets losses adjustments "
    "angular_margins layout point tall spread trunks datasets lanczos memory",
    "class_groups geometries kinds sample_data samples penalties contradictions problem",
    "backends metrics",
    "objective scales deep_starts sharded_starts given_starts",
    "starts theory measure factor_metrics",
    "solvers functional groups",
    "nn solving verdicts landscape",
    "benchmark calibration runs presets plots curves plan doctor tensorboard continual networks",
    "reproduce studies",
    "cli __main__",
)
HEIGHT = {name: floor for floor, names in enumerate(_FLOORS) for name in names.split()}


def _imports(path: Path) -> list[tuple[str, bool]]:
    """(module, only for type checkers) of every ufm_fast or ufm_kernels import."""
    found = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.split(".")[0] in ("ufm_fast", "ufm_kernels")
        ):
            found.append((node.module, id(node) in typing_only))
        elif isinstance(node, ast.Import):
            found += [
                (a.name, id(node) in typing_only)
                for a in node.names
                if a.name.split(".")[0] in ("ufm_fast", "ufm_kernels")
            ]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_dependencies_point_one_way(path):
    parts = path.relative_to(ROOT / "ufm_fast").with_suffix("").parts
    if parts == ("__init__",):
        return
    own = HEIGHT[parts[0]]
    for module, typing_only in _imports(path):
        names = module.split(".")
        if names[0] == "ufm_kernels":
            triton = parts[0] == "backends" and parts[1].startswith("triton")
            assert triton, f"{path} imports {module}: only backends/triton*.py may"
        elif len(names) > 1 and not typing_only:
            assert HEIGHT[names[1]] <= own, f"{path} imports {module}, which stands above it"


def test_kernels_import_nothing_from_the_library():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not [m for m, _ in _imports(path) if m.startswith("ufm_fast")], path


def test_no_package_is_called_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_importing_the_package_and_its_command_line_does_not_import_torch():
    code = "import sys, ufm_fast, ufm_fast.cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_runs_need_no_command_line():
    modules = ", ".join(
        f"ufm_fast.runs.{path.stem}"
        for path in sorted((ROOT / "ufm_fast" / "runs").glob("[a-z]*.py"))
    )
    code = (
        f"import sys, {modules}; sys.exit(bool({{'typer', 'rich', 'ufm_fast.cli', 'matplotlib'}} "
        f"& set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_importing_everything_does_not_import_triton():
    code = (
        "import sys, ufm_fast.solving, ufm_fast.functional, ufm_fast.nn; sys.exit('triton' in "
        "sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_public_names_are_listed_and_described():
    code = (
        "import pydoc, ufm_fast; assert dir(ufm_fast) == sorted(ufm_fast.__all__)\n"
        "text = pydoc.render_doc(ufm_fast, renderer=pydoc.plaintext)\n"
        "missing = [name for name in ufm_fast.__all__ if name.strip('_') not in text]; assert not "
        "missing, missing"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": "kernels"},
    )


def test_help_of_solve_describes_every_argument_what_it_returns_and_an_example():
    from dataclasses import fields
    from inspect import signature

    from ufm_fast import solve
    from ufm_fast.solvers.options import SolveOptions

    text = solve.__doc__ or ""
    for name in [*signature(solve).parameters, *(field.name for field in fields(SolveOptions))]:
        assert f"``{name}" in text, name
    assert "Returns a Solution" in text
    assert ">>> solution = solve(" in text
