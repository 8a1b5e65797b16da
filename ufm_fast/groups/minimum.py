"""The minimum of the unconstrained features model over grouped classes, exact at any number of
classes.

Classes of equal count are interchangeable, the loss is convex in the logits, and mu |Z diag(sqrt
n)|_* is what the penalties cost; averaging a minimiser over permutations within groups raises
neither. So where d holds it there is a minimiser whose logits are the gap a_g of a target to the
other classes of its group, and the mean logit x_gh of each group of classes, G + G^2 numbers in
all. With w_g = n_g K_g / N and T_gh = sqrt(n_g K_g K_h) x_gh it minimises

    sum_g w_g loss_g + mu { sum_g (K_g - 1) sqrt(n_g) a_g + |T|_* } + lambda_b/2 sum_g K_g b_g^2.

W and H follow from the singular values: sqrt(n_g) a_g on zero-sum vectors of group g, (K_g - 1)
times, and those of T on vectors that are constant on groups. The squared error's are a
soft-thresholding (`theory.squared_error`). Focal and pick-all losses are refused: the former is not
convex, the latter's rows are sets of classes. Our derivation.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ufm_fast.class_groups import Array, ClassGroups
from ufm_fast.errors import InputError
from ufm_fast.groups.path import GroupPath, Reduced
from ufm_fast.groups.softmax import SoftmaxTerm
from ufm_fast.groups.squares import reduced_squares
from ufm_fast.losses import CrossEntropy, Loss, SquaredError, registered_name
from ufm_fast.theory.arguments import (
    NO_BIAS,
    check_bias_penalty,
    check_integer,
    check_positive,
    nuclear_coefficient,
)
from ufm_fast.theory.certificates.base import Certificate, Proof, judge
from ufm_fast.theory.frames import GroupedLogits, Parameters, scales, simplex_frame

#: Losses that groups reduce, convex and alike for all classes; every other is refused.
GROUPABLE = ("ce", "mse")
_REFUSED = {
    "pick-all": "its rows are sets of classes, not classes of equal count",
    "focal": "it is not convex in the logits, so the average over classes of equal count may lie "
    "above the minimum",
}
TOLERANCE = 1e-10  # the relative gap that a solve aims at


@dataclass(frozen=True, eq=False)
class GroupMinimum:
    """A minimiser in the numbers of its groups; arrays (G,) or (G, G) are in ascending order of
    count.

    ``gaps``: a_g, by how much a target's logit stands above the other classes of its group; 0: the
    group has collapsed to a point. ``left``, ``sigma``, ``right``: T = left diag(sigma) right',
    rows for the samples' groups and columns for the outputs'. ``bias``: one number a group, or
    None. ``certificate``: exact. ``seconds``, ``steps``: what the solve took.
    """

    groups: ClassGroups
    loss: Loss
    lambda_w: float
    lambda_h: float
    lambda_b: float
    value: float
    data_value: float
    gaps: Array
    left: Array
    sigma: Array
    right: Array
    bias: Array | None
    certificate: Certificate
    steps: int
    seconds: float
    converged: bool

    @property
    def collapsed(self) -> Any:
        """(G,) bool: the classes of the group share one classifier row and one class mean."""
        return (self.gaps == 0) & (self.groups.sizes > 1)

    @property
    def thresholds(self) -> Array:
        """(G,): the mu from which on each group of at least two classes collapses, (1 - smoothing)
        sqrt(n_g)/N.
        """
        thresholds: Array = (
            (1 - self.loss.smoothing) * np.sqrt(self.groups.counts) / self.groups.samples
        )
        return thresholds

    @property
    def rank(self) -> int:
        """Rank of the logits: the least d that holds this minimiser."""
        apart = self.gaps > 0
        return int(((self.groups.sizes - 1) * apart).sum()) + int((self.sigma > 0).sum())

    @cached_property
    def means(self) -> Array:
        """(G, G): mean logit of each group of classes for samples of each group, without the bias;
        0 for empty groups.
        """
        counts, sizes = self.groups.counts, self.groups.sizes
        units = np.sqrt(np.outer(counts * sizes, sizes))
        T = (self.left * self.sigma) @ self.right.T
        means: Array = np.divide(T, units, out=np.zeros_like(T), where=units > 0)
        return means

    @property
    def target_logits(self) -> Array:
        """(G,): logit of a sample's own class, bias included."""
        target: Array = self._scores.diagonal() + self.gaps * (1 - 1 / self.groups.sizes)
        return target

    @property
    def logits(self) -> Array:
        """(G, G): logit of another class of each group (columns), bias included; nan on the
        diagonal of groups of one.
        """
        scores: Array = self._scores.copy()
        own = np.where(
            self.groups.sizes > 1, scores.diagonal() - self.gaps / self.groups.sizes, np.nan
        )
        np.fill_diagonal(scores, own)
        return scores

    @property
    def _scores(self) -> Array:
        return self.means if self.bias is None else self.means + self.bias

    @property
    def margins(self) -> Array:
        """(G,): target's logit minus the largest other one; nan for groups without samples."""
        margins: Array = self.target_logits - np.where(
            np.isnan(self.logits), -np.inf, self.logits
        ).max(1)
        margins[self.groups.counts == 0] = np.nan
        return margins

    @property
    def losses(self) -> Array:
        """(G,): loss of a sample of each group; nan for groups without samples."""
        values: Array
        target, others = self.target_logits, self.logits
        sizes = np.broadcast_to(self.groups.sizes, others.shape) - np.eye(len(target))
        if isinstance(self.loss, SquaredError):
            values = ((target - 1) ** 2 + np.nansum(sizes * others**2, axis=1)) / 2
        else:
            mass = np.nansum(sizes * np.exp(others - target[:, None]), axis=1)
            lean = target - (np.nansum(sizes * others, axis=1) + target) / self.groups.classes
            values = np.log1p(mass) + self.loss.smoothing * lean
        values[self.groups.counts == 0] = np.nan
        return values

    def lifted(self, dim: int) -> Parameters:
        """(W (K x d), class means (K x d), b (K,) or None), float64: a minimiser of the whole
        problem, in the classes' order.

        Errors: InputError for a dim below ``rank``; MemoryError of torch where K x d numbers do not
        fit.
        """
        if check_integer("dim", dim, 1) < self.rank:
            raise InputError(
                f"dim must be at least {self.rank}, the rank of the minimiser, got {dim}; give a "
                f"larger dim"
            )
        kept = self.sigma > 0
        logits = GroupedLogits(
            dim=dim,
            counts=self.groups.expanded(),
            within=self._within.tolist(),
            shared=self.sigma[kept].tolist(),
            left=torch.from_numpy(self.right[:, kept]),
            right=torch.from_numpy(self.left[:, kept]),
            bias=None if self.bias is None else self.bias.tolist(),
            lambda_w=self.lambda_w,
            lambda_h=self.lambda_h,
        )
        return logits.point()

    def class_vectors(self, classes: Any) -> tuple[Tensor, Tensor]:
        """Rows of W and class means of the chosen classes, in common coordinates of as few
        dimensions as they need.

        Inner products, norms and angles among them are those of every minimiser. Errors: InputError
        for a number outside [0, K).
        """
        group, place = self.groups.locate(classes)
        kept = self.sigma > 0
        unit = np.sqrt(self.sigma[kept]) / np.sqrt(self.groups.sizes)[:, None]
        W, H = ((vectors[:, kept] * unit)[group] for vectors in (self.right, self.left))
        for g in np.unique(group[self.gaps[group] > 0]):
            members, index = np.unique(place[group == g], return_inverse=True)
            block = np.zeros((len(group), len(members)))
            block[group == g] = (
                math.sqrt(self._within[g]) * _zero_sum(len(members), self.groups.sizes[g])[index]
            )
            W, H = np.hstack([W, block]), np.hstack([H, block])
        to_classifier, to_features = scales(self.lambda_w, self.lambda_h)
        roots = np.sqrt(self.groups.counts)[group][:, None]
        features = np.divide(H, roots, out=np.zeros_like(H), where=roots > 0)
        return torch.from_numpy(to_classifier * W), torch.from_numpy(to_features * features)

    @property
    def _within(self) -> Array:
        """sqrt(n_g) a_g, the singular values on zero-sum vectors."""
        within: Array = np.sqrt(self.groups.counts) * self.gaps
        return within

    def summary(self) -> dict[str, Any]:
        """The scalar results as a JSON-ready dictionary."""
        return {
            "value": self.value,
            "data_value": self.data_value,
            "classes": self.groups.classes,
            "samples": self.groups.samples,
            "groups": len(self.gaps),
            "collapsed_groups": int(self.collapsed.sum()),
            "rank": self.rank,
            "steps": self.steps,
            "seconds": self.seconds,
            "certificate": self.certificate.summary(),
        }


