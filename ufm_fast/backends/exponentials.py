"""The exponentials of a chunk of logits, K x C, and the logits of its targets.

They are powers of two, of logits in bits: on a CPU exp takes three times as long as exp2, and many
times where it underflows. Scaled to bits a logit v has an error of eps |v|, which differs from
class to class, while the target's logit is known exactly. That serves near collapse, where the
targets' logits alone are large. Where others are as large as the target's, only equal rounding
cancels: then the target's logit is taken as the product rounded it (``alike``); and logits with a
large mean leave their row's maximum before they are scaled, so that a common offset cancels as far
as the product itself holds it.

Decisions

2026-11-25. The tiled backend's exponentials are relative to the mean off-target logit, not to the
target. exp(z - z_y) underflows and, in float32, carries the rounding of numbers near -80. The mean
off-target logit is known before the sweep (one product with the mean row of W), so E = exp(z -
mean) is moderate near collapse, and the target enters in float64 as a vector of length N. Relative
errors at a margin of 80 nats: below 1e-5 in float32 and 1e-13 in float64
(`tests/backends/test_tiled.py`). Rows that overflow take their own maximum.

2026-11-25. Mean logits below 8 nats stay in the exponent. Subtracting the offset is a pass over E;
where every row's is small, which near collapse it is (the off-target mean is -margin/(K-1)), it
buys nothing.

2026-11-26. The tiled backend's exponentials are powers of two, of logits in bits (the features are
scaled, not E). On a CPU torch's exp takes three times as long as its exp2, and fifteen times where
the result underflows (`bench/reasons/exponentials.py`).

2026-11-26. Logits that spread far are ordinary input. Parameters drawn from a normal distribution,
as in anybody's first benchmark, give logits with a deviation of sqrt(d) nats: every row overflowed
around its mean and had its logits formed a second time. The tiled backend now looks at 64 classes
of each chunk, and where many rows lie far above their mean they get their largest logit as the
offset, at the price of one pass. The same sample stands in for a mean that is infinite, as with
masked classes. (The Triton kernels form E twice there.) Tried and dropped where classes are many: a
label's own entry, -factor s', inside E during the products. It saves the gathered rows and the
scattered sums, and costs the gradients two thirds of a digit. (For few classes, see `tiled`.)

2026-11-30. One look at the offsets serves all that is asked of them, a single label's rows are not
gathered, and no factor of 1 is multiplied: what equal rounding had cost, 4 to 8 % of a small head,
is back. Against the commit before it (`bench/same_speed.py`, 61 rounds, f597f86) a value and
gradient takes 0.985 of the time at K = 100, d = 128 and 0.966 at K = 1000, d = 64, with the same
bits as before this change (`bench/same_bits.py`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_BITS = 1.0 / math.log(2.0)  # in a nat
_LEVEL = 8.0  # bits: a mean logit below this may stay in the exponent, at the cost of 8 eps of E
_FAR = 64.0  # bits: the largest mean logit that is scaled before it is subtracted
_CACHED = 1 << 16  # numbers of a block that is converted to float64
_SAMPLE = 64  # classes at least that tell how far the logits of a chunk spread


class Exponentials(NamedTuple):
    """Beside E, for each row its sum and the offset in nats, float64 (C,), the largest logit off
    target if it was asked for, and for each target entry its logit as the product rounded it,
    float64.
    """

    mass: Tensor
    offset: Tensor
    top: Tensor | None
    rounded: Tensor


def exponentials(
    h: Tensor,
    W: Tensor,
    bias: Tensor | None,
    offset: Tensor,
    rows: Tensor,
    columns: Tensor,
    E: Tensor,
    *,
    top: bool,
) -> Exponentials:
    """Fill E = exp(z - offset), K x C, zero on targets; ``offset`` is a guess at a good one."""
    size = float(offset.abs().max()) * _BITS
    if not size <= _FAR and _far(offset):
        _logits(h, W, bias, 1.0, E)
        rounded = E[columns, rows].double()
        mass, offset = from_largest(E, rows, columns)
        return Exponentials(mass, offset, offset if top else None, rounded)
    _logits(h, W, bias, _BITS, E)
    rounded = E[columns, rows].double()
    E[columns, rows] = -math.inf
    largest = E.amax(0).double() / _BITS if top else None
    offset, size = _placed(E, offset * _BITS, size)
    if size > _LEVEL:
        E.sub_(offset.to(E.dtype))
        offset = offset.to(E.dtype).double()
    else:
        offset = torch.zeros_like(offset)  # a pass over E for nothing
    E.exp2_()
    E[columns, rows] = 0.0
    result = Exponentials(E.sum(0).double(), offset / _BITS, largest, rounded / _BITS)
    least, most = torch.aminmax(result.mass)  # of nan both are nan
    safe = torch.finfo(E.dtype).max ** 0.5
    if (least > 1 / safe) & (most < safe):  # one look, for which a device is waited for
        return result
    hostile = ~((result.mass > 1 / safe) & (result.mass < safe))
    return _with_hostile(result, torch.nonzero(hostile).reshape(-1), h, W, bias, rows, columns, E)


def _far(offset: Tensor) -> bool:
    """Whether a finite mean logit is too large to be scaled before it is subtracted."""
    size = offset.abs() * _BITS
    return bool(((size > _FAR) & (size < math.inf)).any())


def _with_hostile(
    result: Exponentials,
    hostile: Tensor,
    h: Tensor,
    W: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    E: Tensor,
) -> Exponentials:
    """These rows have their logits formed anew, and their largest as the offset."""
    mass, offset, top, rounded = result
    for bad in torch.split(hostile, max(1, h.shape[0] // 8)):  # an eighth of E's memory
        z = _logits(h.index_select(0, bad), W, bias, 1.0, h.new_empty(W.shape[0], bad.numel()))
        position = torch.full((h.shape[0],), -1, dtype=torch.int64, device=bad.device)
        position[bad] = torch.arange(bad.numel(), device=bad.device)
        entries = torch.nonzero(position[rows] >= 0).reshape(-1)
        place = position[rows[entries]]
        rounded = rounded.index_copy(0, entries, z[columns[entries], place].double())
        mass[bad], largest = from_largest(z, place, columns[entries])
        E[:, bad] = z
        offset = offset.index_copy(0, bad, largest)
        top = None if top is None else top.index_copy(0, bad, largest)
    return Exponentials(mass, offset, top, rounded)


def from_largest(z: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Logits in nats become exponentials relative to the largest off target; their sums and those
    largest, float64 (C,).
    """
    z[columns, rows] = -math.inf
    top = z.amax(0)
    alone = (
        top == -math.inf
    )  # no class but the target is possible: E = 0, and mass 1 at the offset -inf
    z.sub_(torch.where(alone, 0.0, top)).mul_(_BITS).exp2_()
    return torch.where(alone, 1.0, z.sum(0).double()), top.double()


