"""From the sums of every row's tiles to its loss and gradient factors: all that lies between the N
x K passes, in two launches.

    raise_offsets    sums the tiles, finds the rows whose exponentials overflow, moves their offset
                     to their maximum, and sets a flag; a target's logit that rounding alone may
                     keep from the largest other becomes that
    finish_rows      log-ratio, probability, loss, margin, and the factors of both products; the
                     formulas of `rows`. The tiles are summed anew only where the flag says that
                     they were written anew

Tiles are summed in a fixed order in float64, in which no formula needs the care that float32 would.

Decisions

2026-11-26. What lies between the passes over N x K is two kernels (`row_sums`). Hostile rows, loss
and factors were a hundred torch operations on vectors a chunk of rows, which at d of 64 to 256
would cost a device more than the products do. A chunk is seven launches now for cross-entropy
(eight where the library forms dH), one more with a bias, 23 for a focal loss with one; a test
counts them. Their sums run in float64, where the formulas need no care. g' of a loss stays a torch
function, so no loss has device code; the cross-entropy skips it. The third statistic is the largest
logit itself, not its distance from the offset: at 1e9 the difference is rounded to dozens of nats.
A flag of one chunk is set by any program that finds a hostile row, all of which write the same
number: no atomics.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .launch import ceil_div, check_written, constants, laid_out, on_device

HOSTILE = tl.constexpr(
    2.0**40
)  # a wrong class leads by about 28 nats: from here on a row uses its maximum as the offset
IMPOSSIBLE = tl.constexpr(
    2.0**-20
)  # the targets alone weigh 1 at their mean, unless one has a logit of -inf
BLOCKS = {"BLOCK": 32, "SPAN": 64, "num_warps": 4, "num_stages": 2}


class Targets(NamedTuple):
    """The targets of rows: logits z and labels (rows, TARGETS), their mean, and the offset of the
    row.
    """

    z: tl.tensor
    labels: tl.tensor
    mean: tl.tensor
    offset: tl.tensor
    rows: tl.tensor
    TARGETS: tl.constexpr


@triton.jit
def collected(statistics, r, rows, tiles, BLOCK: tl.constexpr, SPAN: tl.constexpr):
    """(sum of exponentials, sum of the rounded ones, maximum) over all tiles of some rows."""
    mass, kept = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    peak = tl.full((BLOCK,), float("-inf"), tl.float32)
    plane = tl.cast(tiles, tl.int64) * rows
    for first in range(0, tiles, SPAN):
        t = first + tl.arange(0, SPAN)
        place = statistics + t.to(tl.int64)[:, None] * rows + r[None, :]
        inside = (t < tiles)[:, None] & (r < rows)[None, :]
        mass += tl.sum(tl.load(place, mask=inside, other=0.0).to(tl.float64), 0)
        kept += tl.sum(tl.load(place + plane, mask=inside, other=0.0).to(tl.float64), 0)
        peak = tl.maximum(
            peak, tl.max(tl.load(place + 2 * plane, mask=inside, other=float("-inf")), 0)
        )
    return mass, kept, peak


@triton.jit
def target_of(of, r, t):
    """(the logit of target t of every row in float64, whether there is one)."""
    entry = r.to(tl.int64) * of.TARGETS + t
    known = tl.load(of.labels + entry, mask=r < of.rows, other=-1) != -1
    return tl.load(of.z + entry, mask=known, other=0.0).to(tl.float64), known


@triton.jit
def log1p(x):
    """log(1 + x) in float64, without losing small x."""
    return tl.where(tl.abs(x) < 1e-5, x * (1 - x * (0.5 - x / 3)), tl.log(1 + x))


@triton.jit
def expm1(x):
    """exp(x) - 1 in float64, without losing small x."""
    return tl.where(tl.abs(x) < 1e-5, x * (1 + x * (0.5 + x / 6)), tl.exp(x) - 1)


@triton.jit
def raise_kernel(
    statistics,
    of: Targets,
    flag,
    totals,
    tiles,
    plane,
    band,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
):
    rows = of.rows
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mass, kept, peak = collected(statistics, r, rows, tiles, BLOCK, SPAN)
    plane = tl.cast(plane, tl.int64)
    tl.store(totals + r, mass, mask=r < rows)
    tl.store(totals + plane + r, kept, mask=r < rows)
    tl.store(totals + 2 * plane + r, peak.to(tl.float64), mask=r < rows)
    base = tl.load(of.mean + r, mask=r < rows, other=0.0)
    top, count = peak, tl.zeros((BLOCK,), tl.int32)
    for t in tl.range(of.TARGETS, num_stages=1):
        logit, known = target_of(of, r, t)
        # What differs by no more than the sum of a tile may from the target's is equal.
        wide = peak.to(tl.float64)
        level = (tl.abs(logit - wide) <= band * tl.abs(logit)) & (tl.abs(logit) < float("inf"))
        logit = tl.where(level, wide, logit)
        tl.store(of.z + r.to(tl.int64) * of.TARGETS + t, logit, mask=known)
        mass += tl.where(known, tl.exp(logit - base.to(tl.float64)), 0.0)
        count += known.to(tl.int32)
        top = tl.maximum(top, tl.where(known, logit.to(tl.float32), float("-inf")))
    hostile = ((mass <= HOSTILE) == 0) | (
        (mass < IMPOSSIBLE) & (count > 0) & (top > float("-inf"))
    )  # nan is hostile, too
    hostile = hostile & (r < rows)
    tl.store(of.offset + r, top, mask=hostile)
    # Every program that finds one writes the same number.
    tl.store(flag, 1, mask=tl.max(hostile.to(tl.int32), 0) == 1)


@triton.jit
def sums_of_targets(of, r, middle, shift, BLOCK: tl.constexpr):
    """Over the targets of each row: their number, the sums of exp(z - middle) - 1 and of
    exp(z - middle - shift), the least and the largest z.
    """
    count, excess = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    unit = tl.zeros((BLOCK,), tl.float64)
    least = tl.full((BLOCK,), float("inf"), tl.float64)
    most = tl.full((BLOCK,), float("-inf"), tl.float64)
    for t in tl.range(of.TARGETS, num_stages=1):
        logit, known = target_of(of, r, t)
        count += tl.where(known, 1.0, 0.0)
        excess += tl.where(known, expm1(logit - middle), 0.0)
        unit += tl.where(known, tl.exp((logit - middle) - shift), 0.0)
        least = tl.minimum(least, tl.where(known, logit, float("inf")))
        most = tl.maximum(most, tl.where(known, logit, float("-inf")))
    return count, excess, unit, least, most


@triton.jit
def tails_of_targets(of, r, most, base, count, BLOCK: tl.constexpr):
    """Over the targets of each row: the sum of exp(z - most), 1 where there is none, and of
    z - base.
    """
    drift = tl.zeros((BLOCK,), tl.float64)  # the mean is rounded, and stands for -inf too
    tail = tl.where(count == 0, 1.0, 0.0).to(tl.float64)
    for t in tl.range(of.TARGETS, num_stages=1):
        logit, known = target_of(of, r, t)
        tail += tl.where(known, tl.exp(logit - most), 0.0)
        drift += tl.where(known, logit - base, 0.0)
    return tail, drift


@triton.jit
def store_row(out, plane, r, rows, first, second, third, fourth):
    """Four numbers of each row, in the first four planes from ``out`` on."""
    tl.store(out + r, first, mask=r < rows)
    tl.store(out + plane + r, second, mask=r < rows)
    tl.store(out + 2 * plane + r, third, mask=r < rows)
    tl.store(out + 3 * plane + r, fourth, mask=r < rows)


@triton.jit
def finish_kernel(
    statistics,
    totals,
    flag,
    of: Targets,
    scale,
    out,
    own,
    tiles,
    plane,
    ROUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
):
    rows = of.rows
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    plane = tl.cast(plane, tl.int64)
    if tl.load(flag) == 1:
        mass, kept, peak = collected(statistics, r, rows, tiles, BLOCK, SPAN)
    else:
        mass = tl.load(totals + r, mask=r < rows, other=0.0)
        kept = tl.load(totals + plane + r, mask=r < rows, other=0.0)
        peak = tl.load(totals + 2 * plane + r, mask=r < rows, other=0.0).to(tl.float32)
    if not ROUNDED:
        kept = mass
    middle = tl.load(of.mean + r, mask=r < rows, other=0.0).to(tl.float64)
    shift = tl.load(of.offset + r, mask=r < rows, other=0.0).to(tl.float64) - middle
    raised = (shift == 0) == 0  # rows that were moved to their maximum, or are nan
    count, excess, unit, least, most = sums_of_targets(of, r, middle, shift, BLOCK)
    margin = least - peak
    # A row without targets counts as one target of logit zero, which is its mean.
    unit = tl.where(count == 0, tl.exp(-shift), unit)
    most = tl.where(most == float("-inf"), middle, most)
    base = tl.where(raised, most, middle)
    shift += middle - base
    tail, drift = tails_of_targets(of, r, most, base, count, BLOCK)
    count = tl.maximum(count, 1.0)
    total = tl.where(raised, unit, count + excess)
    log_total = tl.where(raised, tl.log(tail), log1p(tl.where(raised, 0.0, count - 1 + excess)))
    log_ratio = tl.where(raised, tl.log(total + mass) + (shift - log_total), log1p(mass / total))
    common = 1 / (total + mass)
    weight = tl.load(scale + r, mask=r < rows, other=0.0).to(tl.float64)
    factor = common * count * tl.where(kept > 0, mass / tl.where(kept > 0, kept, 1.0), 1.0)
    loss = log_ratio  # with one target log_total is the drift
    if of.TARGETS > 1:
        loss = tl.where(
            log_ratio == float("inf"), log_ratio, count * (log_ratio + log_total) - drift
        )
    store_row(out, plane, r, rows, loss, log_ratio, mass * common, mass / total)
    store_row(out + 4 * plane, plane, r, rows, margin, mass, kept, weight * factor)
    for t in tl.range(of.TARGETS, num_stages=1):
        logit, known = target_of(of, r, t)
        moved = count * tl.exp((logit - base) - shift) - total
        here = tl.where(raised, moved, count * expm1(logit - middle) - excess)
        pull = tl.where(known, weight * common * (mass - here), 0.0)
        tl.store(own + r.to(tl.int64) * of.TARGETS + t, pull, mask=r < rows)


def check_planes(**matrices):
    """ValueError for a matrix whose rows a kernel writes and that are not contiguous."""
    for name, x in matrices.items():
        if x.stride(1) != 1:
            raise ValueError(f"{name}: its rows are written in place and must be contiguous")


@on_device
def raise_offsets(statistics, z, labels, mean, offset, flag, totals, band=0.0):
    """offset (rows,) becomes the row's maximum, and flag (one int32) becomes 1, where exponentials
    overflow.

    statistics (3, tiles, rows) as `off_target` and `one_pass.forward` leave them; target logits z
    and labels (rows, T). Where z is the largest other logit but for band |z| it becomes that: its
    sum ran in another order than those of the tiles, and however large the logits, classes that are
    equal must stay so.
    mean (rows,): the offset that the exponentials had. totals (3, rows), fp64: their sums, and the
    maximum, over tiles.
    """
    check_written(offset=offset, flag=flag, z=z)
    check_planes(totals=totals)
    statistics, labels, mean = laid_out(statistics, labels, mean)
    rows, targets = labels.shape
    raise_kernel[(ceil_div(rows, BLOCKS["BLOCK"]),)](
        statistics,
        Targets(z, labels, mean, offset, rows, *constants(targets)),
        flag,
        totals,
        statistics.shape[1],
        totals.stride(0),
        float(band),
        **BLOCKS,
    )


@on_device
def finish_rows(
    statistics, totals, flag, z, labels, mean, offset, scale, out, own, *, rounded=True
):
    """Fill out (8, rows) and own (rows, T), fp32, from totals, or with a flag from the statistics
    of the last launch.

    The rows of out: loss of the cross-entropy over the targets, log-ratio l, probability p, s / T,
    margin, sum of E, sum of rounded E, and scale times the factor of E for g' = 1; own is scale
    times minus the gradient at each target, for g' = 1. rounded: whether the products read the
    rounded E.
    """
    check_written(own=own)
    check_planes(out=out)
    if totals.stride() != out.stride():
        raise ValueError("totals: its rows must lie as far apart as those of out")
    statistics, z, labels, mean, offset, scale = laid_out(
        statistics, z, labels, mean, offset, scale
    )
    rows, targets = labels.shape
    finish_kernel[(ceil_div(rows, BLOCKS["BLOCK"]),)](
        statistics,
        totals,
        flag,
        Targets(z, labels, mean, offset, rows, *constants(targets)),
        scale,
        out,
        own,
        statistics.shape[1],
        out.stride(0),
        ROUNDED=rounded,
        **BLOCKS,
    )