def _zero_sum(members: int, size: float) -> Array:
    """m x m rows with the Gram matrix I - 1 1'/size: m of a group's zero-sum unit vectors, in their
    own coordinates.
    """
    frame: Array = simplex_frame(members, members).numpy().copy()
    frame[:, -1] = math.sqrt(max(1 / members - 1 / size, 0.0))
    return frame


def check_groupable(loss: Loss) -> None:
    """Errors: InputError for a loss that groups do not reduce, with the reason."""
    name = registered_name(loss)
    if name in GROUPABLE:
        return
    reason = _REFUSED.get(name, "it is known to be exact for " + " and ".join(GROUPABLE) + " alone")
    raise InputError(
        f"reduce groups does not serve the loss {loss.name}: {reason}; use reduce classes"
    )


def group_minimum(
    groups: ClassGroups,
    lambda_w: float,
    lambda_h: float,
    *,
    loss: Loss | None = None,
    lambda_b: float = NO_BIAS,
    tol: float = TOLERANCE,
) -> GroupMinimum:
    """The minimum over all W, H and b of any dimension that holds it, to a certified relative gap
    of ``tol`` or of rounding.

    ``loss``: CrossEntropy (with its smoothing; the default) or SquaredError. ``lambda_b``: 0 is a
    free bias, math.inf none. Time O(G^3), memory O(G^2), whatever K. Errors: InputError for other
    losses, penalties that are not positive, or a free bias of cross-entropy without smoothing where
    a class is empty.
    """
    began = time.perf_counter()
    loss = CrossEntropy() if loss is None else loss
    check_groupable(loss)
    mu = nuclear_coefficient(
        check_positive("lambda_w", lambda_w), check_positive("lambda_h", lambda_h)
    )
    check_bias_penalty(lambda_b)
    if isinstance(loss, SquaredError):
        found = reduced_squares(groups, mu, lambda_b)
    else:
        if lambda_b == 0 and not loss.smoothing and groups.counts[0] == 0:
            raise InputError(
                "a free bias has no minimiser when a class is empty; give lambda_b > 0 or drop "
                "the class"
            )
        found = GroupPath(SoftmaxTerm(groups, mu, loss.smoothing, lambda_b)).minimise(tol)
    return _with_certificate(
        groups, loss, (lambda_w, lambda_h, lambda_b), found, time.perf_counter() - began
    )


def _with_certificate(
    groups: ClassGroups,
    loss: Loss,
    penalties: tuple[float, float, float],
    found: Reduced,
    seconds: float,
) -> GroupMinimum:
    bias = found.bias if math.isfinite(penalties[2]) else None
    certificate = judge(found.value, Proof(found.bound, found.spectral_ratio))
    return GroupMinimum(
        groups,
        loss,
        *penalties,
        found.value,
        found.data_value,
        found.gaps,
        found.left,
        found.sigma,
        found.right,
        bias,
        certificate,
        found.steps,
        seconds,
        found.converged,
    )
