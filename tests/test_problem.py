"""Problem: what it accepts, what it refuses and in which words."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.losses import CrossEntropy, Focal
from ufm_fast.problem import Problem
from ufm_fast.targets import TargetSets

BASE = {"classes": 4, "dim": 3}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classes": 1}, "classes must be at least 2"),
        ({"classes": None}, "classes is needed"),
        ({"classes": 4.0}, "classes must be a whole number"),
        ({"dim": 0}, "dim must be at least 1"),
        ({"dim": "3"}, "dim must be a whole number"),
        ({"per_class": 0}, "per_class must be at least 1"),
        ({"per_class": 2, "counts": [1, 1, 1, 1]}, "give one of"),
        ({"classes": None, "counts": [3]}, "at least 2 classes"),
        ({"counts": [1, 2]}, "counts has 2 entries but classes is 4"),
        ({"counts": [1, 2, -1, 3]}, "counts must be non-negative"),
        ({"counts": [0, 0, 0, 0]}, "at least one sample"),
        ({"counts": [1.0, 2.0, 3.0, 4.0]}, "counts must hold integers"),
        ({"counts": [[1, 2], [3, 4]]}, "counts must be a vector"),
        ({"labels": [0, 1, 4]}, r"labels must lie in \[0, 4\)"),
        ({"labels": [0, -1, 2]}, "labels must not be negative, got -1; drop"),
        ({"labels": [0, -1, 2], "classes": None}, "labels must not be negative, got -1; drop"),
        ({"counts": [10**20, 3, 1, 1]}, "counts holds values beyond int64; give"),
        ({"labels": [0.0, 1.0]}, "labels must hold integers"),
        ({"labels": torch.tensor([True, False])}, "labels must hold integers"),
        ({"labels": []}, "labels must hold at least one sample"),
        ({"labels": "no-such-data"}, "there is no file no-such-data"),
        ({"lambda_w": -1e-3}, "lambda_w must be a finite number >= 0"),
        ({"lambda_h": float("nan")}, "lambda_h must be a finite number"),
        ({"lambda_h": float("inf")}, "lambda_h must be a finite number"),
        ({"lambda_w": 0.0}, "lambda_w = 0 leaves the objective without a minimiser"),
        ({"lambda_h": 0.0}, "lambda_h = 0 leaves the objective without a minimiser"),
        ({"lambda_h": 0.0, "freeze": "w"}, "lambda_h = 0 leaves"),
        ({"lambda_w": "big"}, "lambda_w must be a number"),
        ({"bias": "penalised"}, "needs lambda_b > 0"),
        ({"bias": "free", "lambda_b": 0.1}, "contradicts bias 'free'"),
        ({"lambda_b": 0.1}, "contradicts bias 'none'"),
        ({"bias": "maybe"}, "bias must be one of"),
        (
            {"bias": "free", "counts": [1, 0, 2, 3]},
            "a free bias has no minimiser when a class is empty",
        ),
        ({"loss": "hinge"}, "loss must be one of"),
        ({"loss": 3}, "loss must be a name or a loss object"),
        ({"smoothing": 1.0}, r"smoothing must lie in \[0, 1\)"),
        ({"smoothing": 0.1, "loss": "mse"}, "smoothing goes with the loss ce only"),
        ({"gamma": 2.0}, "gamma goes with the loss focal only"),
        ({"gamma": -1.0, "loss": "focal"}, "gamma must be a finite number >= 0"),
        ({"dtype": "float16"}, "dtype must be one of"),
        ({"device": "tpu"}, "device"),
        ({"freeze": "b"}, "freeze must be w or h, or be left out"),
        ({"freeze": "None"}, "got 'None'"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"seed": 10**23}, "seed must be at most"),
        ({"classes": 10**12}, "classes must be at most"),
        ({"dim": 10**12}, "dim must be at most"),
        ({"per_class": 10**16}, "per_class must be at most"),
        ({"counts": [2**62] * 4}, "counts must sum to at most"),
        ({"counts": [[1], [2, 3]]}, "counts must hold integers"),
        ({"counts": "abcd"}, "counts must hold integers"),
        ({"labels": [0, 10**12], "classes": None}, r"labels must lie in \[0, "),
        ({"lambda_w": 1e-170}, "lambda_w must be 0 or lie in"),
        ({"lambda_h": 1e170}, "lambda_h must be 0 or lie in"),
        ({"smoothing": "a"}, "smoothing must be a number"),
        ({"gamma": "a", "loss": "focal"}, "gamma must be a number"),
        ({"gamma": True, "loss": "focal"}, "gamma must be a number"),
        ({"loss": CrossEntropy(), "smoothing": 0.1}, "set them in the loss object"),
        ({"loss": Focal(), "gamma": 5.0}, "set them in the loss object"),
    ],
)
def test_bad_input_is_named(change, words):
    with pytest.raises(InputError, match=words):
        Problem(**{**BASE, **change})


def test_the_ends_of_the_range_of_penalties_are_in_it():
    for end in (1e-30, 1e30):
        assert Problem(**BASE, lambda_w=end, lambda_h=end).mu == pytest.approx(end)
        with pytest.raises(InputError, match=r"lie in \[1e-30, 1e\+30\]"):
            Problem(**BASE, lambda_w=end * (1.01 if end > 1 else 0.99))


def test_a_frozen_factor_may_go_without_its_penalty():
    assert Problem(**BASE, lambda_w=0.0, freeze="w").mu == 0.0


@pytest.mark.parametrize("bias", ["none", "penalised"])
def test_empty_classes_are_allowed_where_the_maths_allows(bias):
    problem = Problem(
        counts=[2, 0, 3], dim=3, bias=bias, lambda_b=0.1 if bias == "penalised" else 0.0
    )
    assert problem.rows("classes").targets.indices.tolist() == [0, 2]
    assert problem.sample_row().tolist() == [0, 0, 1, 1, 1]


def test_label_files(tmp_path):
    good, floats, short, text = (tmp_path / f"{n}.npy" for n in ("good", "floats", "short", "text"))
    np.save(good, np.array([0, 2, 1, 2], dtype=np.int32))
    np.save(floats, np.array([0.0, 1.0]))
    short.write_bytes(good.read_bytes()[:-5])
    text.write_text("0 1 2")
    problem = Problem(dim=2, labels=good)
    assert problem.num_classes == 3
    assert problem.counts.tolist() == [1, 1, 2]
    for path, words in (
        (floats, "must hold integers"),
        (short, "not a readable"),
        (text, "not a readable"),
    ):
        with pytest.raises(InputError, match=words):
            Problem(dim=2, labels=path)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint32, np.uint64, np.int8])
def test_any_integer_dtype_is_taken(kind):
    labels = np.array([2, 0, 1, 2], dtype=kind)
    assert Problem(dim=2, labels=labels).counts.tolist() == [1, 1, 2]
    assert Problem(dim=2, counts=labels).counts.tolist() == [2, 0, 1, 2]
    assert Problem(dim=2, labels=torch.from_numpy(labels)).num_classes == 3
    assert Problem(dim=kind(2), classes=kind(3), lambda_w=np.float32(0.5)).lambda_w == 0.5


def test_arrays_of_the_other_byte_order_are_taken(tmp_path):
    labels = np.array([2, 0, 1, 2], dtype=">i4")
    np.save(tmp_path / "labels.npy", labels)
    for given in (labels, tmp_path / "labels.npy"):
        assert Problem(dim=2, labels=given).counts.tolist() == [1, 1, 2]


def test_a_problem_can_be_changed_in_one_place():
    smooth, focal = (
        Problem(**BASE, smoothing=0.1),
        Problem(**BASE, loss="focal", gamma=3.0, seed=2**60),
    )
    assert dataclasses.replace(smooth, dim=5).loss == CrossEntropy(0.1)
    assert dataclasses.replace(focal, dim=5).loss == Focal(gamma=3.0)


@pytest.mark.parametrize("loss", ["ce", "pick-all"])
@pytest.mark.parametrize(
    "data",
    [
        {"classes": 4, "per_class": 3},
        {"classes": 4},
        {"counts": [3, 0, 2]},
        {"labels": [0, 2, 2, 1]},
    ],
)
def test_what_a_problem_derives_is_derived_anew(data, loss):
    problem = Problem(dim=3, loss=loss, **data)
    for change in ({"lambda_w": 0.5}, {"loss": "ce"}, {"loss": "pick-all"}):
        changed = dataclasses.replace(problem, **change)
        assert torch.equal(changed.counts, problem.counts)
        assert changed.num_samples == problem.num_samples
        assert (changed.target_sets is None) == (changed.loss.name == "ce")
    again = dataclasses.replace(problem, counts=[1] * problem.num_classes)
    assert again.num_samples == problem.num_classes
    if "labels" in data:
        with pytest.raises(InputError, match="got labels and counts"):
            Problem(dim=3, counts=[1, 1, 1], **data)
        assert dataclasses.replace(problem, labels=[0, 1, 2, 2, 2]).num_samples == 5
    if "per_class" in data:
        assert dataclasses.replace(problem, classes=6).num_samples == 18
    other = Problem(dim=3, loss=loss, counts=problem.counts)
    assert dataclasses.replace(other, lambda_w=0.5).num_samples == problem.num_samples


def test_rows_are_worked_out_once_and_survive_a_replacement():
    sets = TargetSets.create([0, 2, 3, 5], [0, 1, 2, 0, 1], 4)
    problem = Problem(classes=4, dim=3, loss="pick-all", target_sets=sets)
    assert problem.rows("classes") is dataclasses.replace(problem, lambda_w=0.5).rows("classes")
    assert problem.rows("classes").number == 2


def test_frozen_features_are_not_merged():
    frozen, free = Problem(**BASE, freeze="h"), Problem(**BASE)
    assert (frozen.reduction(), free.reduction(), free.reduction("none")) == (
        "none",
        "classes",
        "none",
    )
    with pytest.raises(InputError, match="reduce classes merges the features"):
        frozen.reduction("classes")


@pytest.mark.parametrize(("name", "least"), [("digits", 10), ("glyphs", 3000)])
def test_real_data_sets(name, least):
    problem = Problem(dim=4, labels=name)
    assert problem.num_classes >= least
    assert problem.num_samples == int(problem.counts.sum()) > least
    assert bool((problem.counts > 0).all())


@pytest.mark.parametrize(
    ("indptr", "indices", "counts", "words"),
    [
        ([1, 2], [0, 1], None, "starts at 0"),
        ([0, 1], [0, 1], None, "must end at the length of indices"),
        ([0, 1, 1], [0], None, "at least one class"),
        ([0, 4], [0, 1, 2, 3], None, "holds every class"),
        ([0, 2], [1, 1], None, "names a class twice"),
        ([0, 1], [7], None, "must lie in"),
        ([0.0, 1.0], [0], None, "must hold integers"),
        ([0, 1], [0], [0], "positive integers"),
        ([0, 1], [0], [1, 2], "positive integers"),
        ([0, 1], [[0], [1, 2]], None, "indices must hold integers"),
        (None, [0], None, "indptr must hold integers"),
        ([0, 1], [0], [2**62 + 2**54], "counts must sum to at most"),
    ],
)
def test_bad_target_sets(indptr, indices, counts, words):
    with pytest.raises(InputError, match=words):
        TargetSets.create(indptr, indices, 4, counts)


def test_target_sets_group_and_count_classes():
    sets = TargetSets.create([0, 2, 3, 5], [2, 0, 1, 0, 2], 4, [3, 1, 2])
    grouped, index = sets.grouped()
    assert grouped.counts.tolist() == [5, 1]
    assert index.tolist() == [0, 1, 0]
    problem = Problem(classes=4, dim=3, loss="pick-all", target_sets=sets)
    assert problem.num_samples == 6
    assert problem.counts.tolist() == [5, 1, 5, 0]
    assert problem.rows("none").number == 6
    with pytest.raises(InputError, match="pick-all"):
        Problem(classes=4, dim=3, loss="ce", target_sets=sets)


def test_type_errors_are_both_kinds():
    with pytest.raises(TypeError):
        Problem(classes=2.5, dim=3)
    with pytest.raises(InputTypeError):
        Problem(classes=2, dim=True)
