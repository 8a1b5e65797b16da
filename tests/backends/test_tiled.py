"""Every loss x backend against the dense float64 definition, and the accuracy that the off-target
mass buys.
"""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import LOSS_CASES, problems, random_point, relative, simplex_logits

from ufm_fast.backends import (
    Gradients,
    HeadInput,
    ReferenceBackend,
    TiledBackend,
    make_backend,
    tiled,
)
from ufm_fast.errors import InputError
from ufm_fast.losses import make_loss
from ufm_fast.objective import Objective
from ufm_fast.problem import Problem
from ufm_fast.targets import Targets

MARGINS = (20.0, 50.0, 80.0)
WAYS = (0.0, 1e9)  # of the products: factors and labels added to them, or put into E first


@settings(max_examples=150, deadline=None)
@given(
    problems(),
    st.integers(1, 5),
    st.integers(0, 10**6),
    st.sampled_from([0.1, 1.0, 6.0]),
    st.sampled_from(WAYS),
)
def test_tiled_equals_reference(problem, chunk, seed, scale, few):
    dense, fused = (
        Objective(problem, backend=b) for b in (ReferenceBackend(), TiledBackend(chunk))
    )
    x, v = random_point(dense, seed, scale), random_point(dense, seed + 1)
    with mock.patch.object(tiled, "_FEW", few):
        expected, actual = (
            dense.value_and_grad(x, statistics=True),
            fused.value_and_grad(x, statistics=True),
        )
    assert actual.value == pytest.approx(expected.value, rel=1e-12)
    assert relative(actual.gradient, expected.gradient) < 1e-11
    assert relative(fused.hvp(x, v), dense.hvp(x, v)) < 1e-10
    right, left = (
        torch.randn(problem.num_classes, 3, dtype=torch.float64),
        torch.randn(x.H.shape[0], 2, dtype=torch.float64),
    )
    wanted, found = (o.backend.logit_gradient(o.head_input(x)) for o in (dense, fused))
    for a, b in (
        (wanted.times(right), found.times(right)),
        (wanted.transposed_times(left), found.transposed_times(left)),
    ):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12 * float(a.abs().max() + 1))
    torch.testing.assert_close(
        fused.backend.losses(fused.head_input(x)),
        dense.backend.losses(dense.head_input(x)),
        rtol=1e-11,
        atol=1e-12,
    )
    if expected.statistics is not None:
        torch.testing.assert_close(
            actual.statistics.margin, expected.statistics.margin, rtol=1e-10, atol=1e-11
        )
        torch.testing.assert_close(
            actual.statistics.log_off_target_mass,
            expected.statistics.log_off_target_mass,
            rtol=1e-10,
            atol=1e-11,
        )


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(0, 10**6))
def test_tile_size_does_not_matter_and_runs_repeat(problem, seed):
    results = []
    for chunk in (1, 2, 1000, 1000):
        objective = Objective(problem, backend=TiledBackend(chunk))
        results.append(objective.value_and_grad(random_point(objective, seed, 2.0)))
    for other in results[:2]:
        assert other.value == pytest.approx(results[2].value, rel=1e-14)
        assert relative(other.gradient, results[2].gradient) < 1e-13
    assert results[2].value == results[3].value
    for a, b in zip(results[2].gradient.parts(), results[3].gradient.parts(), strict=True):
        assert torch.equal(a, b)


def _sums(backend, loss, H, W, y):
    """Value and data gradients before 1/N."""
    out = Gradients(torch.zeros(H.shape, dtype=H.dtype), torch.zeros(W.shape, dtype=W.dtype), None)
    ones = torch.ones(H.shape[0], dtype=torch.float64)
    value = backend.head(HeadInput(loss, H, W, None, Targets(y), ones), out).value
    return float(value), out


