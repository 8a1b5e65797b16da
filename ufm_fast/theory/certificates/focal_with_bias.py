"""A lower bound for the focal loss with a bias, where it is not convex: dual rows that follow the
bias.

For any minimiser let m be the mean of the features, h_r = m + h'_r, and b' = b + W m the bias that
all classes feel, with p = softmax(b'). Three facts about the global minimum (some minimiser has
equal features within each class):

    penalty      mu |D^1/2 Z|_* >= -sum_r w_r <g_r, z_r> for rows g_r with |G| <= mu, G = (sqrt(n_r)
                 / N) g_r, w_r = n_r / N. As sum_r w_r h'_r = 0, a vector s(p) common to all rows
                 may be added to g_r in the part of h'.
    a bias       lambda_b/2 |b|^2 >= <a, b> - |a|^2 / (2 lambda_b); with a = -sum_r w_r g_r the cost
                 of b and of W m is the same, <a, b'>. A free bias costs nothing: m = 0, and only G
                 less its mean row need obey |G| <= mu.
    no row       does better with the features m of another: phi(u_r) <= phi(v(p_r)) + T, with v(p)
                 = log((1 - p) / p) and T = N lambda_H/2 |m|^2: 0 for a free bias, else at most f
                 less a bound for the same problem with a free bias.

With s(p) = level (p - p*) the rows are g_r = pi_r - c_r e_y, pi_rk = pi*_rk + level (p_k - p*_k) >=
0, c_r = c*_r + level (p*_y - p_y), and the least of each row's loss is known (Gibbs' inequality).
What is left is a sum over single classes,

    F_k(p_k) = sum_{y_r = k} w_r [c_r log(c_r / p_k) + min_{u <= v_T(p_k)} (phi(u) - c_r u)]
               + sum_{y_r != k} w_r pi_rk log(p_k / pi_rk) + a_k log p_k,

over the simplex, and for any nu  min f >= nu + sum_k min_p [F_k(p) - nu p] - |a|^2 / (2 lambda_b).
At a minimum the sum is stationary in p at p*, which gives nu. The rows are those of the point's
gradient; rows beyond the peak of phi', which have collapsed, need a steeper c_r, and |G| leaves
room for it. Balanced classes: `balanced_bound`. (Our derivation.)

Decisions

2026-11-26. The focal loss with a bias has a bound of its own
(`theory/certificates/focal_with_bias.py`), for its convex envelope loses up to a tenth where the
loss pulls at a gap by more than 1. Three ideas make one. All classes feel one bias b', so a vector
that depends on it may be added to every dual row at no cost in their norm; with level (p - p*), p
the softmax of b', the bound becomes a sum of functions of single p_k, whose minimum over the
simplex a Lagrange multiplier bounds exactly. And no sample does worse with its own features than
with the mean's, which ends each row's conjugate before the loss turns over. Rows that have
collapsed get the steeper dual row that the norm leaves room for. Of 54 random problems that the
envelope leaves open (K up to 12), 32 are certified below 1e-7, and the worst gap of the others is
4e-3 instead of 0.2 (`bench/reasons/focal_bound.py`); no point's bound lay above the lowest value
found (`tests/theory/test_certificates.py`). It costs a few hundred K^2 logarithms, hence the limit
of 1,024 classes. For balanced classes it is a function of one number, `balanced_bound`, by which
theory now knows the minimum up to a percent from the jump.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ufm_fast.losses import Focal
from ufm_fast.point import Point
from ufm_fast.problem import Problem
from ufm_fast.targets import Rows
from ufm_fast.theory.certificates.operator_norm import dense_norm
from ufm_fast.theory.focal import Rise, phi, slope

#: The sum over rows and classes costs some 300 K^2 logarithms a try; beyond this K it is left out.
MOST_CLASSES = 1024
_LEVEL = (
    0.75  # of the largest level that keeps pi >= 0; a half and a quarter left more problems open
)
_STEEPER = 1.02  # than the steepest chord, below which a collapsed row's bound is not tight
_ENOUGH = 1e-9  # relative gap at which no more is tried
_STEP = 1e-5  # of the central difference that gives nu: any nu gives a bound
_BLOCK = 1 << 22  # numbers of the largest array


def following_bound(
    problem: Problem, rows: Rows, x: Point, value: float, *, known: float = 0.0
) -> float:
    """A lower bound on the minimum of ``problem`` (focal, biased, K <= ``MOST_CLASSES``), tight at
    most minima.

    ``x``: a model point in float64 with one row of H for each of ``rows``; ``value``: its
    objective, or any upper bound on the minimum. At least ``known``, a lower bound that is known
    already, and nothing else is tried where that is tight.
    """
    if value - known <= _ENOUGH * value:
        return known
    state = _State(problem, rows, x)
    unpenalised = max(0.0, state.best(value, free=True, excess=0.0))
    if problem.bias == "free" or value - unpenalised <= _ENOUGH * value:
        return max(known, unpenalised)
    # Without its penalty the bias is free: that bound holds, too, and says how much of f the mean
    # can be.
    excess = (value - unpenalised) * (1.0 + 1e-9)
    return max(known, unpenalised, state.best(value, free=False, excess=excess))


def balanced_bound(loss: Focal, classes: int, per_class: int, mu: float) -> float:
    """`following_bound` of a balanced problem with a free bias, at equal classes: a function of one
    number.

    With g_r = kappa (p - e_y), kappa = K sqrt(n) mu, all F_k are F(p) = rho(p) / K, where
    rho(p) = min_{u <= v(p)} [phi(u) + kappa (1 - p) (v(p) - u)], so with p* = 1 / K
    min f >= max over nu of nu p* + min_p [rho(p) - nu p], the convex envelope of rho at p*.

    It meets the simplex but within a percent of the penalty at which the gap jumps to zero. There
    it lies below, most at the jump and for many classes: relatively 1.0e-5 at K = 20, 1.6e-4 at K =
    40, 2.9e-4 at K = 60, 7.5e-4 at K = 200, the largest over gamma of 0.25 to 8
    (`tests/theory/test_certificates.py`).
    """
    rise = Rise(loss)
    kappa = classes * math.sqrt(per_class) * mu

    def rho(t: Tensor) -> Tensor:
        return torch.stack(rise.below(kappa * torch.sigmoid(-t), -t))

    centre = torch.tensor([-math.log(classes - 1.0)], dtype=torch.float64)
    p = torch.sigmoid(centre)
    around = rho(torch.cat([centre - _STEP, centre + _STEP])).amin(0)
    tangent = float((around[1] - around[0]) / (2 * _STEP) / (p * (1 - p)))

    def bound(nu: float) -> float:
        return float(_least(lambda t: rho(t) - nu * torch.sigmoid(t), centre) + nu * p)

    best = bound(tangent)
    if best >= float(rho(centre).amin()) * (1.0 - _ENOUGH):
        return best
    from scipy.optimize import minimize_scalar

    width = abs(tangent) + 1.0  # a concave function of nu
    found = minimize_scalar(
        lambda nu: -bound(nu), bounds=(tangent - width, tangent + width), method="bounded"
    )  # type: ignore[no-untyped-call]
    return max(best, -float(found.fun))


def _least(function: Callable[[Tensor], Tensor], centres: Tensor) -> Tensor:
    """Least value over all t, for each of K rows, of the branches of a function (K x M) ->
    (branches x K x M).

    Ever finer grids around the two lowest minima of each branch on a first one. The branches are
    smooth on its scale; the minimum of both is not, and can have two of its own within a cell.
    """
    own = centres.reshape(-1, 1)
    coarse = torch.arange(min(-45.0, float(own.min()) - 20.0), 37.0, 1.0).to(own)
    fine, around = torch.arange(-60, 40).to(own) / 5, torch.arange(-15, 16).to(own) / 5
    t = (
        torch.cat([torch.cat([coarse, fine]).expand(own.shape[0], -1), own + around], 1)
        .sort(1)
        .values
    )
    values = function(t)
    branches, K, M = values.shape
    padded = torch.nn.functional.pad(values, (1, 1), value=math.inf)
    lowest = (values <= padded[:, :, :-2]) & (values <= padded[:, :, 2:])
    least, place = torch.where(lowest, values, math.inf).topk(
        2, dim=2, largest=False
    )  # branches x K x 2
    left, right = (
        t.expand(branches, K, M).gather(2, (place + side).clamp(0, M - 1)) for side in (-1, 1)
    )
    share = torch.linspace(0.0, 1.0, 15).to(own)
    branch = torch.arange(branches, device=own.device)
    for _ in range(6):
        t = left[..., None] + (right - left)[..., None] * share  # branches x K x 2 x 15
        values = function(t.movedim(0, 1).reshape(K, -1)).reshape(branches, K, branches, 2, -1)
        best, place = values[branch, :, branch].min(3)
        least = torch.minimum(least, best)
        left, right = (
            t.gather(3, (place + side).clamp(0, 14)[..., None])[..., 0] for side in (-1, 1)
        )
    return least.amin((0, 2))


class _State:
    """One row a class that has samples: its gradient at the point, as off-target shares and a pull
    c_r.
    """

    def __init__(self, problem: Problem, rows: Rows, x: Point) -> None:
        assert isinstance(problem.loss, Focal)
        assert x.b is not None
        self.problem, self.rise = problem, Rise(problem.loss)
        device = x.W.device
        counts = problem.counts.to(device).double()
        self.y = torch.nonzero(counts).reshape(-1)
        features = torch.zeros(len(counts), x.H.shape[1], dtype=torch.float64, device=device)
        features.index_add_(
            0, rows.targets.indices.to(device), x.H * rows.counts.to(device).double()[:, None]
        )
        H = features[self.y] / counts[self.y, None]
        self.w = counts[self.y] / counts.sum()
        self.root = counts[self.y].sqrt() / counts.sum()
        Z = H @ x.W.T
        shared = x.b + self.w @ Z
        self.p = torch.softmax(shared, 0)
        self.centre = (shared - _log_rest(shared)).clamp(
            -700.0, 700.0
        )  # log(p / (1 - p)), as far as exp goes
        Z += x.b
        own = Z.gather(1, self.y[:, None])
        Z.scatter_(1, self.y[:, None], -math.inf)
        u = torch.logsumexp(Z, 1) - own[:, 0]
        self.share = torch.softmax(Z, 1)
        self.pull = slope(problem.loss, u)
        end = torch.maximum(-self.centre[self.y], u)
        self.steep = torch.where(
            u > self.rise.end, _steepest_chord(problem.loss, end), 0.0
        )  # 0: not collapsed

    def best(self, value: float, *, free: bool, excess: float) -> float:
        """The better bound of the gradient's rows and of those that are steeper where rows have
        collapsed.
        """
        plain, mu = self._matrix(self.pull), self.problem.mu
        norm = self._norm(plain, free)
        found = self._bound(plain if norm <= mu else plain * (mu / norm), free, excess)
        if value - found <= _ENOUGH * value or not bool(self.steep.any()) or norm > mu:
            return found
        steep = self._matrix(torch.maximum(self.pull, _STEEPER * self.steep))
        # The norm is convex, so this far from the gradient to the steeper rows it is at most mu.
        most = self._norm(steep, free)
        return max(
            found,
            self._bound(
                torch.lerp(plain, steep, 1.0 if most <= mu else (mu - norm) / (most - norm)),
                free,
                excess,
            ),
        )

    def _bound(self, G: Tensor, free: bool, excess: float) -> float:
        """What the dual rows G prove, less what a penalised bias costs them."""
        cost = 0.0 if free else float((self.w @ G).square().sum()) / (2 * self.problem.lambda_b)
        return _Followed(self, G, free, excess).bound() - cost

    def _matrix(self, pull: Tensor) -> Tensor:
        return (self.share * pull[:, None]).scatter_(1, self.y[:, None], -pull[:, None])

    def _norm(self, G: Tensor, free: bool) -> float:
        scaled = G * self.root[:, None]
        if free:
            mean = self.w.sqrt()
            scaled = scaled - torch.outer(mean, mean @ scaled)
        return dense_norm([scaled], G.shape[1]).value


class _Followed:
    """sum_k F_k over the simplex for one choice of dual rows G, in the variables t_k = log(p_k / (1
    - p_k)).
    """

    def __init__(self, state: _State, G: Tensor, free: bool, excess: float) -> None:
        self.state, self.excess = state, excess
        y = state.y[:, None]
        self.c = -G.gather(1, y)[:, 0]
        self.pi = G.scatter(1, y, 0.0)
        # pi + level (p - p*) >= 0 at p = 0 for every entry but the target's
        self.level = _LEVEL * float((self.pi / state.p).scatter_(1, y, math.inf).min())
        self.linear = torch.zeros_like(state.p) if free else -(state.w @ G)

    def bound(self) -> float:
        """nu + sum_k min_t [F_k - nu p]; -inf where F_k falls without end as p -> 0."""
        state = self.state
        at_zero = self.pi - self.level * state.p
        falls = state.w @ at_zero.scatter(1, state.y[:, None], 0.0) + self.linear
        rises = torch.zeros_like(falls)
        rises[state.y] = state.w * (self.c + self.level * state.p[state.y]).clamp_max(1.0)
        if bool((rises < falls).any()):
            return -math.inf
        around = self.values(torch.stack([state.centre - _STEP, state.centre + _STEP], 1)).amin(0)
        slopes = (around[:, 1] - around[:, 0]) / (2 * _STEP)  # p (1 - p) F'
        nu = float((slopes / torch.sigmoid(-state.centre)).sum())
        return nu + float(
            _least(lambda t: self.values(t) - nu * torch.sigmoid(t), state.centre).sum()
        )

    def values(self, t: Tensor) -> Tensor:
        """F_k at (K x M) values of t, (2 x K x M): with the inner minimum over u, and with the one
        at its end.
        """
        state = self.state
        K, M = t.shape
        log_p = torch.nn.functional.logsigmoid(t)
        shift = self.level * (torch.sigmoid(t) - state.p[:, None])
        result = torch.empty_like(t)
        width = max(1, _BLOCK // (len(state.y) * M))
        classes = torch.arange(K, device=t.device)
        for start in range(0, K, width):
            part = slice(start, start + width)
            pi = (self.pi[:, part, None] + shift[None, part]).clamp_min_(0.0)
            pi *= (classes[None, part] != state.y[:, None])[:, :, None]
            mass = torch.einsum("r,rkm->km", state.w, pi)
            result[part] = mass * log_p[part] + torch.einsum(
                "r,rkm->km", state.w, torch.special.entr(pi)
            )
        own = t[state.y]
        c = (self.c[:, None] - shift[state.y]).clamp_min_(1e-300)
        end = _raise_loss(state.rise.loss, -own, self.excess)
        gibbs = c * (
            c.log() - torch.nn.functional.logsigmoid(-own) - (end + own)
        )  # c (log(c / p) - end)
        result += self.linear[:, None] * log_p
        both = result.repeat(2, 1, 1)
        both[:, state.y] += state.w[:, None] * (gibbs + torch.stack(state.rise.below(c, end)))
        return both


def _log_rest(b: Tensor) -> Tensor:
    """log sum_{j != k} exp(b_j) of each k, without the cancellation of log(sum - exp(b_k))."""
    K = b.numel()
    others = b.expand(K, K).masked_fill(torch.eye(K, dtype=torch.bool, device=b.device), -math.inf)
    return torch.logsumexp(others, 1)


def _steepest_chord(loss: Focal, end: Tensor) -> Tensor:
    """max over u < end of (phi(end) - phi(u)) / (end - u), on a grid."""
    below = torch.logspace(-4.0, 1.8, 3000, dtype=torch.float64, device=end.device)
    chords: Tensor = (phi(loss, end)[:, None] - phi(loss, end[:, None] - below)) / below
    return chords.max(1).values


def _raise_loss(loss: Focal, u: Tensor, excess: float) -> Tensor:
    """The point from u on at which phi is higher by ``excess``: from above, by bisection."""
    if excess == 0.0:
        return u
    target = phi(loss, u) + excess
    low, high = u, torch.maximum(u, target) + 1.0
    while bool((phi(loss, high) < target).any()):
        high = high + 1.0 + excess
    for _ in range(40):
        middle = 0.5 * (low + high)
        above = phi(loss, middle) >= target
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return high
