"""What the scripts share: the record of machine and versions, interleaved timing, peak memory of a
child process.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed
from ufm_fast.benchmark.measuring import interleave, median_ratio

__all__ = [
    "environment",
    "interleave",
    "median_ratio",
    "peak_rss_bytes",
    "reset_peak",
    "rounds_and_out",
    "write_csv",
]


def environment() -> dict[str, str]:
    """Machine, versions, commit and date: a figure without them is no figure."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next(
            (
                x.split(":")[1].strip()
                for x in cpuinfo.read_text("utf-8").splitlines()
                if x.startswith("model name")
            ),
            model,
        )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "machine": f"{model}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": os.environ.get("UFM_COMMIT")
        or commit
        or "unknown",  # named where a copy of the tree has not its history
        "date": datetime.date.today().isoformat(),
        **({"device": torch.cuda.get_device_name(0)} if torch.cuda.is_available() else {}),
    }


def rounds_and_out(doc: str | None, rounds: int) -> argparse.Namespace:
    """The command line of a script with these two options; prints the machine it runs on."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    print(environment())
    return args


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far, or since ``reset_peak``."""
    status = Path("/proc/self/status")
    if status.exists():
        return (
            next(
                int(x.split()[1])
                for x in status.read_text("utf-8").splitlines()
                if x.startswith("VmHWM")
            )
            << 10
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def reset_peak() -> None:
    """Forget the peak so far (Linux): what was allocated and freed before must not hide what
    comes.
    """
    Path("/proc/self/clear_refs").write_text("5", "ascii")


def write_csv(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """Rows with the environment in front, as comment lines."""
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        for name, value in environment().items():
            file.write(f"# {name}: {value}\n")
        writer = csv.DictWriter(
            file, fieldnames=list(dict.fromkeys(k for row in rows for k in row))
        )
        writer.writeheader()
        writer.writerows(rows)