def _exact(loss, H, W, y):
    """The same sums from E = exp(z - z_y) in long double: written apart from the library's code."""
    H, W, y = (
        H.double().numpy().astype(np.longdouble),
        W.double().numpy().astype(np.longdouble),
        y.numpy(),
    )
    z, rows = H @ W.T, np.arange(len(y))
    own = z[rows, y]
    E = np.exp(z - own[:, None])
    E[rows, y] = 0
    s = E.sum(1)
    l, p = np.log1p(s), s / (1 + s)
    gamma = getattr(loss, "gamma", 0.0)
    value = p**gamma * l + loss.smoothing * (own - z.mean(1))
    slope = p**gamma * (1 + gamma * l / s) / (1 + s)
    G = slope[:, None] * E - np.longdouble(loss.smoothing) / z.shape[1]
    G[rows, y] += -slope * s + loss.smoothing
    dH, dW = (torch.from_numpy(x.astype(np.float64)) for x in (G @ W, G.T @ H))
    return float(value.sum()), dH, dW


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("K", [2, 10, 300])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize("case", [{}, {"smoothing": 0.1}, {"gamma": 0.5}, {"gamma": 2.0}])
@pytest.mark.parametrize("few", WAYS)
def test_terminal_phase_keeps_its_digits(monkeypatch, margin, K, dtype, tolerance, case, few):
    monkeypatch.setattr(tiled, "_FEW", few)
    loss = make_loss("focal" if "gamma" in case else "ce", **case)
    H, W = simplex_logits(K, margin, dtype)
    y = torch.arange(K)
    value, gradients = _sums(TiledBackend(7), loss, H, W, y)
    expected, dH, dW = _exact(loss, H, W, y)
    scale = float(dH.norm()) / H.norm().item()
    if scale < 1e3 * torch.finfo(dtype).tiny:
        pytest.skip("the true gradient is not a normal number in this dtype")
    assert value == pytest.approx(expected, rel=tolerance)
    assert float((gradients.features.double() - dH).norm() / dH.norm()) < tolerance
    assert float((gradients.weight.double() - dW).norm() / dW.norm()) < tolerance


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_pick_all_terminal_phase(margin, dtype, tolerance):
    """Off-target columns hold relatively; target columns hold 4 eps max|z|, for z itself carries
    eps |z|.
    """
    K, pairs = 12, [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11)]
    _, W = simplex_logits(K, margin, dtype)
    H = torch.stack([W[a] + W[b] for a, b in pairs])
    targets = Targets(torch.tensor(pairs).reshape(-1), torch.arange(0, 2 * len(pairs) + 1, 2))
    ones = torch.ones(len(pairs), dtype=torch.float64)
    x = HeadInput(make_loss("pick-all"), H, W, None, targets, ones)
    G = TiledBackend().logit_gradient(x).times(torch.eye(K, dtype=dtype)).double()
    z = H.double() @ W.double().T
    mask = torch.zeros(len(pairs), K, dtype=torch.bool)
    mask[torch.arange(len(pairs)).repeat_interleave(2), targets.indices] = True
    own = z[mask].reshape(-1, 2)
    E = torch.exp(z - own.mean(1, keepdim=True))
    T = E[mask].reshape(-1, 2).sum(1, keepdim=True)
    s = E.masked_fill(mask, 0.0).sum(1, keepdim=True)
    off = (2 * E / (T + s)).masked_fill(mask, 0.0)
    assert float((G.masked_fill(mask, 0.0) - off).norm() / off.norm()) < tolerance
    on = (2 * E / (T + s) - 1)[mask]
    assert (
        float((G[mask] - on).abs().max())
        <= 4 * torch.finfo(dtype).eps * float(z.abs().max()) + 1e-15
    )


