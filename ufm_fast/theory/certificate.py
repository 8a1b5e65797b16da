"""The optimality certificate: a true lower bound on the global minimum, whatever the point it is computed from.

For a loss convex in the logits and d large enough the problem is convex in Z = H W' (its penalty is mu times a nuclear
norm), and a dual point gives a bound that no (W, H, b) can go below, for any d and any labels. Let g_r be the gradient of
a row's loss in its logits. Any theta in [0, 1] with theta |G| <= mu, G having rows (sqrt(n_r)/N) g_r, gives

    cross-entropy, smoothing   LB = sum_r (n_r/N) Entropy(q_r),               q_r = t_r + theta g_r
    pick-all                   LB = sum_r (n_r/N) M_r Entropy(q_r),           q_r = (1_S + theta g_r) / M_r
    focal (through phi(u), u the log off-target mass, made convex beyond the point where its slope c reaches 1; with a
    bias and up to 1,024 classes also, without that envelope, by rows that follow the bias: `following`)
                               LB = sum_r (n_r/N) [theta c_r Entropy(E_r/s_r) - phi*(theta c_r)]
    squared error              LB = -theta <G, Y> - (N/2) theta^2 |G|_F^2     (G with rows g_r / N, a row a sample; or the best
                               G of all, which is known: `squared_error.mse_bound`)

Without a bias the rows of G may change their signs, since |G| does not. Then no envelope of the focal loss is needed, for
<-S theta G, Z> <= mu |Z|_* with signs S leaves each row its own global minimum over one number, and theta may exceed 1:

    focal, bias none           LB = sum_r (n_r/N) min_{u <= h_r} [phi(u) + theta c_r (h_r - u)],   h_r = Entropy(E_r/s_r)

(u_r >= h_r + sum_k (E_rk/s_r)(z_k - z_y) by Gibbs' inequality, and phi rises.) The others lose
theta^2 |sum_r n_r g_r / N|^2 / (2 lambda_b) for a penalised bias; a free bias needs sum_r n_r g_r = 0 exactly, which
a rank-one flow from the classes with too much mass to those with too little restores. With a frozen factor the problem in
the other is strongly convex, and f - |grad|^2 / (2 lambda) is the bound. (Weak duality; Zhu et al., arXiv 2105.02375, for
the spectral criterion |G| <= mu; the rest is our derivation.) Always in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ufm_fast.backends import residual, squared_error
from ufm_fast.backends.base import Gradients, HeadInput
from ufm_fast.backends.tiled import Chunk, TiledBackend, available_bytes, out_of_memory
from ufm_fast.losses import Focal, SoftmaxLoss
from ufm_fast.point import Point
from ufm_fast.problem import Problem
from ufm_fast.targets import Rows
from ufm_fast.theory.closed_form import bias_penalty
from ufm_fast.theory.focal import Rise, phi
from ufm_fast.theory.following import MOST_CLASSES, balanced_bound, following_bound
from ufm_fast.theory.operator_norm import NormBound, dense_norm, split_norm
from ufm_fast.theory.squared_error import mse_bound

#: Up to this K the norm of the logit gradient is exact, by a dense K x K Gram matrix.
EXACT_CLASSES = 4096
_TIGHT = 1e-10  # relative gap at which no better dual rows are looked for
#: A relative gap up to this counts as certified.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Certificate:
    """``lower_bound`` <= min f: always ('exact'), or but for ``failure_probability`` ('probabilistic'); 'none': no bound.

    ``relative_gap`` = (value - lower_bound) / value, value in float64 at the certified point; ``spectral_ratio`` = |G|/mu,
    1 at a non-trivial global minimum and below 1 where everything has collapsed to zero. ``certified``: the gap is at most
    ``tolerance``. For d < K - 1 (squared error: below the rank of the minimum) the bound holds but is not tight.
    """

    kind: str
    certified: bool
    value: float
    lower_bound: float
    relative_gap: float
    spectral_ratio: float | None
    failure_probability: float = 0.0
    tolerance: float = TOLERANCE

    def summary(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return asdict(self)


def certify(problem: Problem, rows: Rows, point: Point, *, exact_classes: int = EXACT_CLASSES, seed: int = 0) -> Certificate:
    """Certificate at a model point (W: K x d; H: one row for each of ``rows``; b) of ``problem``."""
    x = point.to(dtype=torch.float64)
    counts = rows.counts.to(x.W.device).double()
    head = HeadInput(problem.loss, x.H, x.W, x.b, rows.targets.to(x.W.device), counts / problem.num_samples)
    if problem.freeze is not None:
        return _frozen(problem, head, x, counts)
    value = float(head.row_weight @ TiledBackend().losses(head)) + _penalty(problem, x, counts)
    dual = _SoftmaxDual(problem, head, counts) if isinstance(problem.loss, SoftmaxLoss) else _SquaredDual(problem, head, counts)
    if problem.num_classes <= exact_classes:
        norm = dense_norm(dual.blocks(), problem.num_classes)
    else:
        U, V = _basis(x.W), _basis(x.H * counts.sqrt()[:, None])
        norm = split_norm(dual.forward, dual.adjoint, U, V, seed=seed)
    bound = dual.lower_bound(_theta(norm, problem.mu))
    if isinstance(dual, _SoftmaxDual) and dual.signed and 0.0 < norm.value < problem.mu:
        bound = max(bound, dual.lower_bound(problem.mu / norm.value))
    if isinstance(dual, _SquaredDual) and value - bound > _TIGHT * value and _rank_fits(problem):
        bound = max(bound, mse_bound(problem.counts, problem.lambda_w, problem.lambda_h, bias_penalty(problem)))
    if isinstance(problem.loss, Focal) and problem.bias != "none":
        bound = max(bound, _biased_focal(problem, rows, x, value, max(bound, 0.0)))
    kind = "none" if not math.isfinite(bound) else "exact" if norm.failure_probability == 0 else "probabilistic"
    return _finish(kind, value, bound, norm.value / problem.mu, norm.failure_probability)


def _rank_fits(problem: Problem) -> bool:
    """Whether the dimensions may hold the squared error's minimiser, or its bound costs nothing: it has no bias."""
    return problem.bias == "none" or problem.dim >= int((problem.counts > 0).sum()) - 1


