"""Ranks that are killed at a random moment: the others end with one line, and the run goes on with
other numbers of ranks.

    python -m bench rank_kills --kills 30 [--out TABLE]

Each round starts a solve on 2 or 3 ranks, kills one of them (SIGKILL) after a random time, from its
first moment to its last, and waits for the others. Then the run goes on, with another number of
ranks or in one process, to the value of a run that was never killed. Exits 1 where a rank took
longer than 60 s, said anything but our one line, or the value differs by more than 1e-10.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROBLEM = (
    "--counts",
    "3,1,2,5,4",
    "--dim",
    "6",
    "--lambda-w",
    ".01",
    "--lambda-h",
    ".01",
    "--bias",
    "free",
)
#: Steps enough to be killed in, and what goes on after that.
SLOW, QUICK = (
    ("--method", "gd", "--learning-rate", ".01"),
    ("--method", "auto", "--max-steps", "1000"),
)
SECONDS = 60.0
#: What a rank may say when another one is gone.
LINE = "another rank has ended, so this one ends too"


def start(ranks: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """The ranks of ``python -m ufm_fast solve``."""
    command = ("-m", "ufm_fast", "solve", "--no-plots", "--quiet")
    return launch(ranks, sys.executable, *command, *arguments)


def launch(ranks: int, *command: str) -> list[subprocess.Popen[str]]:
    """Ranks of a command, as torchrun starts them but for what torchrun adds. '{rank}': its
    number.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    common = {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    return [
        subprocess.Popen(
            [word.replace("{rank}", rank) for word in command],
            env={**common, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(ranks)},
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in map(str, range(ranks))
    ]


def finish(ranks: list[subprocess.Popen[str]], seconds: float = 300.0) -> list[tuple[int, str]]:
    """Exit codes and what was said on standard error. Errors: subprocess.TimeoutExpired."""
    ends = time.monotonic() + seconds
    try:
        return [
            (rank.wait(max(0.1, ends - time.monotonic())), rank.communicate()[1]) for rank in ranks
        ]
    finally:
        for rank in ranks:
            rank.kill()


def wrong_words(said: str) -> str:
    """What was said beside the one line; torch's own warnings of a closed connection begin with a
    bracket.
    """
    lines = [
        line
        for line in said.splitlines()
        if line
        and not line.startswith(("[W", "[E", "[rank", "Exception raised", "frame #", "<omitting"))
    ]
    ours = [line for line in lines if LINE in line]
    return "" if len(ours) == 1 and len(lines) == 1 else said


def kill_one(out: Path, ranks: int, delay: float, victim: int, *, saved: bool = False) -> float:
    """Kill that rank after so many seconds, from the first save on with ``saved``; the seconds that
    the others took to end.

    Errors: AssertionError.
    """
    running = start(ranks, *PROBLEM, *SLOW, "--out", str(out))
    while (
        saved
        and not (out / "state.safetensors").exists()
        and all(rank.poll() is None for rank in running)
    ):
        time.sleep(0.05)
    time.sleep(delay)
    if all(rank.poll() is not None for rank in running):
        finish(running)
        return 0.0  # it was quicker
    running[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    ended = finish([rank for r, rank in enumerate(running) if r != victim], SECONDS)
    running[victim].communicate()
    for code, said in ended:
        assert code == 0 or not wrong_words(said), said
    return time.monotonic() - killed


def go_on(out: Path, ranks: int) -> float:
    """The value that the run comes to. Errors: AssertionError."""
    begun = (out / "config.json").exists()
    if not begun:
        shutil.rmtree(out, ignore_errors=True)
    arguments = (*QUICK, "--resume", str(out)) if begun else (*PROBLEM, "--out", str(out))
    for code, said in finish(start(ranks, *arguments)):
        assert code == 0, said
    return float(json.loads((out / "summary.json").read_text())["value"])


def record(table: Path, kills: int, measured: dict[str, float]) -> None:
    """Add a line a figure to a table of results."""
    sys.path.insert(0, str(Path(__file__).parent))
    from measure import environment
    from table import Record, add, lines

    add(table, lines("rank_kills", Record({"kills": kills}, measured), environment()))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=float, default=20.0, help="seconds of the latest kill")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    folder = Path(tempfile.mkdtemp())
    value, failures, longest = go_on(folder / "whole", 1), 0, 0.0
    for number in range(args.kills):
        ranks, out = draw.choice((2, 3)), folder / f"run{number}"
        try:
            took = kill_one(out, ranks, draw.uniform(0.0, args.most), draw.randrange(ranks))
            gap = abs(go_on(out, draw.choice([n for n in (1, 2, 3) if n != ranks])) / value - 1)
            assert gap <= 1e-10, f"the value differs by {gap:.1e}"
            longest = max(longest, took)
            print(f"kill {number + 1}: the others ended after {took:.1f} s", flush=True)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            failures += 1
            print(f"kill {number + 1} FAILED: {error}", flush=True)
    shutil.rmtree(folder)
    print(f"{args.kills} kills, {failures} failures, the others ended within {longest:.1f} s")
    if args.out:
        record(args.out, args.kills, {"failures": failures, "longest_seconds": round(longest, 1)})
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
