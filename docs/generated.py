"""Pages of the site that are made from the code: metrics, the gallery of claims, and the reference.

Docstrings are plain text with formulas in it, as help() shows them, so they are shown as they stand
and no markup reads them.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

#: Modules of the reference, in its order.
MODULES = (
    "ufm_fast",
    "ufm_fast.functional",
    "ufm_fast.nn",
    "ufm_fast.metrics",
    "ufm_fast.theory",
    "ufm_fast.groups",
    "ufm_fast.landscape",
    "ufm_fast.networks",
    "ufm_fast.networks.overlay",
    "ufm_fast.networks.switch",
    "ufm_fast.networks.tags",
    "ufm_fast.continual",
    "ufm_fast.reproduce",
    "ufm_fast.plots",
    "ufm_fast.curves",
    "ufm_fast.presets",
)


def write(folder: Path) -> None:
    """Write the generated pages into the folder of the others."""
    for name, content in (
        ("metrics", metrics()),
        ("gallery", gallery(folder / "figures")),
        ("reference", reference()),
        ("benchmark", benchmark(folder / "bench" / "bench.json")),
    ):
        page = folder / f"{name}.md"
        if (
            not page.exists() or page.read_text("utf-8") != content
        ):  # an unchanged page is not built anew
            page.write_text(content, "utf-8")


METRICS_HEAD = """\
# Metrics

K is the number of classes, mu_k a class mean, mu_G the sample mean, mu_C the mean of class means, E
the normalised simplex ETF (I - 1 1'/K)/sqrt(K-1), |.| the Frobenius norm. Sigma_W is averaged over
samples, Sigma_B over classes. `ufm-fast metrics RUN` gives all that the inputs allow, and
`ufm_fast.metrics.collect` does from Python; none needs an N x K or K x K array. NC1 is zero by
itself where one row stands for a class: solve with `--reduce none` to see it fall.

| name | what it is | formula | source |
| --- | --- | --- | --- |
"""

GALLERY_HEAD = """\
# Gallery of claims

One command regenerates each figure, with a CSV of what it shows and a verdict beside it. The
pictures are the output of `ufm-fast reproduce all --quick`, copied here by `docs/figures.py`.
"""


def metrics() -> str:
    """A row for each metric of the catalogue."""
    from ufm_fast.metrics import DESCRIPTIONS, METRICS

    rows = (
        f"| `{name}` | {_cell(row.description)} | `{_cell(row.formula)}` | {row.source} |\n"
        for name, row in METRICS.items()
    )
    others = (
        f"| `{name}` | {_cell(words)} | | |\n"
        for name, words in DESCRIPTIONS.items()
        if name not in METRICS
    )
    return METRICS_HEAD + "".join((*rows, *others))


def gallery(figures: Path) -> str:
    """A section for each claim: its sentence, the command, the figure, and what it is judged by."""
    from ufm_fast.reproduce import CLAIMS

    return GALLERY_HEAD + "".join(_claim(claim, figures) for claim in CLAIMS.values())


def _claim(claim: Any, figures: Path) -> str:
    shown = (figures / f"{claim.name}.png").exists()
    judged = [
        f"| {_cell(q.name)} | {q.theory:.15g} | {q.relation} | {q.tolerance:g} |\n"
        for q in claim.quantities
        if q.theory is not None
    ]
    header = "| quantity | theory | deviation | tolerance |\n| --- | --- | --- | --- |\n"
    parts = (
        f"\n## {claim.name}\n\n{_text(claim.claim)} ({claim.paper})\n",
        f"```bash\nufm-fast reproduce {claim.name}\n```\n",
        f"![{claim.name}](figures/{claim.name}.png)\n" if shown else "",
        f"- The paper's setting: {_text(claim.papers)}\n- Our choice: {_text(claim.ours)}\n- "
        f"Quick: {_text(claim.quick)}\n",
        header + "".join(judged) if judged else "Reported: theory has no value for it.\n",
    )
    return "\n".join(parts)


def reference() -> str:
    """Signature and docstring of every public name."""
    parts = ["# Reference\n\nEvery public name with its docstring, as `help()` shows it.\n"]
    for name in MODULES:
        module = importlib.import_module(name)
        parts.append(f"## {name}\n\n{_plain(inspect.getdoc(module) or '')}")
        for public, thing in public_names(module):
            parts.append(f"### {name}.{public}\n\n{_described(public, thing)}")
    return "\n".join(parts)


BENCHMARK_HEAD = """\
# What it claims, measured

`ufm-fast bench` measures these on your machine. What stands here is what

```bash
ufm-fast bench --device cpu --out docs/bench
```

wrote on {processor} ({threads} threads), {platform}, Python {python}, torch {torch}, {date}. Heads
are called in turn: compare rows with one another, not with another machine's.

![Percent of the products' rate, extra memory, and errors near collapse](bench/bench.png)
"""


def benchmark(path: Path) -> str:
    """The tables of `ufm-fast bench`, from what it wrote."""
    from ufm_fast.cli.bench import TITLES, cell

    found = json.loads(path.read_text("utf-8"))
    where = {**found["environment"], **found["environment"]["versions"]}
    parts = [BENCHMARK_HEAD.format_map(where)]
    for name, title in TITLES.items():
        columns = list(found[name][0])
        lines = [
            " | ".join(column.replace("_", " ") for column in columns),
            " | ".join("---" for _ in columns),
            *(" | ".join(cell(x, row[x]) for x in columns) for row in found[name]),
        ]
        parts.append(f"\n**{title.capitalize()}**\n\n" + "".join(f"| {x} |\n" for x in lines))
    return "".join(parts)


def public_names(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Names of __all__, or the functions and classes that the module itself defines."""
    listed = getattr(module, "__all__", None)
    for name in sorted(listed or vars(module)):
        thing = getattr(module, name)
        at_home = getattr(thing, "__module__", None) == module.__name__ and not name.startswith("_")
        if callable(thing) and (at_home if listed is None else True):
            yield name, thing


def _described(name: str, thing: Any) -> str:
    try:
        signature = re.sub(r" at 0x[0-9a-f]+", "", str(inspect.signature(thing)))
    except (TypeError, ValueError):
        signature = "(...)"
    methods = ""
    if inspect.isclass(thing):
        for method, member in vars(thing).items():
            if inspect.isfunction(member) and not method.startswith("_") and inspect.getdoc(member):
                methods += _plain(f"{method}{inspect.signature(member)}", "python") + _plain(
                    inspect.getdoc(member) or ""
                )
    return f"{_plain(name + signature, 'python')}{_plain(inspect.getdoc(thing) or '')}{methods}"


def _plain(text: str, language: str = "text") -> str:
    """A block that nothing interprets."""
    fence = "~~~~" if "```" in text else "```"
    return f"{fence}{language}\n{text}\n{fence}\n\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _text(text: str) -> str:
    """Words in which < and | mean themselves."""
    return text.replace("<", "&lt;").replace("*", "\\*")
