"""Everything that bench/ measures, by name: `python -m bench` lists the cases, `python -m bench
NAME --help` says what one measures and its options, `python -m bench NAME [...]` runs it.

How the parts fit. A case is a module with a function ``records`` that yields a `table.Record` for
every contender in every setting; its arguments are the command's options, the first line of its
docstring is its question. `measure` has the one way of measuring, `ufm_fast.benchmark.rivals` (on a
GPU `peers`) the ways to compute the same, and `table` the long table that a machine has in
results/. Cases compare contenders inside one run, interleaved, and report ratios: absolute times
of a shared machine mean little. A case prints what it measures; ``--save`` adds it to the table of
this machine, ``--out FILE`` to another one, line by line, so that what was measured survives.

`CASES` is the one list. `reasons/` holds what decided something once: the file that a decision
governs cites the case, which stands there to be measured again, on another machine or another
torch. `SCRIPTS` have command lines of their own: those for a GPU, one of which goes on where it
ended, and those of processes that kill, watch or compare others. ``python -m bench gather FILE``
adds what a GPU's scripts wrote to the table of its machine.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
#: Heading -> its cases.
CASES: dict[str, tuple[str, ...]] = {
    "heads": ("head", "functional", "spread"),
    "solves": ("solve_time", "certificate", "depth", "spheres", "million", "groups"),
    "memory and plan": ("memory", "sphere_memory", "plan"),
    "studies, ranks, papers": ("study_kills", "study_jobs", "sharded", "rank_kills", "reproduce"),
    "that a move changes nothing": ("same_bits", "same_speed"),
    "a GPU (with --rehearse none is needed)": ("gpu", "breakdown", "tune"),
    "settled reasons": (
        "exponentials", "layout", "few_classes", "preconditioner", "squared_model", "pick_all",
        "codes", "focal_bound", "rank_models",
    ),
}  # fmt: skip
SCRIPTS = (
    "gpu", "breakdown", "tune", "sharded", "rank_kills", "reproduce", "same_bits", "same_speed",
)  # fmt: skip
#: What is no case of its own: what the cases share, and cases of pytest-benchmark.
SHARED = (
    "__main__", "measure", "table", "oracle", "peers", "device", "device_solve", "gpu_plots",
    "test_heads",
)  # fmt: skip


def path_of(name: str) -> Path:
    """The file of a case."""
    return FOLDER / ("reasons" if name in CASES["settled reasons"] else "") / f"{name}.py"


def question(name: str) -> str:
    """What a case answers: the first sentence of its docstring."""
    text = ast.get_docstring(ast.parse(path_of(name).read_text("utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())


def options(name: str, records: Callable[..., object], doc: str | None) -> argparse.ArgumentParser:
    """The command line of a case: its function's arguments, by the types of their defaults."""
    parser = argparse.ArgumentParser(
        prog=f"python -m bench {name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for argument in inspect.signature(records).parameters.values():
        flag, default = f"--{argument.name.replace('_', '-')}", argument.default
        if default is False:
            parser.add_argument(flag, action="store_true")
        else:
            parser.add_argument(flag, type=type(default), default=default, help=f"{default!r}")
    parser.add_argument("--save", action="store_true", help="add to this machine's table")
    parser.add_argument("--out", type=Path, help="add to this table (CSV)")
    return parser


def run(name: str, arguments: list[str]) -> None:
    """Run a case; print its records, and add each to the tables that were asked for."""
    from bench import measure, table

    folder = path_of(name).relative_to(FOLDER.parent).with_suffix("")
    module = importlib.import_module(".".join(folder.parts))
    chosen = vars(options(name, module.records, module.__doc__).parse_args(arguments))
    save, out = chosen.pop("save"), chosen.pop("out")
    print(", ".join(f"{key} {value}" for key, value in measure.environment().items()), flush=True)
    for record in module.records(**chosen):
        where = measure.environment()  # a case may choose its threads
        paths = [table.path_of(table.machine(where))] if save else []
        words = [*record.case.values(), record.contender, record.note]
        figures = [f"{key} {value}" for key, value in record.measured.items()]
        print(*(str(word) for word in (*words, *figures) if word != ""), sep="\t", flush=True)
        for path in (*paths, *([out] if out else ())):
            table.add(path, table.lines(name, record, where))


def gather(files: list[str]) -> None:
    """Add tables of a GPU's scripts to those of their machines."""
    from bench import table

    for file in files:
        found = table.gather(Path(file))
        for machine in dict.fromkeys(line["machine"] for line in found):
            more = [line for line in found if line["machine"] == machine]
            path = table.path_of(machine)
            table.add(path, more)
            print(f"{len(more)} lines added to {path}")


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(" ".join(__doc__.partition("\n\n")[0].split()))
        for heading, names in CASES.items():
            print(f"\n{heading}")
            for name in names:
                print(f"  {name:15} {question(name)}")
        return 0
    name, *rest = arguments
    sys.path[:0] = [str(FOLDER), str(FOLDER.parent), str(FOLDER.parent / "kernels")]
    if name == "gather":
        gather(rest)
    elif not any(name in names for names in CASES.values()):
        print(f"no case {name!r}; python -m bench lists them", file=sys.stderr)
        return 2
    elif name in SCRIPTS:
        sys.argv = [str(path_of(name)), *rest]
        runpy.run_path(str(path_of(name)), run_name="__main__")
    else:
        run(name, rest)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