def _biased_focal(problem: Problem, rows: Rows, x: Point, value: float, known: float) -> float:
    """What the rows that follow the bias prove (`following`), where the convex envelope's bound ``known`` is not tight."""
    assert isinstance(problem.loss, Focal)
    counts = problem.counts
    if bool((counts == counts[0]).all()):
        known = max(known, balanced_bound(problem.loss, len(counts), int(counts[0]), problem.mu))
    return following_bound(problem, rows, x, value, known=known) if len(counts) <= MOST_CLASSES else known


def held_bytes(rows: int, classes: int, free_bytes: int) -> int:
    """Bytes of the scaled gradient that a probabilistic certificate holds: up to a quarter of the free memory, else none."""
    size = 8 * rows * classes
    return size if size <= free_bytes // 4 else 0


def _theta(norm: NormBound, mu: float) -> float:
    return 1.0 if norm.value <= mu else mu / norm.value


def _finish(kind: str, value: float, bound: float, ratio: float | None, failure: float = 0.0) -> Certificate:
    # The penalties and data terms are non-negative, so zero is a lower bound too.
    # Rounding may put the bound above the value by an eps: the value is no less than the minimum either.
    bound = min(max(0.0, bound), value) if kind != "none" else bound
    gap = (value - bound) / value if value > 0 else 0.0
    return Certificate(kind, kind != "none" and gap <= TOLERANCE, value, bound, gap, ratio, failure)


def _penalty(problem: Problem, x: Point, counts: Tensor) -> float:
    total = problem.lambda_w * x.W.square().sum() + problem.lambda_h * (counts @ x.H.square().sum(1))
    if x.b is not None:
        total = total + problem.lambda_b * x.b.square().sum()
    return 0.5 * float(total)


