"""``study``: many solves over axes of settings, from Python."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ufm_fast.arguments import whole
from ufm_fast.studies import ready
from ufm_fast.studies.cells import Cell, chains, check
from ufm_fast.studies.folder import StudyFolder, toml_text
from ufm_fast.studies.runner import Progress, Report, Runner, parse_shard, sharded
from ufm_fast.studies.spec import Study, make_study
from ufm_fast.studies.table import Row

Source = str | os.PathLike[str] | Mapping[str, Any]


@dataclass(frozen=True)
class StudyResult:
    """A study that was run. ``rows``: a dictionary a cell (``pandas.DataFrame(result.rows)`` is the
    table); ``failed``: cells that could not be solved, by name, and why; ``interrupted``: stopped
    by a signal, and the same call goes on.
    """

    path: Path
    rows: list[Row]
    failed: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


@dataclass(frozen=True)
class Prepared:
    """A study whose every cell was checked, and nothing written."""

    study: Study
    text: str
    chains: list[tuple[Cell, ...]]
    work: dict[str, float]

    @property
    def cells(self) -> list[Cell]:
        return [cell for chain in self.chains for cell in chain]


def prepare(source: Source) -> Prepared:
    """Read and check a study: a file, the name of a ready one, or its content. Errors: InputError
    for all that is refused.
    """
    if isinstance(source, Mapping):
        made = make_study(source, "study")
        text = toml_text(source)
    else:
        made, text = ready.load(os.fspath(source))
    studied = chains(made)
    return Prepared(made, text, studied, check(studied))


def run(
    prepared: Prepared,
    out: Path,
    *,
    jobs: int | None = None,
    shard: str | None = None,
    report: Report | None = None,
) -> tuple[StudyResult, Progress]:
    """Solve what is left of a prepared study in the folder ``out``. Errors: as ``study``."""
    chosen = sharded(prepared.chains, parse_shard(shard))
    count = whole(prepared.study.jobs if jobs is None else jobs, "jobs", 1, 4096)
    folder = StudyFolder.create(out, prepared.study, prepared.text)
    runner = Runner(
        folder,
        prepared.cells,
        chosen,
        prepared.work,
        count,
        report or (lambda progress, cell: None),
    )
    rows = runner.run()
    progress = runner.progress
    return StudyResult(out, rows, progress.failed, progress.interrupted), progress


def study(
    source: Source,
    out: str | os.PathLike[str] | None = None,
    *,
    jobs: int | None = None,
    shard: str | None = None,
) -> StudyResult:
    """Solve every cell of a study into a folder, and give its table. A call that was stopped or
    killed goes on when made again.

    ``source``: a TOML file, the name of a ready study, or the same content as a dictionary, as
    ``{"solve": {"dim": 16}, "axes": {"classes": [4, 8], "seed": [0, 1]}, "derived": {"lambda_h":
    "lambda_w / n"}}``.
    ``out``: the folder (default studies/NAME). ``jobs``: cells at a time, each in a process of its
    own, with the threads shared out (default: what the study says, else 1). ``shard``: "i/n", the
    i-th of n parts, for job arrays; parts may share the folder.

    Errors: InputError, before anything is written, for unknown names, contradictory settings or
    axes, expressions that do not evaluate, and a folder of another study; and where the disk can't
    be written, with all finished cells kept.
    """
    prepared = prepare(source)
    result, _ = run(
        prepared,
        default_folder(prepared.study) if out is None else Path(out),
        jobs=jobs,
        shard=shard,
    )
    return result


def default_folder(study: Study) -> Path:
    """Where a study goes without ``out``."""
    return Path("studies") / study.name
