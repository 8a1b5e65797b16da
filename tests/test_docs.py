"""The pages of the site: examples run, commands have the flags that they name, and what is
generated covers the code.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import typer

from ufm_fast.cli.app import app
from ufm_fast.metrics import DESCRIPTIONS
from ufm_fast.reproduce import CLAIMS

DOCS = Path(__file__).parents[1] / "docs"
GENERATED = ("metrics.md", "gallery.md", "reference.md", "benchmark.md")
PAGES = sorted(page for page in DOCS.rglob("*.md") if page.name not in GENERATED)


def _blocks(page: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )


def _with(language: str) -> list[Path]:
    return [page for page in PAGES if _blocks(page, language)]


@pytest.mark.parametrize("page", _with("python"), ids=lambda page: page.stem)
def test_examples_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for block in _blocks(page, "python"):
        exec(compile(block, str(page), "exec"), {"__name__": "example"})


@pytest.mark.parametrize("page", _with("bash"), ids=lambda page: page.stem)
def test_commands_have_the_flags_that_they_name(page: Path) -> None:
    commands = typer.main.get_command(app)
    lines = "\n".join(_blocks(page, "bash")).replace("\\\n", " ").splitlines()
    for line in lines:
        words = shlex.split(re.sub(r"\$\w+", "1", line), comments=True)
        if words[:1] == ["ufm-fast"]:
            command = commands.commands[words[1]]  # type: ignore[attr-defined]
            command.make_context(words[1], words[2:], resilient_parsing=False)


def test_the_readme_says_what_parquet_needs_and_what_RUN_is() -> None:
    words = " ".join((DOCS.parent / "README.md").read_text("utf-8").split())
    section = words[words.index("## Command line") : words.index("ufm-fast export RUN")]
    for said in (
        "parquet, which needs the extra `tables`",
        '".[tables]"',
        "RUN stands for the folder",
        ". .venv/bin/activate",
    ):
        assert said in section


def test_pages_from_the_code_cover_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    monkeypatch.delitem(sys.modules, "generated", raising=False)
    import generated

    metrics, gallery, reference = (
        generated.metrics(),
        generated.gallery(DOCS / "figures"),
        generated.reference(),
    )
    assert all(f"| `{name}` |" in metrics for name in DESCRIPTIONS)
    assert all(f"## {name}\n" in gallery for name in CLAIMS)
    page = generated.benchmark(DOCS / "bench" / "bench.json")
    assert page.count("| three products |") >= 1
    made = json.loads((DOCS / "bench" / "bench.json").read_text("utf-8"))["environment"]
    assert f"torch {made['versions']['torch']}, {made['date']}" in page
    assert "### ufm_fast.solve\n" in reference
    assert " at 0x" not in reference  # an address of this build
    assert "### ufm_fast.functional.linear_cross_entropy\n" in reference
    pictures = re.findall(
        r"!\[[^\]]*\]\(([^)]*)\)", "".join(page.read_text("utf-8") for page in PAGES)
    )
    assert pictures
    assert all((DOCS / "figures" / Path(picture).name).exists() for picture in pictures)
