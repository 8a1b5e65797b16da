"""Adjusted logits: what losses for imbalanced classes change in them, an offset, a margin and a
scale for each class.

    logits that the loss sees of a row with target y:
    scale_k <w_k, h> + b_k + offset_k - margin_y [k = y]

- Offsets tau log(n_k / N): logit adjustment (Menon et al., arXiv 2007.07314).
- Margins C n_y^(-1/4): LDAM (Cao et al., arXiv 1906.07413). The same for all classes and on unit
  rows: CosFace, t (cos - m) (Wang et al., arXiv 1801.09414).
- Scales (n_k / n_max)^gamma: class-dependent temperatures, CDT (Ye et al., arXiv 2001.01385); with
  offsets the vector-scaling loss (Kini et al., arXiv 2103.01550).

An offset acts like a fixed bias, and a margin adds to the log of the row's off-target mass, so
neither needs anything else of a backend. A scale is a factor on the rows of W. Penalties of each
class are factors on lambda_w and lambda_h (`penalty_factors`), which are none of the logits. Those
of W, eta_k lambda_w/2 |w_k|^2, are the scales eta_k^(-1/2) in the variables sqrt(eta_k) w_k, which
balanced solvers work in (`scales`); penalties, metrics and files have the w_k. Those of H,
kappa_k: a row weighs n_r kappa_y in the penalty and n_r in the loss. Nothing here is given where it
would change nothing: then the numbers are those of the loss alone, bit for bit.

Certificates. With S the diagonal of the scales over sqrt(eta_k) and kappa_r the factor of a row,
the least penalty of the logits Z S, Z = H W' diag(sqrt(eta)), is mu |D^1/2 Z|_*, D = diag(n_r
kappa_r), so the convex form carries over, with layers too: dual rows g_r of the loss prove the same
bound (`certificates.softmax`, `.squares`, `.focal` without a bias, and with one by the convex
envelope alone), where the norm is that of the rows n_r / (N sqrt(n_r kappa_r)) g_r S; weighted sets
likewise (`.weighted`). On unit rows the bound of `certificates.spheres` needs the gradient in Z
alone, and offsets, margins and scales are constants there. With a frozen factor all of it carries
over (`.frozen`). Margins in the angle (ArcFace) are another thing: `angular_margins`.

Ranges. 2026-11-30: factors on penalties lie in [1e-16, 1e16], scales, whose inverse squares are
such factors, in [1e-8, 1e8]. At both ends solves are certified (`tests/test_adjustments.py`); far
beyond them solves stalled well above the minimum, in float32 at values far off, and squares left
the range of float64, and nothing that was said named the factor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ufm_fast.arguments import LEAST_FACTOR, MOST_FACTOR, factor, integers, number
from ufm_fast.errors import InputError, InputTypeError

if TYPE_CHECKING:
    from ufm_fast.backends.base import HeadInput

LEAST_SCALE, MOST_SCALE = 1e-8, 1e8


@dataclass(frozen=True, eq=False)
class Adjustment:
    """Float64 vectors (K,), None where there is nothing to change."""

    offset: Tensor | None = None
    margin: Tensor | None = None
    scale: Tensor | None = None

    def __bool__(self) -> bool:
        return not (self.offset is None and self.margin is None and self.scale is None)

    def to(self, device: torch.device | str) -> Adjustment:
        return Adjustment(
            *(None if v is None else v.to(device) for v in (self.offset, self.margin, self.scale))
        )

    def part(self, classes: slice) -> Adjustment:
        """That of a head with these rows of W alone, whose targets still name all classes."""
        offset, scale = (None if v is None else v[classes] for v in (self.offset, self.scale))
        return Adjustment(offset, self.margin, scale)

    def apply(self, x: HeadInput) -> HeadInput:
        """The head's input with its logits adjusted."""
        weight, bias = self.classifier(x.weight, x.bias)
        margin = None if self.margin is None else margins_of(self.margin, x.targets.indices)
        return replace(x, weight=weight, bias=bias, margin=margin)

    def apply_scale(self, x: HeadInput) -> HeadInput:
        """The part that is linear in W: what a direction takes."""
        return replace(x, weight=self._scaled(x.weight))

    def classifier(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The adjusted classifier, which `Problem` and the drop-in functions share;
        differentiable.
        """
        if self.offset is not None:
            offset = self.offset.to(weight.dtype)
            bias = offset if bias is None else bias + offset
        return self._scaled(weight), bias

    def _scaled(self, weight: Tensor) -> Tensor:
        return weight if self.scale is None else weight * self.scale.to(weight.dtype)[:, None]

    def constant(self, G: Tensor, classes: Tensor) -> Tensor:
        """<g_r, a_r> of each row of G (R x K) with single targets: a_r are the offsets and margins,
        float64 (R,).
        """
        total = G.new_zeros(G.shape[0])
        if self.offset is not None:
            total = total + G @ self.offset
        if self.margin is not None:
            total = total - self.margin[classes] * G.gather(1, classes[:, None])[:, 0]
        return total


def margins_of(margin: Tensor, labels: Tensor) -> Tensor:
    """What is taken off the target's logits of rows with these labels, float64 (R,); of `Problem`
    and of drop-in losses.
    """
    return margin.double()[labels]


def penalty_factors(name: str, counts: Tensor, given: Any) -> Tensor | None:
    """Factors on a penalty of each class, float64 (K,): ``given``, or (n_k / n_max)^gamma of one
    number. None where all are 1.

    Errors: as `make_adjustment`.
    """
    n = counts.double().cpu()
    factors = _each(name, given, n, lambda gamma: _relative(n) ** gamma, 1.0)
    _check_range(name, given, factors, (LEAST_FACTOR, MOST_FACTOR))
    return factors


def _check_range(
    name: str, given: Any, values: Tensor | None, allowed: tuple[float, float]
) -> None:
    """Errors: InputError for a class whose value lies outside, naming it and the mend."""
    if values is None or bool(((values >= allowed[0]) & (values <= allowed[1])).all()):
        return
    k = int(torch.nonzero((values < allowed[0]) | (values > allowed[1]))[0])
    rule = isinstance(given, (int, float))
    said = f"{name} = {given} is {float(values[k])}" if rule else f"got {float(values[k])}"
    raise InputError(
        f"{name} must lie in [{allowed[0]:g}, {allowed[1]:g}], {said} for class {k}; "
        f"{'go nearer to 0' if rule else 'bring it nearer to 1'}"
    )


def _relative(counts: Tensor) -> Tensor:
    """n_k / n_max, of an empty class 1 / n_max."""
    return counts.clamp_min(1.0) / counts.max()


def make_adjustment(
    counts: Any,
    *,
    logit_adjustment: Any = None,
    margin: Any = None,
    margin_power: float = 0.0,
    class_scales: Any = None,
    temperature: float = 1.0,
) -> Adjustment:
    """The Adjustment of classes with ``counts`` (K,) samples, for `Problem` and for the functions
    of ``ufm_fast.functional``.

    logit_adjustment: tau of the offsets tau log(n_k/N), or K offsets. margin: m of the margins m
    (n_min/n_k)^``margin_power``, or K margins; times ``temperature``. class_scales: gamma of the
    scales (n_k/n_max)^gamma, or K scales.
    Errors: InputError / InputTypeError naming the argument, the value and the mend.
    """
    counts = integers(counts, "counts")
    if logit_adjustment is None and margin is None and class_scales is None and margin_power == 0:
        return Adjustment()
    if counts.dim() != 1 or not bool((counts >= 0).all()) or not bool((counts > 0).any()):
        raise InputError("counts must be the samples of each class, K numbers >= 0, not all zero")
    n, temperature = counts.double().cpu(), factor(temperature, "temperature")
    power = number(margin_power, "margin_power")
    if power < 0:
        raise InputError(f"margin_power must be >= 0, got {power}; LDAM has 0.25")
    if power > 0 and not isinstance(margin, (int, float)):
        raise InputError(
            "margin_power goes with one number as margin, that of the smallest class; give it, or "
            "drop margin_power"
        )
    if (
        isinstance(logit_adjustment, (int, float))
        and logit_adjustment != 0
        and bool((n == 0).any())
    ):
        raise InputError(
            "logit_adjustment takes the log of each class's share, and a class is empty; give the "
            "offsets, or drop it"
        )
    smallest = n[n > 0].min()
    offset = _each(
        "logit_adjustment", logit_adjustment, n, lambda tau: tau * (n / n.sum()).log(), 0.0
    )
    least = _each("margin", margin, n, lambda m: m * (smallest / n.clamp_min(1.0)) ** power, 0.0)
    scale = _each("class_scales", class_scales, n, lambda gamma: _relative(n) ** gamma, 1.0)
    _check_range("class_scales", class_scales, scale, (LEAST_SCALE, MOST_SCALE))
    return Adjustment(offset, None if least is None else temperature * least, scale)


def for_each_class(name: str, given: Any, counts: Tensor) -> Tensor | None:
    """One number for all classes or K numbers, float64 (K,); None where all are zero, or nothing is
    given.
    """
    return _each(name, given, counts, lambda one: torch.full_like(counts, one), 0.0)


def _each(
    name: str, given: Any, counts: Tensor, rule: Callable[[float], Tensor], neutral: float
) -> Tensor | None:
    """K numbers from a rule's parameter or from themselves; None where all are neutral."""
    if given is None:
        return None
    if isinstance(given, (int, float)):
        values = rule(number(given, name))
        if not bool(values.isfinite().all()):
            raise InputError(f"{name} = {given} is beyond float64 for a class; go nearer to 0")
    else:
        try:
            several = given.tolist() if hasattr(given, "tolist") else given
            values = torch.tensor([number(x, name) for x in several], dtype=torch.float64)
        except TypeError as error:
            raise InputTypeError(
                f"{name} must be a number or a number for each class, got {given!r}"
            ) from error
        if values.shape != counts.shape:
            raise InputError(
                f"{name} must be one number or {counts.numel()}, one for each class; got "
                f"{values.numel()}"
            )
    return None if bool((values == neutral).all()) else values
