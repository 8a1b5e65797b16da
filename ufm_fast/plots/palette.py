"""One palette, and one colour for one quantity in every figure."""

from __future__ import annotations

from typing import Any

#: Colours that stay apart in print and for colour-blind readers (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
#: What is known rather than found, and values themselves.
THEORY, VALUE = "0.5", "0.35"
_WITHIN, _CLASSIFIER, _MEANS, _DUALITY, _SHARE, _OTHER = COLOURS
#: The colour of a quantity. A factor has the colour of the metrics that tell of it alone.
QUANTITY_COLOURS = {
    **dict.fromkeys(("gap", "relative_gap", "value", "loss", "objective"), VALUE),
    **dict.fromkeys(("nc1_pinv", "nc1_quotient", "nc1_trace", "nrc1"), _WITHIN),
    **dict.fromkeys(
        ("nc2_classifier", "nc2_classifier_frame", "classifier", "W", "classifier_norm", "nrc2"),
        _CLASSIFIER,
    ),
    **dict.fromkeys(("nc2_means", "nc2_means_frame", "class means", "H", "mean_norm"), _MEANS),
    **dict.fromkeys(
        ("nc3", "nc3_frame", "self_duality_uncentred", "self_duality", "alignment", "nrc3"),
        _DUALITY,
    ),
    **dict.fromkeys(("nc4", "accuracy", "mismatch"), _SHARE),
    **dict.fromkeys(("gradient_norm", "hidden1"), _OTHER),
    **dict.fromkeys(("evaluations", "steps"), "#117733"),
    **dict.fromkeys(("seconds", "seconds_per_evaluation"), "#882255"),
    **dict.fromkeys(("peak_bytes", "peak_extra_bytes", "device_peak_bytes"), "#AA4499"),
    **dict.fromkeys(("max_cosine_classifier", "max_cosine_means"), "#661100"),
    "one_vs_rest": "#332288",
    "certified": "#999933",
    "model": THEORY,
    "classifier_cosine": _CLASSIFIER,
}


def line_style(number: int) -> dict[str, Any]:
    """Colour and dashes of the curve of that number: after six colours the dashes change."""
    dashes = ("-", "--", ":", "-.")[number // len(COLOURS) % 4]
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": dashes, "linewidth": 1.5}


def quantity_style(name: str, number: int = 0) -> dict[str, Any]:
    """The quantity's own colour; for one that has none the style of the curve of that number."""
    style = line_style(number)
    return (
        {**style, "color": QUANTITY_COLOURS[name], "linestyle": "-"}
        if name in QUANTITY_COLOURS
        else style
    )
