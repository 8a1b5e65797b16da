"""A study under random SIGKILLs, of its runner, its workers and its cells: nothing lost, nothing
twice, the same table.

Rounds of one study of 24 cells, each in a new folder, until so many kills were done; a command that
ended is given again until the study is finished. After each round: every summary that was ever seen
is unchanged to the byte, logs have each step once and in order, and the table is that of an
undisturbed study, except for what is measured (seconds and memory).
"""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from bench.table import Record
from ufm_fast.runs.directory import RunDirectory
from ufm_fast.studies.folder import toml_text
from ufm_fast.studies.table import MEASURED

VICTIMS = ("runner", "worker", "cell")
CONTENT = {
    "solve": {
        "per_class": 5,
        "start": "normal",
        "device": "cpu",
        "lambda_w": 1e-3,
        "max_steps": 400,
    },
    "axes": {"classes": [4, 12, 40], "dim": [8, 48], "method": ["gd", "auto"], "seed": [0, 1]},
    "derived": {"lambda_h": "lambda_w / n"},
}
Tree = dict[str, list[int]]


def children(process: int) -> list[int]:
    """Of all threads of a process, by /proc."""
    found: list[int] = []
    for thread in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):  # it has ended
            found += [int(word) for word in thread.read_text("ascii").split()]
    return found


def tree(runner: int) -> Tree:
    """The processes of a study by their kind."""
    workers = children(runner)
    return {
        "runner": [runner],
        "worker": workers,
        "cell": [cell for worker in workers for cell in children(worker)],
    }


def command(file: Path, folder: Path, jobs: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [
        sys.executable,
        "-m",
        "ufm_fast.cli",
        "study",
        str(file),
        "--out",
        str(folder),
        "--jobs",
        str(jobs),
        "--quiet",
    ]
    return subprocess.Popen(
        words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def kill(process: subprocess.Popen[bytes], victim: str, after: float, until: float = 120.0) -> bool:
    """Kill a process of that kind ``after`` seconds from when there is one; False where the study
    ended before.
    """
    deadline = time.monotonic() + until
    while process.poll() is None and not tree(process.pid)[victim] and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(after)
    while process.poll() is None and time.monotonic() < deadline:
        found = tree(process.pid)[victim]
        if found:
            try:
                os.kill(random.choice(found), signal.SIGKILL)
            except ProcessLookupError:
                continue
            return True
        time.sleep(0.002)
    return False


def summaries(folder: Path) -> dict[str, bytes]:
    """The finished cells' summaries."""
    return {path.parent.name: path.read_bytes() for path in folder.glob("cells/*/summary.json")}


def disturbed(
    file: Path, folder: Path, victims: list[tuple[str, float]], jobs: int = 2
) -> tuple[int, int]:
    """Run a study to its end under kills, (kind, seconds) each; how many of them it took, and how
    many commands.

    Errors: AssertionError where a finished cell changed.
    """
    done, commands, seen = 0, 0, {}
    while True:
        process, commands = command(file, folder, jobs), commands + 1
        while done < len(victims) and kill(process, *victims[done]):
            done += 1
            now = summaries(folder)
            assert {name: now.get(name) for name in seen} == seen, "a finished cell has changed"
            seen = now
            if victims[done - 1][0] == "runner":
                break
        code = process.wait()
        if code == 0:
            assert {name: summaries(folder)[name] for name in seen} == seen, (
                "a finished cell has changed"
            )
            return done, commands
        assert code in (-signal.SIGKILL, 3), code


def table(folder: Path) -> list[dict[str, str]]:
    """The table without what is measured."""
    with (folder / "table.csv").open(newline="", encoding="utf-8") as file:
        return [
            {name: value for name, value in row.items() if name not in MEASURED}
            for row in csv.DictReader(file)
        ]


def check(folder: Path, undisturbed: Path) -> None:
    """Errors: AssertionError for a table that differs, or a log that is out of order."""
    pairs = zip(table(folder), table(undisturbed), strict=True)
    differing = [
        (row["cell"], name, row[name], plain[name])
        for row, plain in pairs
        for name in plain
        if row[name] != plain[name]
    ]
    assert not differing, f"the tables differ: {differing}"
    for path in (folder / "cells").iterdir():
        steps = [record["step"] for record in RunDirectory.open(path).records()]
        assert steps == sorted(set(steps)), f"the log of {path} is out of order"


def records(kills: int = 200, seed: int = 0) -> Iterator[Record]:
    random.seed(seed)
    with tempfile.TemporaryDirectory() as scratch:
        file, plain = Path(scratch, "study.toml"), Path(scratch, "plain")
        file.write_text(toml_text(CONTENT), "utf-8")
        assert command(file, plain, 2).wait() == 0
        left, number = kills, 0
        while left:
            folder = Path(scratch, f"round-{number}")
            victims = [
                (random.choice(VICTIMS), random.uniform(0.0, 1.5)) for _ in range(min(left, 12))
            ]
            began = time.monotonic()
            done, commands = disturbed(file, folder, victims)
            check(folder, plain)
            kinds = {
                f"{kind}s_killed": sum(victim == kind for victim, _ in victims[:done])
                for kind in VICTIMS
            }
            counts = {"kills": done, **kinds, "commands": commands}
            nothing = {"lost": 0, "twice": 0, "tables_differ": 0}  # else `check` had raised
            seconds = {"seconds": round(time.monotonic() - began, 1)}
            cells = {"round": number, "cells": len(table(folder))}
            yield Record(cells, {**counts, **nothing, **seconds})
            left, number = left - done, number + 1
