"""The table of metrics: a row for each number. Tests, documentation and the command line iterate
over it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ufm_fast.metrics import collapse, geometry
from ufm_fast.metrics.inputs import Inputs
from ufm_fast.metrics.pairwise import Estimate

PAPYAN, ZHU, ZHOU = "arXiv 2008.08186", "arXiv 2105.02375", "arXiv 2210.02192"
YARAS, DANG, GNC = "arXiv 2209.09211", "arXiv 2301.00437", "arXiv 2310.05351"
TIRER_FRAME, LINGUISTIC, TIRER, GALANTI = (
    "arXiv 2202.08087",
    "arXiv 2405.17767",
    "arXiv 2210.16658",
    "arXiv 2112.15121",
)

MEANS = frozenset({"features"})
CLASSIFIER = frozenset({"weight"})
BOTH = MEANS | CLASSIFIER
BALANCE = BOTH | {"penalties"}


@dataclass(frozen=True)
class Metric:
    """One row of the table.

    formula: K is the number of classes, mu_k a class mean, mu_G the sample mean, mu_C the mean of
    class means, E the normalised simplex ETF (I - 1 1'/K)/sqrt(K-1), |.| the Frobenius norm. needs:
    inputs that must be given.
    cost: "linear" is O((N + K) d^2), fit for every step; "pairwise" is O(K^2 d) or O(N K d), or a
    sample of that.
    """

    description: str
    formula: str
    source: str
    needs: frozenset[str]
    compute: Callable[[Inputs], float | Estimate]
    cost: str = "linear"


def _both(
    name: str, description: str, formula: str, source: str, compute: Callable[..., float]
) -> dict[str, Metric]:
    """The same measure of the rows a_k = w_k and of the rows a_k = mu_k - mu_C."""
    return {
        f"{name}_classifier": Metric(
            f"{description}, classifier",
            formula + ", a_k = w_k",
            source,
            CLASSIFIER,
            lambda x: compute(x.classifier.raw),
        ),
        f"{name}_means": Metric(
            f"{description}, class means",
            formula + ", a_k = mu_k - mu_C",
            source,
            MEANS,
            lambda x: compute(x.statistics.centred_means),
        ),
    }


_NC1 = {
    "nc1_pinv": Metric(
        "within-class variability against the class means",
        "tr(Sigma_W Sigma_B^+)/K, Sigma_B about mu_G",
        ZHU,
        MEANS,
        lambda x: collapse.nc1_pinv(x.statistics),
    ),
    "nc1_trace": Metric(
        "within-class variability, not divided by K",
        "tr(Sigma_W Sigma_B^+), Sigma_B about mu_C",
        PAPYAN,
        MEANS,
        lambda x: collapse.nc1_trace(x.statistics),
    ),
    "nc1_quotient": Metric(
        "within-class variability as a quotient of traces",
        "tr Sigma_W / tr Sigma_B, Sigma_B about mu_G",
        TIRER,
        MEANS,
        lambda x: collapse.nc1_quotient(x.statistics),
    ),
}
_NC2 = {
    "nc2_classifier": Metric(
        "distance of the classifier's Gram matrix to the simplex ETF",
        "|W W'/|W W'| - E|",
        ZHU,
        CLASSIFIER,
        lambda x: collapse.nc2(x.classifier.raw),
    ),
    "nc2_classifier_centred": Metric(
        "the same, mean row subtracted",
        "nc2_classifier of W - 1 mean(w)'",
        ZHOU,
        CLASSIFIER,
        lambda x: collapse.nc2(x.classifier.about_mean),
    ),
    "nc2_classifier_frame": Metric(
        "distance of the classifier's Gram matrix to an orthogonal frame",
        "|W W'/|W W'| - I/sqrt(K)|",
        DANG,
        CLASSIFIER,
        lambda x: collapse.nc2(x.classifier.raw, frame=True),
    ),
    "nc2_means": Metric(
        "distance of the centred class means' Gram matrix to the simplex ETF",
        "|M M'/|M M'| - E|, rows of M are mu_k - mu_C",
        ZHOU,
        MEANS,
        lambda x: collapse.nc2(x.statistics.centred_means),
    ),
    "nc2_means_uncentred": Metric(
        "the same, nothing subtracted",
        "|M M'/|M M'| - E|, rows of M are mu_k",
        YARAS,
        MEANS,
        lambda x: collapse.nc2(x.statistics.raw_means),
    ),
    "nc2_means_frame": Metric(
        "distance of the class means' Gram matrix to an orthogonal frame",
        "|M M'/|M M'| - I/sqrt(K)|, rows of M are mu_k",
        DANG,
        MEANS,
        lambda x: collapse.nc2(x.statistics.raw_means, frame=True),
    ),
}
_NC3 = {
    "nc3": Metric(
        "distance of classifier times class means to the simplex ETF",
        "|W M'/|W M'| - E|, rows of M are mu_k - mu_G",
        ZHU,
        BOTH,
        lambda x: collapse.nc3(x.head, x.statistics.sample_centred_means),
    ),
    "nc3_centred": Metric(
        "the same, the classifier's mean row subtracted",
        "nc3 of W - 1 mean(w)'",
        ZHOU,
        BOTH,
        lambda x: collapse.nc3(x.head.rows.about_mean, x.statistics.sample_centred_means),
    ),
    "nc3_uncentred": Metric(
        "the same, nothing subtracted",
        "|W M'/|W M'| - E|, rows of M are mu_k",
        YARAS,
        BOTH,
        lambda x: collapse.nc3(x.head, x.statistics.raw_means),
    ),
    "nc3_frame": Metric(
        "distance of classifier times class means to an orthogonal frame",
        "|W M'/|W M'| - I/sqrt(K)|, rows of M are mu_k",
        DANG,
        BOTH,
        lambda x: collapse.nc3(x.head, x.statistics.raw_means, frame=True),
    ),
    "nc3_papyan": Metric(
        "distance of normalised classifier and class means (self-duality)",
        "|W/|W| - M/|M||^2, rows of M are mu_k - mu_C",
        PAPYAN,
        BOTH,
        lambda x: collapse.nc3_papyan(x.head, x.statistics.centred_means),
    ),
    "self_duality_gap": Metric(
        "angle between classifier and class means",
        "mean_k (1 - cos(w_k, mu_k - mu_G))",
        GNC,
        BOTH,
        lambda x: x.duality[0],
    ),
    "self_duality_cosine": Metric(
        "cosine of classifier and class means",
        "mean_k cos(w_k, mu_k - mu_G)",
        LINGUISTIC,
        BOTH,
        lambda x: 1 - x.duality[0],
    ),
    "self_duality_gap_uncentred": Metric(
        "angle between classifier and class means, nothing subtracted",
        "mean_k (1 - cos(w_k, mu_k))",
        TIRER_FRAME,
        BOTH,
        lambda x: geometry.self_duality(x.head, x.statistics.raw_means)[0],
    ),
    "self_duality_variance": Metric(
        "variance of that cosine (uniform duality)",
        "var_k cos(w_k, mu_k - mu_G), unbiased",
        LINGUISTIC,
        BOTH,
        lambda x: x.duality[1],
    ),
    "nc_bias": Metric(
        "collapse of the bias onto the global mean",
        "|W mu_G + b|",
        ZHU,
        BOTH,
        lambda x: collapse.nc_bias(x.classifier.raw, x.statistics.sample_centre, x.bias),
    ),
}
_GEOMETRY = {
    **_both(
        "norm_variation",
        "variation of the norms",
        "std_k |a_k| / mean_k |a_k|, std unbiased",
        PAPYAN,
        geometry.norm_variation,
    ),
    "cosine_mean_classifier": Metric(
        "mean cosine of pairs, classifier",
        "mean_{k!=l} cos(w_k, w_l)",
        PAPYAN,
        CLASSIFIER,
        lambda x: x.classifier_cosines[0],
    ),
    "cosine_mean_means": Metric(
        "mean cosine of pairs, class means",
        "mean_{k!=l} cos(mu_k - mu_C, mu_l - mu_C)",
        PAPYAN,
        MEANS,
        lambda x: x.mean_cosines[0],
    ),
    "cosine_std_classifier": Metric(
        "spread of the cosines of pairs, classifier",
        "std_{k!=l} cos(w_k, w_l)",
        PAPYAN,
        CLASSIFIER,
        lambda x: x.classifier_cosines[1],
    ),
    "cosine_std_means": Metric(
        "spread of the cosines of pairs, class means",
        "std_{k!=l} cos(mu_k - mu_C, mu_l - mu_C)",
        PAPYAN,
        MEANS,
        lambda x: x.mean_cosines[1],
    ),
    **_both(
        "effective_rank",
        "effective rank",
        "exp(-sum_i p_i log p_i), p = s/sum s, s singular values of A",
        "Roy and Vetterli, EUSIPCO 2007",
        geometry.effective_rank,
    ),
    **_both(
        "participation_ratio",
        "directions that share the energy",
        "(sum s_i^2)^2 / sum s_i^4, s singular values of A",
        "standard",
        geometry.participation_ratio,
    ),
    **_both(
        "stable_rank",
        "stable rank",
        "|A|^2 / s_1^2, s singular values of A",
        "arXiv math/0503442",
        geometry.stable_rank,
    ),
    "balancedness": Metric(
        "imbalance of classifier and features",
        "|W'W - (lambda_H/lambda_W) H'H|, H'H = sum_r n_r h_r h_r'",
        ZHU,
        BALANCE,
        lambda x: x.balance[0],
    ),
    "balancedness_relative": Metric(
        "the same against the classifier's Gram matrix",
        "balancedness / |W'W|",
        ZHU,
        BALANCE,
        lambda x: x.balance[1],
    ),
}
_PAIRWISE = {
    "nc4": Metric(
        "agreement of classifier and nearest class mean",
        "share of samples with argmax_k (w_k.h + b_k) = argmin_k |h - mu_k|",
        PAPYAN,
        BOTH,
        lambda x: x.nearest,
        "pairwise",
    ),
    "equiangularity_classifier": Metric(
        "distance of the cosines to the simplex ETF's, classifier",
        "mean_{k!=l} |cos(w_k, w_l) + 1/(K-1)|",
        PAPYAN,
        CLASSIFIER,
        lambda x: x.classifier_pairs[0],
        "pairwise",
    ),
    "equiangularity_means": Metric(
        "distance of the cosines to the simplex ETF's, class means",
        "mean_{k!=l} |cos(mu_k - mu_C, mu_l - mu_C) + 1/(K-1)|",
        PAPYAN,
        MEANS,
        lambda x: x.mean_pairs[0],
        "pairwise",
    ),
    "max_cosine_classifier": Metric(
        "largest cosine of a pair, classifier; a lower bound when sampled",
        "max_{k!=l} cos(w_k, w_l)",
        GNC,
        CLASSIFIER,
        lambda x: x.classifier_pairs[1],
        "pairwise",
    ),
    "max_cosine_means": Metric(
        "largest cosine of a pair, class means; a lower bound when sampled",
        "max_{k!=l} cos(mu_k - mu_C, mu_l - mu_C)",
        GNC,
        MEANS,
        lambda x: x.mean_pairs[1],
        "pairwise",
    ),
    "cdnv": Metric(
        "class-distance normalised variance",
        "mean_{k!=l} (v_k + v_l)/(2 |mu_k - mu_l|^2), v_k = mean |h - mu_k|^2 over class k",
        GALANTI,
        MEANS,
        lambda x: x.distances,
        "pairwise",
    ),
}

METRICS: dict[str, Metric] = {**_NC1, **_NC2, **_NC3, **_GEOMETRY, **_PAIRWISE}