def _basis(X: Tensor) -> Tensor:
    """Orthonormal basis of the column span of X (float64), by the eigenvectors of its Gram matrix and a clean-up QR."""
    values, vectors = torch.linalg.eigh(X.T @ X)
    keep = values > 1e-20 * values[-1].clamp_min(1e-300)
    if float(values[-1]) == 0.0:
        return X[:, :0]
    basis: Tensor = torch.linalg.qr(X @ (vectors[:, keep] / values[keep].sqrt())).Q
    return basis


def _frozen(problem: Problem, head: HeadInput, x: Point, counts: Tensor) -> Certificate:
    """Strong convexity in the factor that is free: f* >= f - |grad_H|^2/(2 lambda) with each row's own lambda."""
    features = None if problem.freeze == "h" else x.H * (problem.lambda_h * counts)[:, None]
    weight = None if problem.freeze == "w" else x.W * problem.lambda_w
    bias = None if x.b is None else x.b * problem.lambda_b
    data = TiledBackend().head(head, Gradients(features, weight, bias)).value
    value = float(data) + _penalty(problem, x, counts)
    if not problem.loss.convex or problem.bias == "free":
        return _finish("none", value, -math.inf, None)
    drop = 0.0
    if features is not None:
        drop += float((features.square().sum(1) / (problem.lambda_h * counts)).sum()) / 2
    if weight is not None:
        drop += float(weight.square().sum()) / (2 * problem.lambda_w)
    if bias is not None:
        drop += float(bias.square().sum()) / (2 * problem.lambda_b)
    return _finish("exact", value, value - drop, None)


class _Dual:
    """What both kinds of loss share: the scaled gradient's products, from the per-sample gradient g_r of each row."""

    def __init__(self, problem: Problem, head: HeadInput, counts: Tensor) -> None:
        self.problem, self.head, self.counts = problem, head, counts
        self.N = problem.num_samples
        self.root = counts.sqrt() / self.N
        self.backend = TiledBackend()

    def bias_drop(self, column_sum: Tensor) -> float:
        """What a penalised bias takes off the bound at theta = 1; ``column_sum`` = sum_r n_r g_r / N, (K,)."""
        if self.problem.bias != "penalised":
            return 0.0
        return float(column_sum.square().sum()) / (2 * self.problem.lambda_b)


