"""The state of a run: what is written is read back, and damaged files are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ufm_fast.errors import InputError
from ufm_fast.point import Point
from ufm_fast.problem import Problem
from ufm_fast.runs.directory import LOCK, RunDirectory
from ufm_fast.runs.foreign import read_head, read_tensors
from ufm_fast.runs.state import (
    Progress,
    data_arguments,
    load_state,
    read_safetensors,
    save_state,
    state_head,
)
from ufm_fast.targets import TargetSets


def make(path: Path) -> RunDirectory:
    return RunDirectory.create(path, {"loss": "ce"}, "digest", {})


def point(problem: Problem, reduce: str = "classes") -> Point:
    generator = torch.Generator().manual_seed(3)
    rows = problem.rows(reduce).number
    W, H = (
        torch.randn(n, problem.dim, generator=generator, dtype=torch.float64)
        for n in (problem.num_classes, rows)
    )
    return Point(
        W,
        H,
        None if problem.bias == "none" else torch.zeros(problem.num_classes, dtype=torch.float64),
    )


def test_an_interrupt_while_the_state_is_written_keeps_the_old_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem(dim=3, classes=2)
    run = make(tmp_path / "r")
    save_state(run, problem, point(problem), "classes", Progress(1))
    before = run.state_file.read_bytes()

    def cut_short(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("ufm_fast.runs.state.save_file", cut_short)
    with pytest.raises(KeyboardInterrupt):
        save_state(run, problem, point(problem), "classes", Progress(2))
    assert run.state_file.read_bytes() == before
    assert not [file for file in run.path.glob(".*") if file.name != LOCK]


PROBLEMS = {
    "per class": {"dim": 4, "classes": 3, "per_class": 2},
    "counts": {"dim": 4, "counts": [3, 0, 2], "bias": "penalised", "lambda_b": 0.1},
    "labels": {"dim": 4, "labels": [2, 0, 0, 1, 2]},
    "target sets": {
        "dim": 4,
        "loss": "pick-all",
        "target_sets": TargetSets.create([0, 1, 2, 4, 5], [0, 1, 0, 2, 1], 3, [2, 1, 3, 4]),
    },
}


@pytest.mark.parametrize("kind", PROBLEMS)
@pytest.mark.parametrize("reduce", ["classes", "none"])
def test_the_state_holds_the_point_and_the_data(kind: str, reduce: str, tmp_path: Path) -> None:
    problem = Problem(**PROBLEMS[kind])
    run, written = make(tmp_path / "r"), point(problem, reduce)
    save_state(run, problem, written, reduce, Progress(7, 9.5, 0.1))
    tensors, progress, found = load_state(run)
    assert (progress, found) == (Progress(7, 9.5, 0.1), reduce)
    assert torch.equal(tensors["W"], written.W)
    assert torch.equal(tensors["H"], written.H)
    assert ("b" in tensors) == (problem.bias != "none")
    data = {"labels", "counts", "per_class", "target_sets"}
    rest = {key: value for key, value in PROBLEMS[kind].items() if key not in data}
    again = Problem(**{"classes": problem.num_classes, **rest, **data_arguments(tensors)})
    assert torch.equal(again.counts, problem.counts)
    for name in ("classes", "none"):
        left, right = again.rows(name), problem.rows(name)
        assert torch.equal(left.counts, right.counts)
        assert torch.equal(left.targets.indices, right.targets.indices)
    if problem.target_sets is None:
        assert torch.equal(again.sample_labels, problem.sample_labels)


def test_the_head_of_a_state_has_the_rows_with_one_label(tmp_path: Path) -> None:
    problem = Problem(**PROBLEMS["target sets"])
    run, written = make(tmp_path / "r"), point(problem)
    save_state(run, problem, written, "classes", Progress())
    for head in (
        read_head(run.path, "x"),
        read_head(run.state_file, "x"),
        state_head(load_state(run)[0]),
    ):
        assert head.skipped == 1
        assert head.labels is not None
        assert head.labels.tolist() == [0, 1]
        assert head.counts is not None
        assert head.counts.tolist() == [2, 5]
        assert head.H is not None
        assert torch.equal(head.H, written.H[:2])


def test_damaged_states_are_refused(tmp_path: Path) -> None:
    problem = Problem(dim=3, classes=2)
    run = make(tmp_path / "r")
    with pytest.raises(InputError, match="missing"):
        load_state(run)
    save_state(run, problem, point(problem), "classes", Progress())
    whole = run.state_file.read_bytes()
    for size in (0, 4, 60, len(whole) - 1):
        run.state_file.write_bytes(whole[:size])
        with pytest.raises(InputError, match="truncated"):
            load_state(run)
    save_file({"x": torch.ones(2)}, run.state_file)
    with pytest.raises(InputError, match="not a state"):
        load_state(run)
    tensors = {key: torch.ones(2) for key in ("W", "H", "counts", "row_counts")}
    save_file(tensors, run.state_file, {"format": "ufm-fast-state", "step": "two"})
    with pytest.raises(InputError, match="damaged"):
        load_state(run)


def test_nothing_is_pickled(tmp_path: Path) -> None:
    problem = Problem(**PROBLEMS["labels"])
    run = make(tmp_path / "r")
    save_state(run, problem, point(problem), "classes", Progress())
    header = run.state_file.read_bytes()
    size = int.from_bytes(header[:8], "little")
    assert set(json.loads(header[8 : 8 + size])["__metadata__"]) == {
        "format",
        "reduce",
        "step",
        "evaluations",
        "seconds",
        "activation",
        "checksum",
        "sums",
    }
    (tmp_path / "x.pt").write_bytes(b"")
    with pytest.raises(InputError, match=r"\.npz or \.safetensors"):
        read_tensors(tmp_path / "x.pt", "source")


def _written(tmp_path: Path, **settings: object) -> tuple[RunDirectory, Problem]:
    problem = Problem(**{**PROBLEMS["labels"], **settings})
    run = make(tmp_path / "r")
    save_state(run, problem, point(problem), "classes", Progress(3))
    return run, problem


@pytest.mark.parametrize("name", ["W", "H", "labels"])
def test_a_flipped_bit_is_found(name: str, tmp_path: Path) -> None:
    run, _ = _written(tmp_path)
    content = bytearray(run.state_file.read_bytes())
    size = int.from_bytes(content[:8], "little")
    begin, end = json.loads(content[8 : 8 + size])[name]["data_offsets"]
    content[8 + size + (end - 1 if name != "labels" else begin)] ^= 1
    run.state_file.write_bytes(content)
    for path in (run.path, run.state_file):
        with pytest.raises(InputError, match="not those that were written"):
            read_head(path, "x")


def test_a_state_without_a_checksum_is_that_of_an_older_version(tmp_path: Path) -> None:
    run, _ = _written(tmp_path)
    tensors, metadata = read_safetensors(run.state_file, "x")
    save_file(
        {**tensors, "W": tensors["W"] + 1},
        run.state_file,
        {k: v for k, v in metadata.items() if k != "checksum"},
    )
    assert load_state(run)[1].step == 3


SETS = PROBLEMS["target sets"]


@pytest.mark.parametrize(
    ("settings", "name", "change"),
    [
        ({}, "W", lambda x: x[:, :0].clone()),
        ({}, "W", lambda x: x[:0].clone()),
        ({}, "labels", lambda x: x + 1),
        ({}, "labels", lambda x: x - 1),
        ({}, "labels", lambda x: x.double()),
        ({}, "row_counts", lambda x: x[:-1].clone()),
        (SETS, "row_indices", lambda x: None),
        (SETS, "row_indices", lambda x: x[:0].clone()),
        (SETS, "row_indices", lambda x: x + 9),
        (SETS, "row_indptr", lambda x: x.flip(0).contiguous()),
        (SETS, "row_indptr", lambda x: x + 1),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    settings: dict, name: str, change: object, tmp_path: Path
) -> None:
    run, _ = _written(tmp_path, **({"labels": None, **settings} if settings else {}))
    tensors, metadata = read_safetensors(run.state_file, "x")
    del metadata["checksum"]
    changed = change(tensors.pop(name))
    save_file({**tensors, **({} if changed is None else {name: changed})}, run.state_file, metadata)
    with pytest.raises(InputError, match=r"do not fit|not a state"):
        load_state(run)
    with pytest.raises(InputError, match=r"do not fit|not a state|lacks"):
        read_head(run.state_file, "x")


def test_target_sets_that_were_damaged_are_refused(tmp_path: Path) -> None:
    run, _ = _written(tmp_path, labels=None, **SETS)
    tensors = load_state(run)[0]
    for name in ("target_indices", "target_indptr", "target_counts"):
        with pytest.raises(InputError, match="damaged"):
            data_arguments(
                {
                    key: value
                    for key, value in tensors.items()
                    if key != name or name == "target_indptr"
                }
                | (
                    {"target_indptr": tensors["target_indptr"][:-1]}
                    if name == "target_indptr"
                    else {}
                )
            )


@pytest.mark.parametrize("activation", ["linear", "relu"])
def test_layers_are_saved_and_the_head_sees_what_they_make(activation: str, tmp_path: Path) -> None:
    problem = Problem(
        classes=3, dim=4, per_class=2, layers=3, widths=[4, 6, 5], activation=activation
    )
    generator = torch.Generator().manual_seed(0)
    W, H, first, second = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((3, 5), (3, 4), (6, 4), (5, 6))
    )
    run = make(tmp_path / "r")
    run.config["activation"] = activation
    save_state(run, problem, Point(W, H, None, (first, second)), "classes", Progress())
    again = Point.of(load_state(run)[0])
    assert all(torch.equal(a, b) for a, b in zip(again.parts(), (W, H, first, second), strict=True))
    s = torch.relu if activation == "relu" else (lambda x: x)
    head = read_head(run.state_file, "x")
    assert torch.allclose(head.H, s(s(H @ first.T) @ second.T), rtol=1e-14)
