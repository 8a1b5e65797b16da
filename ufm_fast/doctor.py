"""What this machine has, and whether the library gives right answers on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ufm_fast.backends import BACKENDS, HeadInput, make_backend
from ufm_fast.backends.base import Gradients, compute_dtype
from ufm_fast.errors import InputError
from ufm_fast.losses import LOSSES, make_loss
from ufm_fast.problem import DTYPES, Problem
from ufm_fast.targets import Targets
from ufm_fast.version import __version__

_PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "typer",
    "rich",
    "matplotlib",
    "scikit-learn",
    "pandas",
    "pyarrow",
)


@dataclass(frozen=True)
class Check:
    """One self-test: its name, whether it passed, and the figure that decided."""

    name: str
    passed: bool
    detail: str


def versions() -> dict[str, str | None]:
    """Versions of this package, Python and what it uses; None for what is not installed."""
    found: dict[str, str | None] = {"ufm-fast": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["torch"] = torch.__version__  # with the build, which the distribution's metadata may lack
    return found


def devices() -> list[str]:
    """The devices that ``--device`` can name, in words."""
    names = [f"cpu ({os.cpu_count()} cores, {torch.get_num_threads()} threads)"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            memory = torch.cuda.get_device_properties(index).total_memory / 2**30
            names.append(f"cuda:{index} ({torch.cuda.get_device_name(index)}, {memory:.0f} GiB)")
    return names


def environment(device: str = "cpu") -> dict[str, Any]:
    """What a run was computed with, for its environment.json."""
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
    }


def backends() -> dict[str, str]:
    """Each backend and 'available', or why it is not."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {}
    chosen = [name for name in BACKENDS if name not in ("auto", "sharded-tiled", "sharded-triton")]
    for name in chosen:
        try:
            make_backend(name, device)
            found[name] = "available"
        except (InputError, ImportError) as error:
            found[name] = str(error)
    return found


def self_test() -> list[Check]:
    """Backends against the reference in each dtype, and small solves against theory."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tests: list[tuple[str, Callable[[], tuple[float, float]]]] = []
    for backend in [
        name for name, state in backends().items() if state == "available" and name != "reference"
    ]:
        for dtype in DTYPES:
            where = device if backend == "triton" else "cpu"
            tests.append(
                (f"{backend} against reference, {dtype}", _against_reference(backend, dtype, where))
            )
    for loss in ("ce", "mse"):
        tests.append((f"solve against theory, {loss}", _against_theory(loss)))
    return [_run(name, test) for name, test in tests]


def _run(name: str, test: Callable[[], tuple[float, float]]) -> Check:
    try:
        error, allowed = test()
    except (
        Exception
    ) as failure:  # a broken machine may fail anywhere; the report must still be printed
        return Check(name, False, f"{type(failure).__name__}: {failure}")
    return Check(name, error <= allowed, f"relative error {error:.1e}, allowed {allowed:.0e}")


#: Relative error of value and gradients allowed against the float64 reference on the same rounded
#: inputs.
_ALLOWED = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 3e-2}


def _against_reference(backend: str, dtype: str, device: str) -> Callable[[], tuple[float, float]]:
    def test() -> tuple[float, float]:
        generator = torch.Generator().manual_seed(0)
        K, d, R, worst = 37, 19, 53, 0.0
        for name in LOSSES:
            W, H = (
                torch.randn(n, d, generator=generator, dtype=torch.float64).to(DTYPES[dtype])
                for n in (K, R)
            )
            y = torch.randint(K, (R,), generator=generator)
            exact = _value_and_gradients("reference", name, H.double(), W.double(), y)
            found = _value_and_gradients(backend, name, H.to(device), W.to(device), y.to(device))
            for a, b in zip(found, exact, strict=True):
                worst = max(worst, float((a.double().cpu() - b).norm() / b.norm()))
        return worst, _ALLOWED[dtype]

    return test


def _value_and_gradients(
    backend: str, loss: str, H: torch.Tensor, W: torch.Tensor, y: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    weight = torch.full((H.shape[0],), 1.0 / H.shape[0], dtype=torch.float64, device=H.device)
    dtype = compute_dtype(H.dtype)
    features, classifier = torch.zeros_like(H, dtype=dtype), torch.zeros_like(W, dtype=dtype)
    x = HeadInput(make_loss(loss), H, W, None, Targets(y), weight)
    result = make_backend(backend, H.device).head(x, Gradients(features, classifier, None))
    return result.value.reshape(1), features, classifier


def _against_theory(loss: str) -> Callable[[], tuple[float, float]]:
    def test() -> tuple[float, float]:
        from ufm_fast.solving import solve
        from ufm_fast.theory import closed_form

        problem = Problem(dim=8, classes=6, per_class=3, loss=loss, lambda_w=5e-3, lambda_h=5e-3)
        theory = closed_form(problem)
        assert theory is not None
        solution = solve(problem, start="normal", metrics=False, certificate=False)
        return abs(solution.value - theory.value) / theory.value, 1e-9

    return test
