"""Backends by name. ``auto`` chooses and says what it chose; a backend that is asked for by name
never falls back.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import torch

from ufm_fast.backends.base import Backend, Gradients, HeadInput, HeadResult, RowStatistics
from ufm_fast.backends.reference import ReferenceBackend
from ufm_fast.backends.sharded import ShardedBackend
from ufm_fast.backends.tiled import TiledBackend
from ufm_fast.errors import InputError
from ufm_fast.layout import Mesh

Maker = Callable[[torch.device, torch.dtype], Backend]


def has_triton() -> bool:
    """Whether the package triton is there; it is never a requirement."""
    return importlib.util.find_spec("triton") is not None


def _kernels_fit(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and has_triton() and dtype != torch.float64


def _auto(device: torch.device, dtype: torch.dtype) -> Backend:
    return _triton(device, dtype) if _kernels_fit(device, dtype) else TiledBackend()


def _triton(device: torch.device, dtype: torch.dtype) -> Backend:
    _check_kernels(device, dtype)
    from ufm_fast.backends.triton import TritonBackend

    return TritonBackend()


def _check_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Errors: InputError where the kernels don't run."""
    if not has_triton():
        raise InputError(
            "backend triton needs the package triton (Linux with CUDA); use backend tiled"
        )
    if device.type != "cuda":
        raise InputError("backend triton needs device cuda; use backend tiled on the CPU")
    if dtype == torch.float64:
        raise InputError(
            "backend triton has no float64 kernels; use backend tiled, or dtype float32"
        )


def _sharded(
    device: torch.device, dtype: torch.dtype, mesh: str | None = None, inner: str | None = None
) -> Backend:
    """``inner``: who multiplies on each rank; None: as 'auto' does in one process."""
    if inner == "triton":
        _check_kernels(device, dtype)
    found = inner or ("triton" if _kernels_fit(device, dtype) else "tiled")
    return ShardedBackend(Mesh.of_world(mesh, device), inner=found)


#: Those of several ranks, which take a mesh, by who multiplies on each of them.
SHARDED: dict[str, Callable[..., Backend]] = {
    "sharded": _sharded,
    "sharded-tiled": partial(_sharded, inner="tiled"),
    "sharded-triton": partial(_sharded, inner="triton"),
}
#: Every backend by its name: what makes it for a device and a dtype, or says why there is none.
BACKENDS: dict[str, Maker] = {
    "auto": _auto,
    "reference": lambda device, dtype: ReferenceBackend(),
    "tiled": lambda device, dtype: TiledBackend(),
    "triton": _triton,
    **SHARDED,
}


def make_backend(
    name: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    mesh: str | None = None,
) -> Backend:
    """The backend called ``name``; 'auto' is triton on CUDA where it is installed and ``dtype`` is
    not float64, else tiled.

    'sharded' makes the same choice on each rank; 'sharded-tiled' and 'sharded-triton' name it.
    ``mesh``: of these, CxS ranks by classes times ranks by samples; by default all by classes.
    Errors: InputError for an unknown name, for triton without triton, without a CUDA device, or in
    float64; for sharded without torch.distributed, or a mesh that does not hold all ranks; for a
    mesh of another backend.
    """
    if name not in BACKENDS:
        raise InputError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")
    if mesh is not None:
        if name not in SHARDED:
            raise InputError(
                f"mesh = {mesh} goes with backend sharded, not {name}; drop it, or start several "
                f"ranks (torchrun)"
            )
        return SHARDED[name](torch.device(device), dtype, mesh)
    return BACKENDS[name](torch.device(device), dtype)


__all__ = [
    "BACKENDS",
    "SHARDED",
    "Backend",
    "Gradients",
    "HeadInput",
    "HeadResult",
    "ReferenceBackend",
    "RowStatistics",
    "ShardedBackend",
    "TiledBackend",
    "has_triton",
    "make_backend",
]
