"""`collect`: every metric that the inputs allow, as a flat dictionary."""

from __future__ import annotations

from typing import Any

import torch

from ufm_fast.metrics.catalogue import METRICS
from ufm_fast.metrics.inputs import Inputs
from ufm_fast.metrics.pairwise import Estimate, Mode, Sampling


def penalties(lambda_w: float | None, lambda_h: float | None) -> tuple[float | None, float | None]:
    """Both for `collect`, or neither: a factor that is frozen without a penalty has no
    balancedness.
    """
    return (lambda_w, lambda_h) if lambda_w and lambda_h else (None, None)


def comparable(features: Any, labels: Any, counts: Any) -> tuple[Any, Any, Any]:
    """The same for `collect`, or None for each where one class has all rows: metrics of features
    compare classes, and one class alone leaves the classifier's own. Input that does not fit is
    left for `collect` to refuse.
    """
    fits = (
        features is not None
        and labels is not None
        and labels.shape == features.shape[:1]
        and len(labels) > 0
    )
    return (
        (None, None, None)
        if fits and bool((labels == labels[0]).all())
        else (features, labels, counts)
    )


@torch.no_grad()
def collect(
    features: Any,
    weight: Any,
    labels: Any,
    bias: Any = None,
    *,
    counts: Any = None,
    classes: int | None = None,
    lambda_w: float | None = None,
    lambda_h: float | None = None,
    pairwise: Mode = "auto",
    seed: int = 0,
    pairs: int = 2**18,
    rows: int = 256,
    tile: int = 1024,
) -> dict[str, float]:
    """All metrics of `METRICS` that the inputs allow, in the order of the table; never an N x K or
    K x K array.

    features: H (N, d) and labels (N,), or None for both: the classifier's own metrics. weight: W
    (K, d), or None: the class means' own. bias: b (K,). Tensors on one device or numpy arrays, any
    floating dtype; sums are float64.
    counts: (N,), row r stands for counts[r] equal samples. classes: K where weight does not tell
    it. lambda_w, lambda_h: the penalties lambda/2 |.|^2, for balancedness. Classes without samples
    have no mean: metrics of the means, and those that pair W with the means, are over the classes
    that have samples; metrics of W alone are over all of its rows.

    pairwise: metrics over pairs of classes and NC4, of cost O(K^2 d + N K d): "auto" takes them
    exactly up to 20,000 classes and beyond that from `pairs` random pairs (`rows` rows for NC4)
    drawn from `seed`; "exact", "sampled" as they say; "none" leaves them out, and all that remains
    costs O((N + K) d^2). tile: classes in a tile, for speed only.

    Returns: name -> number; a sampled mean has its standard error beside it as `<name>_stderr`. nan
    means undefined: an angle of a zero row, a ratio with zero class means. NC1 counts as zero when
    each row is a class of its own.
    Errors: InputError, InputTypeError naming the argument and the mend.
    """
    sampling = Sampling(pairwise, pairs, rows, seed, tile)
    inputs = Inputs(
        features,
        weight,
        labels,
        bias,
        counts=counts,
        classes=classes,
        penalties=(lambda_w, lambda_h),
        sampling=sampling,
    )
    return collected(inputs)


def collected(inputs: Inputs) -> dict[str, float]:
    """The rows of the table that the inputs allow."""
    numbers: dict[str, float] = {}
    skipped = "pairwise" if inputs.sampling.mode == "none" else ""
    for name, metric in METRICS.items():
        if not metric.needs <= inputs.given or metric.cost == skipped:
            continue
        found = metric.compute(inputs)
        if isinstance(found, Estimate):
            numbers[name] = found.value
            if found.stderr is not None:
                numbers[f"{name}_stderr"] = found.stderr
        else:
            numbers[name] = found
    return numbers
