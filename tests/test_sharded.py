"""Several ranks against one process: what `sharded_worker` checked in worlds of 1, 2, 3 and 4 gloo
processes.
"""

from __future__ import annotations

import json

import pytest
import torch
from ranks import run_ranks
from sharded_worker import RANKS
from strategies import random_point

from ufm_fast import Problem, backends, solve
from ufm_fast.backends import ShardedBackend, TiledBackend
from ufm_fast.backends.base import HeadShape
from ufm_fast.errors import InputError
from ufm_fast.layout import Axis, Mesh, block, mesh_shape
from ufm_fast.losses import SquaredError
from ufm_fast.objective import Objective


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks("sharded_worker.py", max(RANKS), folder)
    return {number: json.loads((folder / f"{number}.json").read_text()) for number in RANKS}


@pytest.mark.parametrize("ranks", RANKS)
def test_ranks_compute_what_one_process_does(checked, ranks):
    assert len(checked[ranks]) > 40
    assert not [found for found in checked[ranks] if not found[1] <= found[2]]


def test_blocks_are_those_of_chunk():
    for number in (0, 1, 5, 12):
        for ranks in RANKS:
            chunks = torch.arange(number).chunk(ranks)
            heights = [part.numel() for part in chunks] + [0] * (ranks - len(chunks))
            parts = [block(number, ranks, rank) for rank in range(ranks)]
            assert (
                [part.stop - part.start for part in parts] == heights
                if number
                else not any(p.stop for p in parts)
            )


def test_meshes_that_do_not_fit_are_refused():
    assert mesh_shape(None, 4) == (4, 1)
    assert mesh_shape("2x2", 4) == (2, 2)
    for words in ("3x2", "4", "0x4", "2x-2", "axb"):
        with pytest.raises(InputError, match="mesh"):
            mesh_shape(words, 4)


def test_without_ranks_sharded_is_refused():
    with pytest.raises(InputError, match="torchrun"):
        solve(Problem(classes=3, dim=4), backend="sharded")
    with pytest.raises(InputError, match="mesh = 2x2 goes with backend sharded"):
        solve(Problem(classes=3, dim=4), mesh="2x2")


def test_ranks_on_cuda_multiply_by_kernels(monkeypatch):
    monkeypatch.setattr(Mesh, "of_world", lambda words, device: Mesh((1, 1), 0, device))
    monkeypatch.setattr(backends, "has_triton", lambda: True)
    pytest.importorskip("triton")
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    names = [
        backends.make_backend("sharded", device, dtype).name
        for device, dtype in ((cuda, torch.float32), (cuda, torch.float64), (cpu, torch.float32))
    ]
    assert names == ["sharded-triton", "sharded-tiled", "sharded-tiled"]
    assert backends.make_backend("sharded-tiled", cuda, mesh="1x1").name == "sharded-tiled"
    with pytest.raises(InputError, match="backend triton needs device cuda"):
        backends.make_backend("sharded-triton", cpu)
    with pytest.raises(InputError, match="no float64 kernels"):
        backends.make_backend("sharded-triton", cuda, torch.float64)
    kernels = ShardedBackend(Mesh((1, 1), 0, cpu), inner="triton")
    objective = Objective(Problem(classes=3, dim=4), backend=kernels)
    with pytest.raises(InputError, match="sharded-triton has no float64 kernels"):
        objective.value_and_grad(random_point(objective, 1))


def test_a_plan_of_target_vectors_shares_residuals_and_targets_out():
    shape = HeadShape(
        SquaredError(), 10_000, 300, 8, 300, True, torch.float64, torch.device("cpu"), dense=True
    )
    one = TiledBackend().plan(shape)
    for mesh in ((4, 1), (2, 2), (1, 4)):
        plan = ShardedBackend(Mesh(mesh, 0, torch.device("cpu"))).plan(shape)
        assert plan.flops == one.flops / 4
        kept = 8 * 10_000 * 300 // 4 * (1 + (mesh[0] > 1))  # of a rank's rows, and of its place
        assert kept < plan.workspace < min(one.workspace, kept + 2**26)


def test_an_axis_of_one_says_nothing():
    axis, x = Axis(1, 0, None, {}), torch.ones(3)
    assert axis.sum_(x) is x
    assert axis.gather(x, "x").wait() is x
    assert axis.scatter_sum(x, "x").wait() is x