def _logits(h: Tensor, W: Tensor, bias: Tensor | None, scale: float, out: Tensor) -> Tensor:
    """``out``, K x C, filled with scale times the logits."""
    if bias is None:
        return torch.addmm(out, W, h.T, beta=0, alpha=scale, out=out)
    return torch.addmm(bias[:, None], W, h.T, beta=scale, alpha=scale, out=out)


def _placed(z: Tensor, offset: Tensor, size: float) -> tuple[Tensor, float]:
    """Offsets for logits z (K x C, in bits) that begin as ``offset``, each row's mean; and the size
    of the largest.

    A sample of classes stands in for a mean that is infinite, and tells where many rows lie far
    above theirs: those get their largest logit. What few rows overflow after this have their logits
    formed anew.
    """
    far = math.log2(torch.finfo(z.dtype).max) / 4
    # Copied first: down the columns of z every number would lie in a page of its own.
    high = z[:: max(1, z.shape[0] // _SAMPLE)].contiguous().amax(0).double()
    if not size < math.inf:
        offset = torch.where(offset.isfinite(), offset, torch.where(high.isfinite(), high, 0.0))
        size = float(offset.abs().max())
    if 8 * int((high - offset > far).sum()) > z.shape[1]:
        top = z.amax(0).double()
        offset = torch.where(top - offset > far, top, offset)
        size = float(offset.abs().max())
    return offset, size


def alike(exact: Tensor, rounded: Tensor, others: Tensor) -> Tensor:
    """The target's logits: as the product rounded them where others are as large, so that equal
    logits stay equal.
    """
    return torch.where(near_others(exact, others), rounded, exact)


def near_others(exact: Tensor, others: Tensor) -> Tensor:
    """Whether others are as large as the target's logits."""
    return (exact - others).abs() <= 0.5 * exact.abs()


def target_logits(
    h: Tensor, W: Tensor, rows: Tensor, columns: Tensor, single: bool, centre: Tensor | None = None
) -> Tensor:
    """<h, w - centre> at the target entries, float64, by blocks that a cache holds."""
    number = rows.numel()
    z = h.new_empty(number, dtype=torch.float64)
    step = max(1, min(number, _CACHED // h.shape[1]) if h.device.type == "cpu" else number)
    block = z.new_empty(step, h.shape[1])
    for start in range(0, number, step):
        part = slice(start, start + step)
        features, w = (
            h[part] if single else h.index_select(0, rows[part]),
            W.index_select(0, columns[part]),
        )
        product = (
            block[: features.shape[0]].copy_(features).mul_(w if centre is None else w - centre)
        )
        torch.sum(product, 1, out=z[part])
    return z


def exact_mean(x: Tensor) -> Tensor:
    """Mean over the rows of x, float64, right to eps of what the rows differ by, whatever they have
    in common.
    """
    mean, step = x.mean(0), max(1, _CACHED // max(1, x[:1].numel()))
    if not bool(mean.isfinite().all()):  # a sum beyond the range; infinite rows stay so
        mean = torch.zeros_like(mean)
        for part in torch.split(x, step):
            mean += (part / len(x)).sum(0)
    rest = torch.zeros_like(mean, dtype=torch.float64)
    for part in torch.split(x, step):
        rest += (part - mean).sum(0)
    return torch.where(mean.isfinite(), mean + rest / len(x), mean.double())
