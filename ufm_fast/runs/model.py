"""The problem and the point of a saved run: what its metrics, its figures and its landscape are
made of.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ufm_fast.errors import InputError
from ufm_fast.runs import settings
from ufm_fast.runs.directory import RunDirectory

if TYPE_CHECKING:
    from ufm_fast.point import Point
    from ufm_fast.problem import Problem


def saved_model(run: RunDirectory, name: str = "run", **changes: Any) -> tuple[Problem, str, Point]:
    """The problem of a run with some settings changed, its ``reduce``, and the model point that is
    saved.

    Errors: InputError for a trained network, a run without a state, or one that does not fit its
    configuration.
    """
    from ufm_fast.runs.state import data_arguments, fitting_point, load_state

    if is_network(run):
        raise InputError(f"{name}: {run.path} is a trained network; give a run of ufm-fast solve")
    if not run.state_file.exists():
        raise InputError(
            f"{name}: {run.path} has no state yet; go on with: ufm-fast solve --resume {run.path}"
        )
    tensors, _, reduce = load_state(run)
    config = {**settings.read_saved(run.config, run.path, name), **changes}
    config["device"], _ = settings.pick_device(config["device"])
    problem = settings.build_problem(config, data_arguments(tensors))
    return problem, reduce, fitting_point(run, problem, tensors, reduce, name)


def is_network(run: RunDirectory) -> bool:
    """Whether the run is of a trained network, not of a model."""
    return run.config.get("kind") is not None
