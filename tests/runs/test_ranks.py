"""Runs on several ranks: resumed on other numbers of them, interrupted, killed, refused
together.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import rank_kills
from bench.rank_kills import PROBLEM, QUICK, SLOW, finish, kill_one, launch, start
from ufm_fast import Problem
from ufm_fast.cli import main
from ufm_fast.errors import InputError
from ufm_fast.layout import Layout, Mesh
from ufm_fast.point import Point
from ufm_fast.runs.directory import RunDirectory
from ufm_fast.runs.ranks import leave
from ufm_fast.runs.shards import fingerprint, spread_point
from ufm_fast.runs.state import load_rest, load_state

QUIET = ("--quiet", "--no-plots")
#: Each rank has its own classes' penalties, whoever else there is.
OWN = (*PROBLEM, "--classifier-penalties=-0.5")
DEEP = ("--counts", "3,1,2", "--dim", "6", "--layers", "2", "--lambda-w", ".01", "--loss", "mse")


def summary(run):
    return json.loads((run / "summary.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run in one process, never ended."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert main(["solve", *PROBLEM, "--out", str(run), *QUIET]) == 0
    return summary(run)["value"]


def test_a_run_goes_on_with_other_numbers_of_ranks_and_in_one_process(tmp_path, capsys):
    run, alone = tmp_path / "run", tmp_path / "alone"
    assert main(["solve", *OWN, "--out", str(alone), *QUIET]) == 0
    assert finish(start(2, *OWN, "--max-steps", "4", "--out", str(run))) == [(3, "")] * 2
    assert len(list(run.glob("shards-*"))) == 1
    assert summary(run)["steps"] == 4
    tensors, progress, _ = load_state(RunDirectory.open(run))
    assert (tensors["W"].shape, tensors["H"].shape, tensors["b"].shape, progress.step) == (
        (5, 6),
        (5, 6),
        (5,),
        4,
    )
    assert main(["solve", "--resume", str(run), "--max-steps", "2", *QUIET]) == 3
    assert not list(run.glob("shards-*"))
    assert finish(start(3, "--resume", str(run), "--max-steps", "1000")) == [(0, "")] * 3
    assert summary(run)["value"] == pytest.approx(summary(alone)["value"], rel=1e-10)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert (run / "metrics.jsonl").read_text().count("nc1_pinv") == len(steps)
    capsys.readouterr()
    assert main(["metrics", str(run), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)["metrics"]
    of_ranks = summary(run)["metrics"]
    assert "nc4" in of_ranks
    assert of_ranks.keys() == measured.keys()
    numbers = {name: value for name, value in measured.items() if value is not None}
    assert {name: of_ranks[name] for name in numbers} == pytest.approx(numbers, rel=1e-9, abs=1e-12)
    assert main(["plot", str(run)]) == 0
    assert main(["export", str(run), "--quiet"]) == 0
    assert summary(run)["certificate"]["certified"]


def test_margins_in_the_angle_go_on_with_other_numbers_of_ranks(tmp_path):
    run, alone, angles = tmp_path / "run", tmp_path / "alone", tmp_path / "labels.npy"
    np.save(angles, np.array([2, 0, 1, 0, 2, 1]))
    model = ("--labels", str(angles), "--dim", "4", "--reduce", "none", "--constraint", "sphere")
    model = (*model, "--temperature", "2", "--angular-margin", "0.3")
    assert main(["solve", *model, "--out", str(alone), *QUIET]) == 0
    begun = start(3, *model, "--start", "normal", "--max-steps", "2", "--out", str(run))
    assert finish(begun) == [(3, "")] * 3
    assert finish(start(2, "--resume", str(run), "--max-steps", "1000")) == [(0, "")] * 2
    assert summary(run)["value"] == pytest.approx(summary(alone)["value"], rel=1e-10)
    assert summary(run)["certificate"]["certified"]
    assert summary(run)["metrics"].keys() == summary(alone)["metrics"].keys()


def test_all_is_said_before_a_rank_waits_for_others_to_leave(monkeypatch):
    said = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(said))
    monkeypatch.setattr(torch.distributed, "barrier", lambda: heard.append(said.getvalue()))
    heard: list[bytes] = []
    print("a report", end="")
    leave()
    assert heard == [b"a report"]


def test_a_rank_ends_without_the_interpreters_shutdown():
    code = (
        "import atexit, os, runpy, sys; atexit.register(print, 'shut down'); sys.argv = "
        "['ufm-fast', '--version']; "
    )
    run = "runpy.run_module('ufm_fast', run_name='__main__')"
    path = os.pathsep.join((str(rank_kills.ROOT), str(rank_kills.ROOT / "kernels")))
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for more, ends in ((ranks, False), ({}, True)):
        environment = {**os.environ, "PYTHONPATH": path, **more}
        done = subprocess.run(
            [sys.executable, "-c", code + run],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip()
        assert ("shut down" in done.stdout) is ends


def test_a_rank_that_ends_before_it_is_connected_keeps_nobody_waiting():
    code = """
