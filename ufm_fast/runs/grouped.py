"""Runs whose minimum is known by its groups: what is solved, saved, and laid out as a table. W and
H are never formed.

The state is a safetensors file of its own format, with the numbers of the groups and the data;
``GroupMinimum.lifted`` and ``class_vectors`` of the minimum that ``load_groups`` gives make
classifier rows and class means of them.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file

from ufm_fast.errors import InputError
from ufm_fast.runs.directory import RunDirectory
from ufm_fast.runs.files import atomic
from ufm_fast.runs.state import checksum, read_safetensors

if TYPE_CHECKING:
    from ufm_fast.groups import GroupMinimum
    from ufm_fast.problem import Problem

FORMAT = "ufm-fast-groups"
_ARRAYS = ("gaps", "left", "sigma", "right", "bias")
_NUMBERS = ("value", "data_value", "lambda_w", "lambda_h", "lambda_b")

Arrays = dict[str, "np.ndarray[Any, Any]"]


def solve_groups(run: RunDirectory, problem: Problem, tol: float) -> dict[str, Any]:
    """Solve, save the state and a line of the log; the summary. Errors: InputError for a dim below
    the minimiser's rank.
    """
    from ufm_fast.groups import group_metrics
    from ufm_fast.groups.choice import minimise_groups

    began = time.perf_counter()
    best = minimise_groups(problem, tol)
    metrics = group_metrics(best)
    seconds = time.perf_counter() - began
    save_groups(run, problem, best, seconds)
    line = {
        "step": best.steps,
        "value": best.value,
        "data_value": best.data_value,
        "gradient_norm": math.nan,
    }
    run.truncate_log(-1)
    run.append({**line, "evaluations": best.steps, "seconds": seconds, **metrics})
    return summary_of(best, problem, seconds, metrics)


def summary_of(
    best: GroupMinimum, problem: Problem, seconds: float, metrics: dict[str, float]
) -> dict[str, Any]:
    """What ``Solution.summary`` says, and ``groups``."""
    from ufm_fast.groups.lifting import METHOD, outcome
    from ufm_fast.theory import closed_form

    ended, message = outcome(best)
    theory = closed_form(problem)
    return {
        "outcome": ended.value,
        "message": message,
        "value": best.value,
        "data_value": best.data_value,
        "gradient_norm": math.nan,
        "steps": best.steps,
        "evaluations": best.steps,
        "seconds": seconds,
        "backend": "groups",
        "method": METHOD,
        "reduce": "groups",
        "variables": "groups",
        "start": "groups",
        "theory": None if theory is None else {"value": theory.value, "source": theory.source},
        "certificate": best.certificate.summary(),
        "metrics": metrics,
        "groups": {
            "counts": len(best.gaps),
            "collapsed": int(best.collapsed.sum()),
            "rank": best.rank,
            "thresholds": [float(best.thresholds.min()), float(best.thresholds.max())],
        },
    }


def save_groups(run: RunDirectory, problem: Problem, best: GroupMinimum, seconds: float) -> None:
    """Write the minimum and the data, so that the file serves alone."""
    arrays: Arrays = {
        name: getattr(best, name) for name in _ARRAYS if getattr(best, name) is not None
    }
    runs = np.array(best.groups.runs, dtype=np.int64)
    tensors = {
        name: torch.from_numpy(np.ascontiguousarray(array)).clone()
        for name, array in {**arrays, "runs": runs}.items()
    }
    if problem.samples.given_labels is not None:
        tensors["sample_labels"] = problem.samples.given_labels.clone()
    metadata = {
        "format": FORMAT,
        "step": str(best.steps),
        "seconds": repr(seconds),
        "converged": repr(best.converged),
        **{name: repr(getattr(best, name)) for name in _NUMBERS},
        "lower_bound": repr(best.certificate.lower_bound),
        "spectral_ratio": repr(best.certificate.spectral_ratio),
        "checksum": checksum(tensors),
    }
    with run.alone(), atomic(run.state_file) as temporary:
        save_file(tensors, temporary, metadata)


def load_groups(run: RunDirectory) -> GroupMinimum | None:
    """The minimum of a run that was solved on groups, else None. Errors: InputError for a damaged
    file.
    """
    from ufm_fast.class_groups import ClassGroups
    from ufm_fast.groups import GroupMinimum
    from ufm_fast.losses import make_loss
    from ufm_fast.theory.certificates.base import Proof, judge

    tensors, metadata = read_safetensors(run.state_file, "run")
    if metadata.get("format") != FORMAT:
        return None
    if metadata.get("checksum") != checksum(tensors):
        raise InputError(
            f"run: the numbers in {run.state_file} are not those that were written; solve it anew"
        )
    try:
        groups = ClassGroups.of_pairs(tensors["runs"].tolist())
        arrays: Any = {name: tensors[name].numpy() if name in tensors else None for name in _ARRAYS}
        numbers: Any = {name: float(metadata[name]) for name in _NUMBERS}
        proof = Proof(float(metadata["lower_bound"]), float(metadata["spectral_ratio"]))
        loss = make_loss(run.config["loss"], smoothing=run.config["smoothing"])
        return GroupMinimum(
            groups,
            loss,
            **numbers,
            **arrays,
            certificate=judge(numbers["value"], proof),
            steps=int(metadata["step"]),
            seconds=float(metadata["seconds"]),
            converged=metadata["converged"] == "True",
        )
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"run: {run.state_file} lacks numbers of its groups ({error}); the file was damaged"
        ) from error


def saved_data(run: RunDirectory) -> tuple[dict[str, Any], int] | None:
    """The data of a grouped run as keyword arguments of Problem, and its steps; None for a run of
    another kind.
    """
    if not run.state_file.exists():
        return None
    tensors, metadata = read_safetensors(run.state_file, "run")
    if metadata.get("format") != FORMAT or "runs" not in tensors:
        return None
    labels = tensors.get("sample_labels")
    data = {"groups": tensors["runs"].tolist()} if labels is None else {"labels": labels}
    return data, int(metadata.get("step", "0"))


def group_table(best: GroupMinimum) -> Arrays:
    """A row a group, ascending in count: sizes, gaps, collapse, norms, cosines, margins and
    losses.
    """
    from ufm_fast.groups import Geometry

    geometry = Geometry(best)
    present = geometry.present
    means, duality = (np.full(len(present), np.nan) for _ in range(2))
    means[present] = geometry.means.norms
    duality[present] = geometry.self_duality
    table = {
        "count": best.groups.counts,
        "classes": best.groups.sizes,
        "threshold": best.thresholds,
        "collapsed": best.collapsed,
        "gap": best.gaps,
        "target_logit": best.target_logits,
        "margin": best.margins,
        "loss": best.losses,
        "classifier_norm": geometry.classifier.norms,
        "mean_norm": means,
        "classifier_cosine": geometry.classifier.cosines.diagonal().copy(),
        "self_duality": duality,
    }
    return table if best.bias is None else {**table, "bias": best.bias}