class _SoftmaxDual(_Dual):
    def __init__(self, problem: Problem, head: HeadInput, counts: Tensor) -> None:
        super().__init__(problem, head, counts)
        assert isinstance(problem.loss, SoftmaxLoss)
        self.loss = problem.loss
        K = head.weight.shape[0]
        self.column_sum = torch.zeros(K, dtype=torch.float64, device=head.weight.device)
        self.out_flow = torch.zeros_like(self.column_sum)  # taken from each target entry of a class, per sample
        self.in_flow = torch.zeros_like(self.column_sum)  # and shared out over the classes by these shares
        self.level_flow = torch.zeros_like(self.column_sum)  # taken from each row alike
        self.signed = isinstance(self.loss, Focal) and problem.bias == "none"
        self.limit = math.inf if self.signed else 1.0
        if isinstance(self.loss, Focal):
            self.rise = Rise(self.loss, None if self.signed else 1.0)
        if problem.bias != "none":
            for c, G in self._gradients():
                self.column_sum += self.head.row_weight[c.start : c.stop] @ G
        if problem.bias == "free":
            self._balance()

    def _balance(self) -> None:
        surplus, deficit = self.column_sum.clamp_min(0.0), (-self.column_sum).clamp_min(0.0)
        if float(surplus.sum()) == 0.0:
            return
        counts = self.problem.counts.to(surplus.device)
        # An empty class has no target entries; smoothing has put eps / K everywhere, so every row gives the same.
        self.level_flow = torch.where(counts == 0, surplus, 0.0)
        level = 1.0 - self.loss.smoothing * (surplus.numel() - 1) / surplus.numel()
        # sum_r n_r g_r / N must vanish; the two sides differ by rounding, so the shares are of the surplus itself.
        self.out_flow = torch.where(counts == 0, 0.0, surplus * self.N / counts.clamp_min(1))
        # Rounding may leave every sum positive at an optimum: then any shares do.
        short = float(deficit.sum()) > 0.0
        self.in_flow = deficit / deficit.sum() if short else torch.full_like(deficit, 1.0 / deficit.numel())
        for c, G in self._gradients():
            # theta may not push a target's probability below zero: 1_S + theta g >= 0 on targets, ``level`` being 1_S.
            worst = float((-G[c.entry_row, c.entry_class]).max())
            self.limit = min(self.limit, level / max(worst, level))
            if bool(self.level_flow.any()):
                floor = self.loss.smoothing / surplus.numel()
                self.limit = min(self.limit, floor / max(float(-G[:, counts == 0].min()), floor))

    def _row_factor(self, c: Chunk) -> tuple[Tensor, Tensor]:
        """(c_r / s'_r, c_r): the flow out of the target, c_r = p but for focal, and what multiplies E to share it."""
        slope = c.p * c.M if self.loss.multi_label else c.p * self.loss.weight(c.l, c.p)
        flow = slope.clamp_max(1.0) if isinstance(self.loss, Focal) and not self.signed else slope
        return flow / c.mass, flow

    def _gradients(self) -> Iterator[tuple[Chunk, Tensor]]:
        """Chunks with the dense per-sample gradient g (C x K), the balancing flow included."""
        K = self.head.weight.shape[0]
        for c in self.backend.sweep(self.head):
            factor, flow = self._row_factor(c)
            G = c.E.T * factor[:, None]
            if self.loss.smoothing:
                G -= self.loss.smoothing / K
            entry = -flow[c.entry_row] + self.loss.smoothing * (K - 1) / K
            if self.loss.multi_label:
                # (1 - p) M share - 1, whose two parts keep their digits where one target has nearly all the mass
                whole = c.M[c.entry_row] * c.entry_share
                entry = (whole - 1.0) - c.p[c.entry_row] * whole
            taken = self.out_flow[c.entry_class]
            G[c.entry_row, c.entry_class] = entry - taken
            if self.problem.bias == "free":
                G -= self.level_flow
                total = torch.zeros_like(c.p).index_add_(0, c.entry_row, taken).add_(self.level_flow.sum())
                G.addr_(total, self.in_flow)
            yield c, G

    def blocks(self) -> Iterator[Tensor]:
        for c, G in self._gradients():
            yield G * self.root[c.start : c.stop, None]

    @cached_property
    def _held(self) -> Tensor | None:
        """The scaled gradient (R x K) where there is room for it: more than a hundred products with it follow."""
        R, K = self.root.numel(), self.head.weight.shape[0]
        if not held_bytes(R, K, available_bytes(self.root.device)):
            return None
        try:
            held = self.root.new_empty(R, K)
        except RuntimeError as error:  # what was free a moment ago is not: sweep instead
            if not out_of_memory(error):
                raise
            return None
        for c, G in self._gradients():
            torch.mul(G, self.root[c.start : c.stop, None], out=held[c.start : c.stop])
        return held

    def forward(self, X: Tensor) -> Tensor:
        if self._held is not None:
            return self._held @ X
        return torch.cat([(G * self.root[c.start : c.stop, None]) @ X for c, G in self._gradients()])

    def adjoint(self, Y: Tensor) -> Tensor:
        if self._held is not None:
            return self._held.T @ Y
        total = torch.zeros(self.head.weight.shape[0], Y.shape[1], dtype=Y.dtype, device=Y.device)
        for c, G in self._gradients():
            total.addmm_(G.T, Y[c.start : c.stop] * self.root[c.start : c.stop, None])
        return total

    def lower_bound(self, theta: float) -> float:
        theta = min(theta, self.limit)
        total = 0.0
        for c, G in self._gradients():
            weight = self.head.row_weight[c.start : c.stop]
            rows = self._focal(c, G, theta) if isinstance(self.loss, Focal) else self._entropy(c, G, theta)
            total += float(weight @ rows)
        return total - theta**2 * self.bias_drop(self.column_sum)

    def _entropy(self, c: Chunk, G: Tensor, theta: float) -> Tensor:
        """M Entropy(q) of each row."""
        K = G.shape[1]
        g = G[c.entry_row, c.entry_class]
        G.mul_((theta / c.M)[:, None])
        if self.loss.smoothing:
            G += self.loss.smoothing / K
        G[c.entry_row, c.entry_class] = 0.0
        rows = torch.special.entr(G.clamp_min_(0.0)).sum(1)
        if self.loss.multi_label:
            # -q log q with q = (1 + x) / M: near q = 1 the logarithm keeps its digits.
            x, M = (theta * g).clamp_min(-1.0), c.M[c.entry_row]
            own = torch.where(x > -1.0, (1.0 + x) / M * (M.log() - torch.log1p(x)), 0.0)
        else:  # 1 - q_y is what is small: keep its digits
            x = (self.loss.smoothing * (K - 1) / K - theta * g).clamp(0.0, 1.0)
            own = -torch.xlogy(1.0 - x, 1.0 - x)
            own = torch.where(x < 0.5, -(1.0 - x) * torch.log1p(-x), own)
        total: Tensor = rows.index_add(0, c.entry_row, own)
        return c.M * total

    def _focal(self, c: Chunk, G: Tensor, theta: float) -> Tensor:
        assert isinstance(self.loss, Focal)
        flow = -G[c.entry_row, c.entry_class]
        G[c.entry_row, c.entry_class] = 0.0
        share = G.div_(flow.clamp_min(1e-300)[:, None])
        entropy = torch.special.entr(share).sum(1)
        if self.signed:
            slope = (theta * flow).clamp_min(1e-300)
            # phi(u) - slope u falls, rises from its stationary point on, and may fall again up to the end u = entropy.
            return torch.minimum(*self.rise.below(slope, entropy))
        slope = (theta * flow).clamp(1e-300, 1.0)
        u = self.rise.invert(slope)
        value: Tensor = slope * entropy - slope * u + phi(self.loss, u)
        return value


