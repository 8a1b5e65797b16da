"""Neural-collapse metrics for any number of classes, without N x K or K x K arrays.

`collect` gives all of them as a flat dictionary; `METRICS` describes each. The functions behind it
take a `ClassStatistics` and views of matrices: `ClassStatistics.centred_means`,
`RowMatrix.of(weight).raw`.
"""

from ufm_fast.metrics.catalogue import METRICS, Metric
from ufm_fast.metrics.collapse import (
    nc1_pinv,
    nc1_quotient,
    nc1_trace,
    nc2,
    nc3,
    nc3_papyan,
    nc_bias,
)
from ufm_fast.metrics.collect import collect, comparable, penalties
from ufm_fast.metrics.geometry import (
    balancedness,
    cosine_moments,
    effective_rank,
    norm_variation,
    participation_ratio,
    self_duality,
    stable_rank,
)
from ufm_fast.metrics.imbalance import IMBALANCE, collapsed_groups, group_cosines
from ufm_fast.metrics.pairwise import Estimate, Sampling, cdnv, equiangularity, nc4
from ufm_fast.metrics.regression import REGRESSION
from ufm_fast.metrics.rows import RowMatrix, View
from ufm_fast.metrics.statistics import ClassMoments, ClassStatistics
from ufm_fast.metrics.streaming import StreamingStatistics

#: Every number in words, for tables.
DESCRIPTIONS = (
    {name: metric.description for name, metric in METRICS.items()} | REGRESSION | IMBALANCE
)

__all__ = [
    "DESCRIPTIONS",
    "METRICS",
    "ClassMoments",
    "ClassStatistics",
    "Estimate",
    "Metric",
    "RowMatrix",
    "Sampling",
    "StreamingStatistics",
    "View",
    "balancedness",
    "cdnv",
    "collapsed_groups",
    "collect",
    "comparable",
    "cosine_moments",
    "effective_rank",
    "equiangularity",
    "group_cosines",
    "nc1_pinv",
    "nc1_quotient",
    "nc1_trace",
    "nc2",
    "nc3",
    "nc3_papyan",
    "nc4",
    "nc_bias",
    "norm_variation",
    "participation_ratio",
    "penalties",
    "self_duality",
    "stable_rank",
]