def test_an_impossible_target_of_a_set_leaves_the_gradients_finite():
    """Alone in its set, or beside others: the loss is infinite, the gradient in the logits M p_k -
    1 there.
    """
    make = torch.Generator().manual_seed(2)
    H, W, bias = (
        torch.randn(*shape, generator=make, dtype=torch.float64) for shape in ((4, 3), (6, 3), (6,))
    )
    bias[0] = -math.inf
    targets = Targets(torch.tensor([0, 0, 2, 1, 3, 4]), torch.tensor([0, 1, 3, 5, 6]))
    x = HeadInput(make_loss("pick-all"), H, W, bias, targets, torch.ones(4, dtype=torch.float64))
    out = Gradients(torch.zeros_like(H), torch.zeros_like(W), torch.zeros_like(bias))
    assert float(TiledBackend().head(x, out).value) == math.inf
    assert TiledBackend().losses(x).isfinite().tolist() == [False, False, True, True]
    G = torch.softmax(H @ W.T + bias, 1) * targets.sizes()[:, None]
    G[torch.tensor([0, 1, 1, 2, 2, 3]), targets.indices] -= 1
    for found, wanted in zip(
        (out.features, out.weight, out.bias), (G @ W, G.T @ H, G.sum(0)), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", LOSS_CASES[:5])
@pytest.mark.parametrize("size", [1e2, 1e4, 1e8])
@pytest.mark.parametrize("few", WAYS)
def test_hostile_logits_stay_finite(monkeypatch, dtype, case, size, few):
    monkeypatch.setattr(tiled, "_FEW", few)
    generator = torch.Generator().manual_seed(3)
    H = (torch.randn(7, 5, generator=generator) * size).to(dtype)
    W = torch.randn(6, 5, generator=generator).to(dtype)
    loss, y = (
        make_loss(**{"name": case["loss"], **{k: v for k, v in case.items() if k != "loss"}}),
        torch.tensor([0, 1, 2, 3, 4, 5, 0]),
    )
    kept = torch.float32 if dtype == torch.bfloat16 else dtype
    out = Gradients(torch.zeros(7, 5, dtype=kept), torch.zeros(6, 5, dtype=kept), None)
    x = HeadInput(loss, H, W, None, Targets(y), torch.ones(7, dtype=torch.float64))
    value = TiledBackend(3).head(x, out).value
    expected = loss.dense(H.double() @ W.double().T, y).sum()
    assert float(value) == pytest.approx(
        float(expected), rel=1e-5 if kept == torch.float32 else 1e-12
    )
    assert bool(torch.isfinite(out.features).all())
    assert bool(torch.isfinite(out.weight).all())


@pytest.mark.parametrize(
    ("dtype", "spread"), [(torch.float32, 30.0), (torch.float64, 300.0), (torch.float32, 300.0)]
)
@pytest.mark.parametrize(  # a smoothed target of a masked class is impossible
    ("case", "masked"),
    [
        (LOSS_CASES[i], masked)
        for i, masked in ((0, False), (0, True), (1, False), (4, False), (4, True))
    ],
)
@pytest.mark.parametrize("few", WAYS)
def test_logits_that_spread_far_keep_their_digits(monkeypatch, dtype, spread, masked, case, few):
    """As of parameters drawn from a normal distribution: most exponentials underflow around any
    offset, and are zero then.

    Classes masked by a bias of -inf or -1e4 leave the mean logit nothing to say, and have no part
    in the gradients.
    """
    monkeypatch.setattr(tiled, "_FEW", few)
    make = torch.Generator().manual_seed(4)
    H, W = (
        torch.randn(50, 16, generator=make).to(dtype),
        torch.randn(300, 16, generator=make).to(dtype) * (spread / 4),
    )
    bias = torch.randn(300, generator=make).to(dtype)
    if masked:
        bias[200:250], bias[250:] = -float("inf"), -1e4
    settings = {"name": case["loss"], **{k: v for k, v in case.items() if k != "loss"}}
    loss, y = make_loss(**settings), torch.randint(200, (50,), generator=make)
    targets = Targets(y)
    if loss.multi_label:
        targets = Targets(
            torch.cat([y, y[:1] + 1]) % 200, torch.cat([torch.arange(50), torch.tensor([51])])
        )
    weight = torch.full((50,), 0.02, dtype=torch.float64)
    exact = [x.double().clone().requires_grad_() for x in (H, W, bias)]
    z = exact[0] @ exact[1].T + exact[2]
    rows, columns = targets.slice(0, 50)
    if loss.multi_label:
        value = 0.02 * (z.logsumexp(1)[rows] - z[rows, columns]).sum()
    else:
        off = z.clone().scatter(1, y[:, None], -float("inf")).logsumexp(1) - z[torch.arange(50), y]
        plain = torch.logaddexp(torch.zeros_like(off), off)
        value = 0.02 * loss.value(plain, torch.sigmoid(off)).sum()
        if settings.get("smoothing"):
            value = (
                value + 0.02 * settings["smoothing"] * (z[torch.arange(50), y] - z.mean(1)).sum()
            )
    expected = torch.autograd.grad(value, exact)
    out = Gradients(*(torch.zeros_like(x) for x in (H, W, bias)))
    found = TiledBackend(20).head(HeadInput(loss, H, W, bias, targets, weight), out)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    assert float(found.value) == pytest.approx(float(value.detach()), rel=tolerance)
    for have, wanted in zip((out.features, out.weight, out.bias), expected, strict=True):
        assert float((have.double() - wanted).norm()) <= tolerance * float(wanted.norm())
    if masked:
        assert bool((out.weight[200:] == 0).all())


def test_hessian_products_of_misclassified_rows_keep_their_digits():
    """A wrong class has all the mass, and its logit moves by hundreds: that must not be left to two
    numbers that cancel.
    """
    make = torch.Generator().manual_seed(1)
    for _ in range(500):
        draws = [torch.randn(*shape, generator=make) for shape in ((1, 4), (2, 4), (1, 4), (2, 4))]
        H, W, dH, dW = (x * scale for x, scale in zip(draws, (60.0, 0.5, 1.0, 1.0), strict=True))
        targets, products = Targets(torch.randint(2, (1,), generator=make)), []
        for backend, dtype in (
            (TiledBackend(), torch.float32),
            (ReferenceBackend(), torch.float64),
        ):
            one, loss = torch.ones(1, dtype=torch.float64), make_loss("ce")
            x, v = (
                HeadInput(loss, a.to(dtype), b.to(dtype), None, targets, one)
                for a, b in ((H, W), (dH, dW))
            )
            out = Gradients(torch.zeros_like(x.features), torch.zeros_like(x.weight), None)
            backend.head_hvp(x, v, out)
            products.append(out.weight.double())
        size = float(products[1].abs().max())
        assert float((products[0] - products[1]).abs().max()) <= max(1e-4 * size, 1e-7)


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(1, 4), st.integers(0, 10**6), st.sampled_from(WAYS))
def test_fresh_buffers_are_written(problem, chunk, seed, few):
    """Garbage in a fresh buffer, NaN included, does not get into the gradient."""
    objective = Objective(problem)
    x = objective.head_input(random_point(objective, seed))
    likes = (x.features, x.weight, x.bias)
    for backend in (TiledBackend(chunk), ReferenceBackend()):
        zero = Gradients(*(None if t is None else torch.zeros_like(t) for t in likes))
        fresh = Gradients(
            *(None if t is None else torch.full_like(t, float("nan")) for t in likes), fresh=True
        )
        with mock.patch.object(tiled, "_FEW", few):
            assert float(backend.head(x, zero).value) == float(backend.head(x, fresh).value)
        for a, b in (
            (zero.features, fresh.features),
            (zero.weight, fresh.weight),
            (zero.bias, fresh.bias),
        ):
            if a is not None:
                torch.testing.assert_close(b, a, rtol=1e-13, atol=1e-15)


