"""Squared error: residuals to the last digit, and means of many rows."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ufm_fast.backends import (
    Gradients,
    HeadInput,
    ReferenceBackend,
    residual,
    squared_error,
)
from ufm_fast.losses import SquaredError
from ufm_fast.targets import Targets


@pytest.mark.parametrize("bias", [False, True])
def test_exact_residuals_are_exact(bias):
    """E = H W' + b - Y where all of it is rounding in float64: against rational arithmetic."""
    generator = torch.Generator().manual_seed(3)
    W = torch.eye(4, 5, dtype=torch.float64) + 1e-3 * torch.randn(
        4, 5, generator=generator, dtype=torch.float64
    )
    b = torch.full((4,), 0.25, dtype=torch.float64) if bias else None
    goal = torch.eye(4, dtype=torch.float64) - (0.0 if b is None else b)
    H = torch.linalg.lstsq(W, goal.T).solution.T.contiguous() * (1 - 1e-9)
    x = HeadInput(
        SquaredError(),
        H,
        W,
        b,
        Targets(torch.arange(4)),
        torch.full((4,), 0.25, dtype=torch.float64),
    )

    def exact(r: int, k: int) -> Fraction:
        product = sum(
            (Fraction(p) * Fraction(q) for p, q in zip(H[r].tolist(), W[k].tolist(), strict=True)),
            Fraction(0),
        )
        return product + (0 if b is None else Fraction(float(b[k]))) - (r == k)

    found = torch.cat([E for _, E in residual.blocks(x, exact=True)])
    own, total = residual.own(x, exact=True), squared_error.residual_sum(x)
    for r in range(4):
        for k in range(4):
            assert float(abs(Fraction(float(found[r, k])) - exact(r, k))) < 1e-20
        assert float(abs(Fraction(float(own[r])) - exact(r, r))) < 1e-20
        assert (
            float(abs(Fraction(float(total[r])) - sum(exact(i, r) for i in range(4)) / 4)) < 1e-20
        )


@pytest.mark.parametrize("dim", [2, 3, 4, 5, 6, 7])
def test_residual_sums_go_to_their_classes(dim):
    """Classes without rows first, between and last; d on either side of the classes that have rows,
    of all, and of the rows.
    """
    generator = torch.Generator().manual_seed(1)
    H, W = (torch.randn(n, dim, generator=generator, dtype=torch.float64) for n in (7, 6))
    b, y = (
        torch.randn(6, generator=generator, dtype=torch.float64),
        torch.tensor([1, 3, 4, 1, 3, 3, 4]),
    )
    o = torch.rand(7, generator=generator, dtype=torch.float64)
    x = HeadInput(SquaredError(), H, W, b, Targets(y), o)
    E = H @ W.T + b - torch.nn.functional.one_hot(y, 6)
    torch.testing.assert_close(squared_error.residual_sum(x), o @ E)
    own, shift = E[torch.arange(7), y], torch.rand(6, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(squared_error.along_targets(x, shift), o @ (own - shift[y]))
    torch.testing.assert_close(squared_error.losses(x), 0.5 * E.square().sum(1))


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(2, 8),
    st.integers(1, 11),
    st.integers(0, 10**6),
    st.booleans(),
    st.booleans(),
)
def test_squared_error_of_many_rows_equals_the_definition(rows, classes, dim, seed, biased, signed):
    """More rows than dimensions, or fewer; classes without rows; weights of any sign, as a backward
    pass may bring.
    """
    generator = torch.Generator().manual_seed(seed)
    H, W, b = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((rows, dim), (classes, dim), (classes,))
    )
    y = torch.randint(classes, (rows,), generator=generator) // (1 + seed % 2)
    o = torch.rand(rows, generator=generator, dtype=torch.float64) - (0.5 if signed else 0.0)
    x = HeadInput(SquaredError(), H, W, b if biased else None, Targets(y), o)
    ours, dense = (
        Gradients(*(None if p is None else torch.ones_like(p) for p in (H, W, x.bias)))
        for _ in range(2)
    )
    value, expected = squared_error.value_and_grad(x, ours), ReferenceBackend().head(x, dense).value
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)
    for part in ("features", "weight", "bias"):
        if getattr(ours, part) is not None:
            torch.testing.assert_close(
                getattr(ours, part), getattr(dense, part), rtol=1e-11, atol=1e-11
            )
    torch.testing.assert_close(
        squared_error.losses(x), ReferenceBackend().losses(x), rtol=1e-11, atol=1e-11
    )


def test_the_value_of_many_collapsed_rows_keeps_its_digits():
    """Residuals of 1e-7 and a spread of 1e-9 about the class means: 1e-14 of the O(1) terms of a
    Gram value.
    """
    generator = torch.Generator().manual_seed(2)
    W = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q[:5]
    y = torch.arange(200) % 5
    H = (1 - 1e-7) * W[y] + 1e-9 * torch.randn(200, 8, generator=generator, dtype=torch.float64)
    x = HeadInput(
        SquaredError(), H, W, None, Targets(y), torch.full((200,), 1 / 200, dtype=torch.float64)
    )
    E = torch.cat([E for _, E in residual.blocks(x, exact=True)])
    exact = float(0.5 * E.square().sum(1).mean())
    value = float(
        squared_error.value_and_grad(x, Gradients(torch.zeros_like(H), torch.zeros_like(W), None))
    )
    assert value == pytest.approx(exact, rel=1e-8)
    assert float(squared_error.losses(x).mean()) == pytest.approx(exact, rel=1e-8)