import os, socket, threading, time
from datetime import timedelta
from torch.distributed import TCPStore
from ufm_fast.runs import ranks

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
os.environ |= {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
ranks.START = timedelta(seconds=4)
other = threading.Thread(target=lambda: TCPStore("127.0.0.1", port, 2).set("here 1", ""))
other.start()
begun = time.monotonic()
try:
    with ranks.joined():
        pass
except Exception as error:
    print(ranks.is_loss(error), time.monotonic() - begun < 60, flush=True)
os._exit(0)
"""
    path = os.pathsep.join((str(rank_kills.ROOT), str(rank_kills.ROOT / "kernels")))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.stdout.split() == ["True", "True"], done.stderr


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Two ranks of ``ufm_fast solve``, by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "ufm_fast", "solve", *arguments, "--no-plots"]
    path = os.pathsep.join((str(rank_kills.ROOT), str(rank_kills.ROOT / "kernels")))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_torchrun_is_all_that_a_user_types(tmp_path, capsys):
    alone, vectors = tmp_path / "alone", tmp_path / "vectors.npy"
    np.save(vectors, np.cos(np.arange(21.0) ** 2).reshape(7, 3))
    problem = ("--targets", str(vectors), *DEEP[2:])
    assert main(["solve", *problem, "--out", str(alone), *QUIET]) == 0
    done = torchrun(*problem, "--out", str(tmp_path / "run"), "--mesh", "1x2", "--json")
    assert done.returncode == 0, done.stderr
    found, expected = json.loads(done.stdout), summary(alone)
    assert found["value"] == pytest.approx(expected["value"], rel=1e-10)
    assert found["metrics"].keys() == expected["metrics"].keys()
    capsys.readouterr()
    assert main(["metrics", str(tmp_path / "run"), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)["metrics"]
    assert measured["energy/hidden1"] == pytest.approx(found["metrics"]["energy/hidden1"])


def test_ranks_read_the_layers_of_a_run(tmp_path):
    run = tmp_path / "run"
    assert (
        main(["solve", *DEEP, "--max-steps", "2", "--start", "normal", "--out", str(run), *QUIET])
        == 3
    )
    tensors, _, reduce, blocks = load_rest(RunDirectory.open(run))
    given = {"counts": [3, 1, 2], "dim": 6, "layers": 2}
    problem, x = Problem(**given), Point.of(load_state(RunDirectory.open(run))[0])
    assert (reduce, blocks.folder) == ("classes", None)
    for rank in range(2):
        layout = Layout(Mesh((2, 1), rank, torch.device("cpu")), 3, 3)
        found = spread_point(run, blocks, problem, layout, (tensors["hidden1"],))
        assert torch.equal(found.W, x.W[layout.class_part])
        assert torch.equal(found.hidden[0], x.hidden[0])
        with pytest.raises(InputError, match="the layers in"):
            spread_point(run, blocks, problem, layout)


@pytest.mark.parametrize(("victim", "delay", "again"), [(0, 0.5, 1), (1, 1.0, 3), (1, 0.0, 1)])
def test_one_rank_is_killed(tmp_path, whole, victim, delay, again):
    out = tmp_path / "run"
    assert kill_one(out, 2, delay, victim, saved=True) < 60
    if again == 1:
        assert main(["solve", "--resume", str(out), *QUICK, *QUIET]) == 0
    else:
        assert finish(start(again, "--resume", str(out), *QUICK)) == [(0, "")] * again
    assert summary(out)["value"] == pytest.approx(whole, rel=1e-10)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_signal_to_one_rank_stops_all_and_saves(tmp_path):
    run = tmp_path / "run"
    ranks = start(2, *PROBLEM, *SLOW, "--out", str(run))
    while not (run / "state.safetensors").exists():
        assert all(rank.poll() is None for rank in ranks)
        time.sleep(0.05)
    ranks[1].send_signal(signal.SIGTERM)
    (first, said), (second, silent) = finish(ranks)
    assert (first, second, silent) == (130, 130, "")
    assert "and saved; go on with: ufm-fast solve --resume" in said
    assert summary(run)["outcome"] == "interrupted"
    assert load_state(RunDirectory.open(run))[1].step == summary(run)["steps"]


def test_what_ranks_refuse_they_refuse_together(tmp_path, capsys):
    for name, dim in (("same", "6"), ("alone", "7")):
        problem = ("--counts", "3,1,2,5,4", "--dim", dim, "--bias", "free", "--max-steps", "3")
        assert main(["solve", *problem, "--out", str(tmp_path / name), *QUIET]) == 3
    worker = str(Path(__file__).with_name("refusal_worker.py"))
    ended = finish(launch(2, sys.executable, worker, "{rank}", str(tmp_path)))
    assert ended == [(0, "")] * 2
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    words = {
        "mesh": "mesh 3x1 holds 3 ranks and there are 2; make CxS the number of ranks",
        "data": "rank 1 has other settings or data than rank 0; start every rank with",
        "flags of another problem": "counts = '1,3,2,5,4' contradicts the run",
        "state of another problem": "the hash in .*config.json is not that of its settings",
        "state of another width": r"shards-\d+ is missing or damaged \(Size mismatch",
        "state of another width, of one process": "W in .* does not fit config.json",
        "mesh of a run": "mesh 3x1 holds 3 ranks and there are 2; make CxS the number of ranks",
        "unlike ranks": "rank 1 has other settings or data than rank 0; start every rank with",
        "cut short": r"shards-\d+ is missing or damaged",
        "a bit flipped": r"the numbers of b in .*shards-\d+ are not those that were written",
        "a bit of one process": "the numbers of W in .* are not those that were written",
        "no shards": r"shards-\d+ is missing or damaged",
        "start of another problem": r"the start's W must have shape \(5, 6\), got \(5, 7\)",
    }
    assert first.keys() == second.keys() == {*words, "made", "goes on"}
    for name, message in words.items():
        for code, said in (first[name], second[name]):
            assert code == 2, name
            assert re.fullmatch(f"error: .*{message}.*\n", said), (name, said)
    assert [found["made"] for found in (first, second)] == [[3, ""]] * 2
    assert [found["goes on"] for found in (first, second)] == [[0, ""]] * 2
    assert not (tmp_path / "refused").exists()
    capsys.readouterr()
    assert main(["metrics", str(tmp_path / "a bit flipped")]) == 2
    assert "the numbers of b in" in capsys.readouterr().err


def test_fingerprints_of_blocks_add_up():
    x = torch.randn(7, 3, dtype=torch.float64)
    parts = [fingerprint(x[start : start + 3], 3 * start) for start in (0, 3, 6)]
    assert sum(parts) == fingerprint(x)
    assert fingerprint(x.flip(0)) != fingerprint(x)
    assert fingerprint(x[:0]) == 0


def test_ranks_with_other_settings_are_refused(tmp_path):
    path = tmp_path / "labels.npy"
    np.save(path, np.array([0, 1, 2, 0]))
    ranks = start(
        2, "--labels", str(path), "--dim", "4", "--seed", "{rank}", "--out", str(tmp_path / "run")
    )
    for code, said in finish(ranks):
        assert code == 2
        assert said.startswith(
            "error: rank 1 has other settings or data than rank 0; start every rank with the same "
            "command"
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two CUDA devices: NCCL takes one rank a device"
)
def test_ranks_on_gpus_find_the_minimum_go_on_and_certify(tmp_path, whole):
    """By NCCL; the drop-in loss is in tests/functional/test_distributed.py."""
    run = tmp_path / "run"
    given = (*PROBLEM, "--device", "cuda", "--max-steps", "4", "--quiet")
    assert torchrun(*given, "--out", str(run)).returncode == 1  # torchrun's own, of a 3
    assert summary(run)["steps"] == 4
    done = torchrun("--resume", str(run), "--max-steps", "1000", "--quiet")
    assert done.returncode == 0, done.stderr
    assert summary(run)["backend"].startswith("sharded")
    assert summary(run)["certificate"]["certified"]
    assert summary(run)["value"] == pytest.approx(whole, rel=1e-10)
