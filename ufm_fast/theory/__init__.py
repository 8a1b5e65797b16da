"""Closed-form minima, thresholds and minimisers of the unconstrained features model."""

from ufm_fast.theory.arguments import NO_BIAS
from ufm_fast.theory.forms import FORMS, ClosedForm, closed_form
from ufm_fast.theory.frames import simplex_frame
from ufm_fast.theory.imbalanced import (
    collapsed_ce,
    seli_distance,
    seli_logit_distance,
    seli_spectrum,
)
from ufm_fast.theory.multilabel import PickAllMinimum, pick_all_minimum
from ufm_fast.theory.softmax import (
    angular_ce_minimum,
    ce_gap,
    ce_minimum,
    contrastive_minimum,
    focal_gap,
    focal_minimum,
    layer_peeled_ce_minimum,
    nonnegative_ce_minimum,
    normalised_ce_minimum,
)
from ufm_fast.theory.squared_error import (
    balanced_mse_minimum,
    biased_mse_minimum,
    kept_classes,
    mse_minimum,
    rescaled_mse_minimum,
)
from ufm_fast.theory.thresholds import (
    collapse_level,
    collapse_penalty,
    collapsed_classes,
    layer_peeled_collapse_ratio,
    majority_count_at_collapse,
    simplex_bias_penalty,
)
from ufm_fast.theory.two_groups import TwoGroupMinimum, layer_peeled_two_groups, two_group_ce

__all__ = [
    "FORMS",
    "NO_BIAS",
    "ClosedForm",
    "PickAllMinimum",
    "TwoGroupMinimum",
    "angular_ce_minimum",
    "balanced_mse_minimum",
    "biased_mse_minimum",
    "ce_gap",
    "ce_minimum",
    "closed_form",
    "collapse_level",
    "collapse_penalty",
    "collapsed_ce",
    "collapsed_classes",
    "contrastive_minimum",
    "focal_gap",
    "focal_minimum",
    "kept_classes",
    "layer_peeled_ce_minimum",
    "layer_peeled_collapse_ratio",
    "layer_peeled_two_groups",
    "majority_count_at_collapse",
    "mse_minimum",
    "nonnegative_ce_minimum",
    "normalised_ce_minimum",
    "pick_all_minimum",
    "rescaled_mse_minimum",
    "seli_distance",
    "seli_logit_distance",
    "seli_spectrum",
    "simplex_bias_penalty",
    "simplex_frame",
    "two_group_ce",
]
