"""What a rank does in the test of refusals: ``python refusal_worker.py RANK FOLDER`` joins two
ranks once, and gives the command line one case after another, each on a copy of a run.

Each rank writes RANK.json: the exit code and what was said, of each case.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from ufm_fast.cli import main
from ufm_fast.runs import ranks

PROBLEM = ("--counts", "3,1,2,5,4", "--dim", "6", "--bias", "free")
OTHERS = {
    "counts": ("--counts", "1,3,2,5,4", "--dim", "6", "--bias", "free"),
    "width": ("--counts", "3,1,2,5,4", "--dim", "7", "--bias", "free"),
}
QUIET = ("--quiet", "--no-plots")


def solve(*arguments: str) -> tuple[int, str]:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(["solve", *arguments, *QUIET])
    return code, said.getvalue()


def of_labels(rank: int, folder: Path) -> tuple[str, str]:
    """A file of one name, with labels of each rank's own, in a folder of its own."""
    (own := folder / f"own{rank}").mkdir()
    os.chdir(own)
    np.save("labels.npy", [0, 1, 2, rank])
    return "--labels", "labels.npy"


def state_of(name: str) -> Callable[[Path], None]:
    """Another run's state in the place of a run's own."""

    def put(run: Path) -> None:
        for entry in (run / "state.safetensors", *run.glob("shards-*")):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        for entry in (run.parent / name).iterdir():
            if entry.is_dir():
                shutil.copytree(entry, run / entry.name)
            elif entry.name == "state.safetensors":
                shutil.copy(entry, run)

    return put


def cut_short(run: Path) -> None:
    shard = sorted(run.glob("shards-*/*.safetensors"))[-1]
    os.truncate(shard, shard.stat().st_size - 20)


def flipped(path: Path, place: int) -> None:
    """One bit of a number, so many bytes before the end of a file."""
    content = bytearray(path.read_bytes())
    content[-place] ^= 1
    path.write_bytes(content)


def of_last_shard(run: Path) -> None:
    flipped(sorted(run.glob("shards-*/*.safetensors"))[-1], 8)


def of_one_process(run: Path) -> None:
    """The same problem, solved by one process."""
    state_of("same")(run)
    with safe_open(run / "state.safetensors", "pt") as content:
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        metadata = content.metadata()
    tensors["W"][4, 5] += 1e-13
    save_file(tensors, run / "state.safetensors", metadata)


def taken_away(run: Path) -> None:
    (shards,) = run.glob("shards-*")
    shutil.rmtree(shards)


#: What becomes of a run, and what it is then resumed with.
CASES: dict[str, tuple[Callable[[Path], None] | None, tuple[str, ...]]] = {
    "flags of another problem": (None, ("--counts", "1,3,2,5,4")),
    "state of another problem": (state_of("counts"), ()),
    "state of another width": (state_of("width"), ()),
    "state of another width, of one process": (state_of("alone"), ()),
    "mesh of a run": (None, ("--mesh", "3x1")),
    "unlike ranks": (None, ("--max-steps", "1{rank}")),
    "cut short": (cut_short, ()),
    "a bit flipped": (of_last_shard, ()),
    "a bit of one process": (of_one_process, ()),
    "no shards": (taken_away, ()),
}


def cases(rank: int, folder: Path) -> dict[str, tuple[int, str]]:
    found = {"made": solve(*PROBLEM, "--max-steps", "3", "--out", str(folder / "run"))}
    found["mesh"] = solve(*PROBLEM, "--mesh", "3x1", "--out", str(folder / "refused"))
    found["data"] = solve(*of_labels(rank, folder), "--dim", "4", "--out", str(folder / "refused"))
    for name, problem in OTHERS.items():
        solve(*problem, "--max-steps", "3", "--out", str(folder / name))
    for name, (change, arguments) in CASES.items():
        run = folder / name
        if rank == 0:
            shutil.copytree(folder / "run", run)
            if change is not None:
                change(run)
        dist.barrier()
        own = [word.replace("{rank}", str(rank)) for word in arguments]
        found[name] = solve("--resume", str(run), *own)
    found["start of another problem"] = solve(
        *PROBLEM, "--start-from", str(folder / "alone"), "--out", str(folder / "started")
    )
    found["goes on"] = solve("--resume", str(folder / "run"), "--max-steps", "1000")
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, where = int(sys.argv[1]), Path(sys.argv[2])
    with ranks.joined() as here:
        ranks.joined = lambda: contextlib.nullcontext(here)  # type: ignore[assignment]
        (where / f"{place}.json").write_text(json.dumps(cases(place, where)))