def test_half_precision_inputs_give_float32_gradients():
    problem = Problem(classes=5, dim=4, dtype="bfloat16")
    objective = Objective(problem)
    x = random_point(objective, 0).to(dtype=torch.float32)
    assert objective.value_and_grad(x).gradient.W.dtype == torch.float32


def test_backend_names():
    assert make_backend("auto", "cpu").name == "tiled"
    assert make_backend("reference").name == "reference"
    with pytest.raises(InputError, match="backend must be one of"):
        make_backend("cuda")
    with pytest.raises(InputError, match="triton"):
        make_backend("triton", "cpu")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("margin", [20.0, 50.0, 80.0])
def test_smoothing_leaves_the_bias_its_digits(dtype, tolerance, margin):
    """Its part of the bias gradient is zero where classes are balanced, and what is left is of the
    order of exp(-margin).
    """
    W = ((torch.eye(10, dtype=torch.float64) - 0.1) * margin**0.5).to(dtype)
    b = torch.linspace(-0.2, 0.3, 10, dtype=torch.float64).to(dtype)
    found = []
    for eps in (0.0, 0.1):
        x = HeadInput(
            make_loss("ce", smoothing=eps),
            W,
            W,
            b,
            Targets(torch.arange(10)),
            torch.ones(10, dtype=torch.float64),
        )
        out = Gradients(None, None, torch.zeros(10, dtype=dtype))
        TiledBackend().head(x, out)
        found.append(out.bias)
    assert torch.equal(*found)
    u = W.double() @ W.double().T + b.double()
    u = (u - u.diagonal()[:, None]).fill_diagonal_(-float("inf")).exp()
    exact = (u / (1 + u.sum(1, keepdim=True))).sum(0) - u.sum(1) / (1 + u.sum(1))
    assert float((found[1].double() - exact).norm()) <= tolerance * float(exact.norm())
