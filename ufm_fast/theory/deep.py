"""Minima with layers: P = M + 1 factors (W, the hidden layers, H), linear between them or ReLU.

The least penalty of factors whose product has the singular values s_i (weighted by the square roots
of the counts) is (P/2) mu sum_i s_i^(2/P), mu the geometric mean of their lambdas. So what is left
is a problem in singular values, and for the squared error one of numbers: the profile of each
singular value of the targets,

    g(t) = min over s >= 0 of (s - t)^2 / 2N + (P/2) mu s^(2/P)
    (`profile`)

- linear, no bias: the targets have sqrt(n_k); f* = sum of g over the d largest and t^2/2N of the
  others, d the least width (arXiv 2202.08087 for M = 2, 2301.00437; any counts and widths);
- linear, free bias: b = n/N, and t^2 the eigenvalues of diag(n) - n n'/N, for no bias has smaller
  singular values and g increases (our derivation; for one layer too);
- cross-entropy: feasible points only, whose logits are a code's (`deep_code_value`); deep neural
  collapse is the simplex's. None is proved to be the minimum, and which is lowest depends on depth
  (arXiv 2410.23169: not the simplex's, from K = 4 on with M >= 3 and from K = 6 on with M = 2).

With a ReLU the orthogonal frame of the squared error without a bias is non-negative, so its value
is feasible; for M >= 4 it is not the least (arXiv 2405.14468). For any depth and activation the
penalty is at least (P/2) mu |Z D^1/2|_*^(2/P), and the chord of that turns the one-layer duals into
bounds (`chord`). P = 2 is the model with one layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ufm_fast.theory.arguments import check_counts, check_integer, check_positive
from ufm_fast.theory.codes import Code
from ufm_fast.theory.convex import Array, golden_section
from ufm_fast.theory.frames import simplex_frame
from ufm_fast.theory.squared_error import BiasedSpectrum


def profile(targets: Array, samples: float, mu: float, factors: int) -> tuple[Array, Array]:
    """(s, g): the best singular value for each of the targets', and its cost; s = 0 where none
    beats t^2/2N.

    s is the larger root of t = s + N mu s^(2/P - 1), by Newton's method from t, which falls to it.
    """
    t = np.asarray(targets, dtype=np.float64)
    price, power = samples * mu, 2.0 / factors - 1.0
    least = (-power * price) ** (1.0 / (1.0 - power))  # where the right side is least
    reached = t > (least + price * least**power if factors > 2 else price)
    s = np.where(reached, t, 1.0)
    for _ in range(80):
        with np.errstate(divide="ignore", invalid="ignore"):
            slope = 1.0 + power * price * s ** (power - 1.0)
            new = np.maximum(s - (s + price * s**power - t) / slope, least)
        done = ~reached | ~(new < s)
        if bool(done.all()):
            break
        s = np.where(done, s, new)
    rest = price * s**power  # t - s, without its cancellation
    cost = rest * rest / (2 * samples) + factors / 2 * mu * s ** (2.0 / factors)
    nothing = t * t / (2 * samples)
    kept = reached & (cost < nothing)
    return np.where(kept, s, 0.0), np.where(kept, cost, nothing)


@dataclass(frozen=True, eq=False)
class LayeredMinimum:
    """`value`; the singular values `sigma` (r,) of the weighted logits; `bias`: (K,) or None.

    `vectors` makes their vectors when a minimiser is asked for, K x r orthonormal: those of the
    classifier, and those of the class means times sqrt(n_k).
    """

    value: float
    sigma: Tensor
    bias: Tensor | None
    vectors: Callable[[], tuple[Tensor, Tensor]]

    def factors(
        self, counts: Tensor, widths: Sequence[int], penalties: Sequence[float]
    ) -> list[Tensor]:
        """W (K x d_(M-1)), the class means (K x d_0, zero where a class is empty), W_1 .. W_(M-1).

        ``widths``: d_0 .. d_(M-1). ``penalties``: lambda_w, lambda_h, those of W_1 .. W_(M-1).
        """
        factors, rank = len(penalties), len(self.sigma)
        level = math.exp(math.fsum(map(math.log, penalties)) / factors)
        root = self.sigma ** (1.0 / factors)
        W, H, *hidden = (math.sqrt(level / own) * root for own in penalties)
        n = counts.to(torch.float64)
        roots = torch.where(n > 0, n.clamp_min(1).rsqrt(), 0.0)
        pad = torch.nn.functional.pad
        layers = [
            pad(torch.diag(x), (0, before - rank, 0, after - rank))
            for x, before, after in zip(hidden, widths, widths[1:], strict=False)
        ]
        left, right = self.vectors()
        of_means = pad(roots[:, None] * right * H, (0, widths[0] - rank))
        return [pad(left * W, (0, widths[-1] - rank)), of_means, *layers]


def layered_mse(
    counts: Sequence[int] | Tensor, width: int, mu: float, factors: int, *, free_bias: bool = False
) -> LayeredMinimum:
    """Minimum of the squared error with linear layers of least width ``width``, without a bias or
    with a free one.

    ``factors``: P = layers + 1; ``mu``: the geometric mean of their penalties. Source: the module's
    docstring.
    """
    n = check_counts(counts)
    check_integer("factors", factors, 2)
    t, make = _centred(n) if free_bias else _plain(n)
    order: Places = np.argsort(-t, kind="stable")
    most = order[: check_integer("width", width, 1)]
    samples = float(n.sum())
    s, cost = profile(t[most], samples, check_positive("mu", mu), factors)
    rest = t[order[len(most) :]]
    value = math.fsum(cost) + math.fsum(rest * rest) / (2 * samples)
    kept = s > 0
    bias = n / samples if free_bias else None
    return LayeredMinimum(value, torch.from_numpy(s[kept]), bias, lambda: make(most[kept]))


Places = NDArray[np.intp]
Vectors = Callable[[Places], tuple[Tensor, Tensor]]


def _plain(n: Tensor) -> tuple[Array, Vectors]:
    """Singular values sqrt(n_k) and, of those chosen, their vectors: axes."""

    def vectors(chosen: Places) -> tuple[Tensor, Tensor]:
        axes = torch.zeros(len(n), len(chosen), dtype=torch.float64)
        axes[torch.from_numpy(chosen), torch.arange(len(chosen))] = 1.0
        return axes, axes

    return n.sqrt().numpy(), vectors


def _centred(n: Tensor) -> tuple[Array, Vectors]:
    """Singular values of (I - n 1'/N) diag(sqrt(n_k)): sqrt(n_g) on zero-sum vectors of groups of
    equal counts, and a few of the vectors that are constant on groups. Empty classes take part in
    nothing.
    """
    values, group, sizes = torch.unique(n, return_inverse=True, return_counts=True)
    first = int(values[0] == 0)
    members = torch.split(torch.argsort(group, stable=True), sizes.tolist())[first:]
    values, sizes = values[first:], sizes[first:]
    found = BiasedSpectrum(values.numpy(), sizes.numpy(), 1.0, 0.0)
    inside = np.repeat(values.sqrt().numpy(), (sizes - 1).numpy())
    owner = np.repeat(np.arange(len(sizes)), (sizes - 1).numpy())
    shared = np.where(found.sigma > 1e-14 * found.sigma.max(initial=0.0), found.sigma, 0.0)

    def vectors(chosen: Places) -> tuple[Tensor, Tensor]:
        left = torch.zeros(len(n), len(chosen), dtype=torch.float64)
        right = torch.zeros_like(left)
        common = np.flatnonzero(chosen >= len(owner))
        whose = np.where(
            chosen < len(owner), np.append(owner, -1)[np.minimum(chosen, len(owner))], -1
        )
        for g, rows in enumerate(members):
            columns = torch.from_numpy(np.flatnonzero(whose == g))
            left[rows[:, None], columns] = simplex_frame(len(rows), len(columns))[:, : len(columns)]
            right[rows[:, None], columns] = left[rows[:, None], columns]
            for part, of_groups in ((left, found.left), (right, found.right)):
                unit = torch.from_numpy(of_groups[g, chosen[common] - len(owner)]) / math.sqrt(
                    len(rows)
                )
                part[rows[:, None], torch.from_numpy(common)] = unit.expand(len(rows), -1)
        return left, right

    return np.concatenate([inside, shared]), vectors


# ---- cross-entropy: codes


def deep_code_value(code: Code, per_class: int, mu: float, factors: int) -> float:
    """Cross-entropy of the best logits a <u_k, u_l> of a code with linear layers of width >= r;
    balanced, no bias needed.

    min over a >= 0 of log(1 + sum_j m_j exp(-a (1 - c_j))) + (P/2) mu r (a sqrt(n) K/r)^(2/P)
    """
    K, r = code.classes, code.rank
    gaps = np.array([1.0 - c for c in code.cosines])
    numbers = np.array(list(code.cosines.values()), dtype=np.float64)
    scale = math.sqrt(check_integer("per_class", per_class, 1)) * K / r

    def value(a: float) -> float:
        return math.log1p(float(numbers @ np.exp(-a * gaps))) + factors / 2 * mu * r * math.pow(
            a * scale, 2.0 / factors
        )

    return _least(value)


def ce_bound(classes: int, per_class: int, mu: float, factors: int) -> float:
    """Lower bound for balanced cross-entropy without a bias, any depth and activation: the penalty
    of |Z D^1/2|_* alone.

    min over a >= 0 of log(1 + (K-1) exp(-a)) + (P/2) mu ((K-1) sqrt(n) a)^(2/P)
    """
    scale = (classes - 1) * math.sqrt(per_class)
    return _least(
        lambda a: (
            math.log1p((classes - 1) * math.exp(-a))
            + factors / 2 * mu * math.pow(scale * a, 2.0 / factors)
        )
    )


def mse_bound(classes: int, per_class: int, mu: float, factors: int) -> float:
    """The same for the balanced squared error: min over s in [0, 1] of (1 - s)^2/2 + (P/2) mu (K
    sqrt(n) s)^(2/P).
    """
    scale = classes * math.sqrt(per_class)
    cost = factors / 2 * mu * scale ** (2.0 / factors)
    # In s^(1/P) = x the cost is cost x^2: a profile of t = 1 and one sample with price 2 cost / P.
    return float(profile(np.ones(1), 1.0, 2.0 * cost / factors, factors)[1][0])


def chord(value: float, mu: float, factors: int) -> float:
    """nu with (P/2) mu x^(2/P) >= nu x for all x that a penalty of at most ``value`` allows: x <=
    (2 value / P mu)^(P/2).

    The penalty is at least (P/2) mu |Z D^1/2|_*^(2/P), whatever depth and activation, and concave:
    with nu in the place of the one-layer mu every dual bound of one layer bounds the minimum with
    layers.
    """
    c = factors / 2 * mu
    return c * math.pow(value / c, 1.0 - factors / 2.0)


def _least(value: Callable[[float], float]) -> float:
    """Least value over a >= 0: of a grid, finely about its lowest points, and at zero."""
    grid = np.concatenate([[0.0], np.geomspace(1e-6, 1e3, 2000)])
    values = [value(float(a)) for a in grid]
    lowest = [i for i in range(1, len(grid) - 1) if values[i] <= min(values[i - 1], values[i + 1])]
    inner = (value(golden_section(value, float(grid[i - 1]), float(grid[i + 1]))) for i in lowest)
    return min(value(0.0), *inner) if lowest else value(0.0)
