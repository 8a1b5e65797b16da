"""One question, one answer: the minimum that theory gives for a problem, looked up by its kind. No
row means none.
"""

from __future__ import annotations

from collections.abc import Callable

from ufm_fast.problem import Problem
from ufm_fast.theory.forms.base import ClosedForm
from ufm_fast.theory.forms.dense import target_vectors
from ufm_fast.theory.forms.layers import spectral_mse
from ufm_fast.theory.forms.softmax import cross_entropy, focal, pick_all
from ufm_fast.theory.forms.spheres import angular_ce, sphere_ce
from ufm_fast.theory.forms.squares import bias_free_mse, biased_mse
from ufm_fast.theory.tables import (
    Serves,
    adjusted_sphere,
    angular_sphere,
    layered,
    lookup,
    plain,
    sphere,
)

#: Which formula serves which kind of problem. A form may still know only some counts and
#: dimensions: then it is None.
FORMS: list[tuple[Serves, Callable[[Problem], ClosedForm | None]]] = [
    (plain("ce"), cross_entropy),
    (plain("focal"), focal),
    (plain("pick-all"), pick_all),
    (plain("mse", bias=("none",)), bias_free_mse),
    (plain("mse", bias=("penalised", "free")), biased_mse),
    (layered("mse", bias=("none", "free")), spectral_mse),
    (plain("mse dense", bias=("none", "free")), target_vectors),
    (layered("mse dense", bias=("none", "free")), target_vectors),
    (sphere, sphere_ce),
    (adjusted_sphere, sphere_ce),
    (angular_sphere, angular_ce),
]


def closed_form(problem: Problem) -> ClosedForm | None:
    """The minimum of `problem` if a formula covers it, else None.

    Covered: cross-entropy (with smoothing) for balanced classes, two distinct counts, and any
    counts where all collapses, and balanced on spheres (one margin for all too, in the cosine or in
    the angle); focal loss for balanced classes (with a bias, where that is proved:
    `focal_minimum`); squared error without a bias or with a free one always, also with linear
    layers, with a penalised one for balanced classes or where d is no less than the minimiser's
    rank; squared error to target vectors with linear layers or one, and no bias or a free one;
    pick-all where, for each size, all sets are equally frequent. Every kind of bias. Softmax losses
    need d >= K-1 or a minimiser of rank <= d. Nothing is covered with a frozen factor, nor any loss
    that is not exactly one of these.
    """
    form = lookup(FORMS, problem.kind)
    return None if form is None else form(problem)
