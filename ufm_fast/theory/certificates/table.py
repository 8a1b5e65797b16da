"""The optimality certificate: a true lower bound on the minimum, whatever the point it is computed
from.

For a loss convex in the logits the problem without its rank constraint is convex in Z = H W' (its
penalty is mu times a nuclear norm), and a dual point gives a bound that no (W, H, b) can go below,
for any d and any labels. Let g_r be the gradient of a row's loss in its logits. Any theta in [0, 1]
with theta |G| <= mu, G having rows (sqrt(n_r)/N) g_r, gives a bound; each loss has its own
(`softmax`, `focal`, `squares`). A penalised bias takes theta^2 |sum_r n_r g_r / N|^2 / (2 lambda_b)
off it; a free one needs sum_r n_r g_r = 0 exactly. With a frozen factor the problem in the other is
strongly convex (`frozen`). Weak duality; Zhu et al., arXiv 2105.02375, for the spectral criterion
|G| <= mu; the rest is our derivation. Always in float64. With layers the squared error's minimum is
known, and other bounds take the price that any layers leave to the nuclear norm (`deep.chord`):
they hold for every depth and activation, and are not tight.

A certifier proves nothing of a kind of problem that it was not derived for: cross-entropy's bound
of another softmax loss can lie above that loss's value. So CERTIFIERS is looked up by the problem's
kind, and a kind without a row has the certificate ``none``. A bound above the value by more than
rounding is no proof either, but a fault, here or in the value: it is never clipped to the value,
but said.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ufm_fast.geometries import GEOMETRIES
from ufm_fast.point import Point
from ufm_fast.problem import Problem
from ufm_fast.targets import Rows
from ufm_fast.theory.certificates.base import (
    EXACT_CLASSES,
    Candidate,
    Certificate,
    Proof,
    judge,
    without,
)
from ufm_fast.theory.certificates.focal import biased_focal, enveloped_focal, unbiased_focal
from ufm_fast.theory.certificates.frozen import frozen
from ufm_fast.theory.certificates.softmax import softmax
from ufm_fast.theory.certificates.spheres import angular_spheres, spheres
from ufm_fast.theory.certificates.spread import fits
from ufm_fast.theory.certificates.squares import (
    chord_squares,
    known_vectors,
    layered_squares,
    squares,
    vector_squares,
)
from ufm_fast.theory.certificates.weighted import weighted_sets
from ufm_fast.theory.tables import (
    Serves,
    adjusted,
    adjusted_sphere,
    angular_sphere,
    in_words,
    layered,
    lookup,
    plain,
    sphere,
)

LAYERS = ("linear", "relu")
#: Losses that are convex in the logits, and so in W and in H.
CONVEX = (
    *("ce", *adjusted("ce"), "mse", "mse scaled", "mse dense"),
    *("pick-all", *adjusted("pick-all"), "pick-all weighted", *adjusted("pick-all weighted")),
)

#: Which certifier serves which kind of problem.
CERTIFIERS: list[tuple[Serves, Callable[[Candidate], Proof]]] = [
    (plain("ce", "pick-all", *adjusted("ce", "pick-all")), softmax),
    (plain("focal", *adjusted("focal"), bias=("none",)), unbiased_focal),
    (plain("focal", bias=("penalised", "free")), biased_focal),
    (plain(*adjusted("focal"), bias=("penalised", "free")), enveloped_focal),
    (plain("pick-all weighted", *adjusted("pick-all weighted")), weighted_sets),
    (plain("mse"), squares),
    (plain("mse dense"), vector_squares),
    (plain("mse scaled"), chord_squares),
    (sphere, spheres),
    (adjusted_sphere, spheres),
    (angular_sphere, angular_spheres),
    (plain(*CONVEX, bias=("none", "penalised"), frozen=("w", "h")), frozen),
    (layered("mse", bias=("none", "free")), layered_squares),
    (layered("mse dense", bias=("none", "free")), known_vectors),
    (layered("mse", "mse dense", bias=("penalised",)), chord_squares),
    (layered("mse", "mse dense", trunks=("relu",)), chord_squares),
    (layered("mse scaled", trunks=LAYERS), chord_squares),
    (layered("ce", "pick-all", *adjusted("ce", "pick-all"), trunks=LAYERS), softmax),
    (layered("focal", *adjusted("focal"), trunks=LAYERS, bias=("none",)), unbiased_focal),
    (
        layered("pick-all weighted", *adjusted("pick-all weighted"), trunks=LAYERS),
        weighted_sets,
    ),
]


def certify(
    problem: Problem, rows: Rows, point: Point, *, exact_classes: int = EXACT_CLASSES, seed: int = 0
) -> Certificate:
    """Certificate at a model point (W: K x d; H: one row for each of ``rows``; b) of ``problem``.

    On several ranks the point is of this one's blocks, ``rows`` are all, and each rank has the same
    certificate. Up to ``exact_classes`` the norm of the logit gradient is exact, beyond it is
    bounded by Lanczos from ``seed``.
    """
    certifier = lookup(CERTIFIERS, problem.kind)
    if certifier is None:
        return without(f"no certificate is known for {in_words(problem.kind, problem.loss)}")
    if point.layout is not None:
        if not fits(point.layout, problem.num_classes, point.W.shape[1], point.W.device):
            return without(
                "a rank has no room for all of W beside its blocks; resume the run on ranks with "
                "more memory"
            )
        rows = rows.part(point.layout.row_part)
    exactly = point.to(dtype=torch.float64)
    if point.W.dtype != torch.float64:  # lengths that are rounded may take f below its minimum
        exactly = GEOMETRIES[problem.constraint]().project(exactly)
    candidate = Candidate(problem, rows, exactly, exact_classes, seed)
    return judge(candidate.value, certifier(candidate))