class _SquaredDual(_Dual):
    """g_r = W h_r + b - e_y; with a free bias, which no bound depends on, b is the one that makes their mean vanish."""

    def __init__(self, problem: Problem, head: HeadInput, counts: Tensor) -> None:
        if problem.bias == "free":
            for _ in range(2):  # the second takes what rounding left of the first
                assert head.bias is not None
                head = replace(head, bias=head.bias - squared_error.residual_sum(head))
        super().__init__(problem, head, counts)
        self.column_sum = squared_error.residual_sum(head)
        self.shift = self.column_sum if problem.bias == "free" else torch.zeros_like(self.column_sum)

    def blocks(self) -> Iterator[Tensor]:
        for part, G in residual.blocks(self.head, exact=True):
            yield G.sub_(self.shift).mul_(self.root[part, None])

    def forward(self, X: Tensor) -> Tensor:
        unit = HeadInput(self.head.loss, *self._parts(), self.head.targets, self.root)
        product = self.backend.logit_products(unit, X, None)[0]
        assert product is not None
        return product - torch.outer(self.root, (self.shift @ X).reshape(-1))

    def adjoint(self, Y: Tensor) -> Tensor:
        unit = HeadInput(self.head.loss, *self._parts(), self.head.targets, self.root)
        product = self.backend.logit_products(unit, None, Y)[1]
        assert product is not None
        return product - torch.outer(self.shift, self.root @ Y)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.head.features, self.head.weight, self.head.bias

    def lower_bound(self, theta: float) -> float:
        own = squared_error.own_residual(self.head) - self.shift[self.head.targets.indices]
        along = float(self.head.row_weight @ own)  # <G, Y>
        squares = float(self.head.row_weight @ self.backend.losses(self.head)) - 0.5 * float(self.shift.square().sum())
        quadratic = squares + self.bias_drop(self.column_sum)
        # The bound is a concave parabola in theta: its top, where |G| allows.
        best = -along / (2 * quadratic) if quadratic > 0 else theta
        theta = min(theta, max(best, 0.0))
        return -theta * along - theta**2 * quadratic
