"""Exact minima of classes in groups of equal counts, at any number of classes."""

from ufm_fast.class_groups import ClassGroups
from ufm_fast.groups.blocks import Blocks
from ufm_fast.groups.geometry import Geometry
from ufm_fast.groups.metrics import GROUP_METRICS, group_metrics
from ufm_fast.groups.minimum import GroupMinimum, check_groupable, group_minimum

__all__ = [
    "GROUP_METRICS",
    "Blocks",
    "ClassGroups",
    "Geometry",
    "GroupMinimum",
    "check_groupable",
    "group_metrics",
    "group_minimum",
]
