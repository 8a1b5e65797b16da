"""The handle of recorded steps: when it runs, records, replays and forgets."""

import pytest
import torch
from recorder import Noted

from ufm_kernels.replays import CudaGraphs, Replays

CUDA = torch.cuda.is_available()


@pytest.fixture
def noted():
    return Noted()


def double(x, log=None):
    def step():
        if log is not None:
            log.append("run")
        return x * 2, None

    return step


def test_a_step_runs_then_is_recorded_then_replayed(noted):
    x, replays, log = torch.tensor([1.0]), Replays(recorder=noted), noted.log
    for value, expected in ((1.0, ["run"]), (3.0, ["record", "run", "replay", "run"])):
        log.clear()
        x.fill_(value)
        assert replays(double(x, log), (x,))[0].item() == 2 * value
        assert log == expected
    kept = replays(double(x), (x,))
    x.fill_(5.0)
    assert replays(double(x), (x,))[1] is None
    assert kept[0].item() == 6.0, "results are the caller's own"
    assert log.count("record") == 1


@pytest.mark.parametrize(
    "other",
    [
        lambda x: (x.clone(), "a"),
        lambda x: (x[:1], "a"),
        lambda x: (x.view(2, 2).T, "a"),
        lambda x: (x.view(torch.int32), "a"),
        lambda x: (x, "b"),
    ],
    ids=["memory", "shape", "strides", "dtype", "setting"],
)
def test_another_memory_shape_or_setting_is_another_step(noted, other):
    x, replays = torch.ones(2, 2), Replays(recorder=noted)
    for _ in range(2):
        replays(double(x), (x, None), "a")
    y, setting = other(x)
    replays(double(y), (y, None), setting)
    assert noted.log == ["record", "replay"]
    replays(double(x), (x, x), "a")
    assert noted.log == ["record", "replay"], "a tensor that was not there"
    replays(double(x), (x, None), "a")
    assert noted.log == ["record", "replay", "replay"]


def test_the_one_not_called_for_longest_leaves(noted):
    given, replays = [torch.ones(n) for n in (1, 2, 3)], Replays(most=2, recorder=noted)
    for index in (0, 0, 1, 0, 2, 0, 1):
        replays(double(given[index]), (given[index],))
    assert noted.log == ["record", "replay", "replay", "replay"], "the second left, and began anew"


def test_nothing_is_recorded_without_a_device():
    x, replays, log = torch.ones(2), Replays(), []
    for _ in range(3):
        assert replays(double(x, log), (x,))[0].tolist() == [2.0, 2.0]
    assert log == ["run"] * 3
    assert CudaGraphs().place((None,)) is None


@pytest.mark.skipif(not CUDA, reason="graphs are captured on CUDA")
def test_graphs_replay_on_new_numbers_and_are_refreshed_for_new_memory():
    replays = Replays(most=2)
    for x in (torch.ones(4, device="cuda"), torch.ones(9, device="cuda")):
        for value in (1.0, 2.0, 3.0, 4.0):
            x.fill_(value)
            assert replays(double(x), (x,))[0].tolist() == [2 * value] * len(x)
