"""Heads from streaming sums: the normal equations, the objective's minimum, and what is written
into a layer.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ufm_fast.continual import BIASES, METHODS, StreamingSums, init_rows_, least_squares_head
from ufm_fast.errors import InputError

K, DIM = 4, 6
COUNTS = {"balanced": (9, 9, 9, 9), "imbalanced": (30, 9, 4, 1)}


def _data(counts: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(K).repeat_interleave(torch.tensor(counts))
    means = torch.randn(K, DIM, dtype=torch.float64, generator=generator) + 1
    return means[labels] + 0.5 * torch.randn(
        len(labels), DIM, dtype=torch.float64, generator=generator
    ), labels


def _sums(h: Tensor, y: Tensor, batch: int = 7) -> StreamingSums:
    sums = StreamingSums(K, h.shape[1])
    for part in zip(h.split(batch), y.split(batch), strict=True):
        sums.update(*part)
    return sums


def _gradient(
    h: Tensor, y: Tensor, W: Tensor, b: Tensor | None, lam: float, bias: str
) -> tuple[Tensor, Tensor]:
    """Of the objective, written out: the reference."""
    Y = nn.functional.one_hot(y, K).double()
    error = (h @ W.T + (0 if b is None else b) - Y) / len(y)
    on_bias = error.sum(0) + (lam * b if bias == "penalised" and b is not None else 0)
    return error.T @ h + lam * W, torch.zeros(()) if b is None else on_bias


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("lam", [0.0, 1e-3, 0.5])
def test_the_head_solves_its_normal_equations(bias, counts, lam):
    h, y = _data(COUNTS[counts])
    W, b = least_squares_head(_sums(h, y), lam, bias)
    for gradient in _gradient(h, y, W, b, lam, bias):
        assert gradient.abs().max() < 1e-12
    assert (b is None) == (bias == "none")


def test_sums_in_parts_merge_and_any_dtype_is_summed_in_float64():
    h, y = _data(COUNTS["imbalanced"])
    whole, parts = _sums(h, y), _sums(h[:20], y[:20]).merge(_sums(h[20:], y[20:]))
    for name in ("counts", "sums", "moment"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-14, atol=0)
    assert torch.equal(_sums(h.float(), y).moment, _sums(h.float().double(), y).moment)


@pytest.mark.parametrize("bias", ["none", "penalised"])
def test_a_trained_head_is_its_own_least_squares_head_with_lam_the_decay(bias):
    """The objective is strongly convex with modulus lam, so the head lies within |gradient|/lam of
    the trained one.
    """
    (h, y), lam = _data(COUNTS["imbalanced"]), 0.05
    linear = nn.Linear(DIM, K, bias=bias == "penalised", dtype=torch.float64)
    optimiser = torch.optim.SGD(linear.parameters(), lr=0.02, momentum=0.9, weight_decay=lam)
    for _ in range(300):
        optimiser.zero_grad()
        (0.5 * (linear(h) - nn.functional.one_hot(y, K)).square().sum(1).mean()).backward()
        optimiser.step()
    W, b = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
    gradient = torch.cat([g.flatten() for g in _gradient(h, y, W, b, lam, bias)]).norm()
    before = [p.detach().clone() for p in linear.parameters()]
    init_rows_(linear, _sums(h, y), [2, 3], lam=lam)
    moved = torch.cat(
        [(p.detach() - q).flatten() for p, q in zip(linear.parameters(), before, strict=True)]
    ).norm()
    assert 0 < moved <= gradient / lam * (1 + 1e-9)
    assert moved < 0.1 * W.norm()


@pytest.mark.parametrize("keep_old", [False, True])
def test_least_squares_rows_are_written_where_they_belong(keep_old):
    (h, y), linear = _data(COUNTS["balanced"]), nn.Linear(DIM, K)
    before, (W, b) = (
        linear.weight.detach().clone(),
        least_squares_head(_sums(h, y), 0.1, "penalised"),
    )
    assert init_rows_(linear, _sums(h, y), range(2, 4), lam=0.1, keep_old=keep_old) is linear
    torch.testing.assert_close(linear.weight[2:].double(), W[2:], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(linear.bias[2:].double(), b[2:], rtol=1e-6, atol=1e-6)
    assert torch.equal(linear.weight[:2], before[:2]) == keep_old
    if not keep_old:
        torch.testing.assert_close(linear.weight[:2].double(), W[:2], rtol=1e-6, atol=1e-6)


def test_class_means_and_random_rows():
    (h, y), linear = _data(COUNTS["balanced"]), nn.Linear(DIM, K, bias=False)
    before, sums = linear.weight.detach().clone(), _sums(h, y)
    init_rows_(linear, sums, [3], "class-mean")
    torch.testing.assert_close(linear.weight[3].double(), h[y == 3].mean(0), rtol=1e-6, atol=1e-6)
    state = torch.random.get_rng_state()
    init_rows_(linear, sums, [2], "random", seed=5)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(5)
    assert torch.equal(linear.weight[2], nn.Linear(DIM, K, bias=False).weight[2])
    assert torch.equal(linear.weight[:2], before[:2])


def test_what_does_not_fit_is_refused():
    h, y = _data(COUNTS["balanced"])
    sums, linear = _sums(h, y), nn.Linear(DIM, K)
    before, weight = sums.moment.clone(), linear.weight.detach().clone()
    one_class = StreamingSums(K, DIM).update(h[y == 1], y[y == 1])
    few = StreamingSums(K, DIM).update(h[::9], y[::9])
    for action, message in (
        (lambda: sums.update(h * torch.nan, y), "finite"),
        (lambda: sums.update(h, y[1:]), r"shape \(36,\)"),
        (lambda: sums.update(h[:, 1:], y), "6 columns"),
        (lambda: sums.update(h, y + 1), "labels"),
        (lambda: sums.merge(StreamingSums(K, 2)), "can't take"),
        (lambda: least_squares_head(one_class, 0.1), "classes 0, 2, 3 have no samples"),
        (lambda: least_squares_head(few, 0.0), "singular; choose a larger lam"),
        (lambda: least_squares_head(sums, -1.0), "lam must be >= 0"),
        (lambda: least_squares_head(sums, 0.1, "some"), "bias must be one of"),
        (lambda: init_rows_(linear, sums, [0]), "needs lam"),
        (lambda: init_rows_(linear, sums, [K], lam=0.1), "classes must lie in"),
        (lambda: init_rows_(linear, sums, [0], "zero"), f"one of {', '.join(METHODS)}"),
        (lambda: init_rows_(nn.Linear(DIM, 9), sums, [0], lam=0.1), "sums are of"),
    ):
        with pytest.raises(InputError, match=message):
            action()
    assert torch.equal(sums.moment, before)
    assert torch.equal(linear.weight, weight)
