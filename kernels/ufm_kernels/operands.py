"""Precision modes: how a matrix is rounded, or split into two halves, before the tensor cores see
it.

| mode   | logits    | E, gradients' operands | passes | error to norms (d = 2048), cost to bf16 |
| ------ | --------- | ---------------------- | ------ | --------------------------------------- |
| bf16   | bfloat16  | bfloat16               | 1      | 5e-4, 1                                 |
| fp16   | float16   | float32 as tf32        | 1      | exact operands; E to 2^-12, 1.7         |
| tf32   | tf32      | tf32                   | 1      | 5e-5, 2                                 |
| bf16x3 | bf16 pair | bf16 pair              | 3      | 7e-7, 3                                 |
| fp16x3 | fp16 pair | bf16 pair              | 3      | logits 5e-8, products 7e-7, 3           |
| tf32x3 | tf32 pair | tf32 pair              | 3      | 1e-8 of operands, fp32 sums, 6          |

float16 has not the range of E, so its products run in tf32, which holds every float16 exactly, or
in bf16 pairs. What counts in a logit is its absolute error, which the exponential makes relative: a
pair of float16 has 22 bits where one of bfloat16 has 16, and its narrow range is enough once H and
W share their scale (`logit_operands`). A pair is x = high + low, stored side by side in one matrix
[high | low]; `primitives.multiply_pairs` is the product of two.

Decisions

2026-11-25. `fp16x3` takes the logits from pairs of float16, the products from pairs of bfloat16. An
exponential turns a logit's absolute error into a relative one, so at 50 nats and d = 24 the
bfloat16 pair leaves 1e-4 in loss and gradients; the float16 pair, six bits longer at the same cost,
leaves 5e-6 (both under the interpreter, `tests/kernels/test_head_digits.py`). E has not float16's
range, nor has a Hessian direction, so those stay in bfloat16 pairs. The backend keeps tf32x3 for
float32: before collapse its gradients are those of a float32 product (1e-7), and a pair's are not
(3e-6).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .prepare import prepare

DEPTH_MULTIPLE = 64  # half width of split operands: the depth of every tile divides it
WIDTH_MULTIPLE = 256  # half width of a split E: every tile's columns divide it


@dataclass(frozen=True)
class Mode:
    """Element of the logits' operands, element of E and of the operands of its products, and
    passes.
    """

    logits: torch.dtype
    products: torch.dtype
    passes: int = 1

    @property
    def halves(self) -> int:
        return 1 if self.passes == 1 else 2

    @property
    def balanced(self) -> bool:
        """Whether the logits' operands must share their scale."""
        return self.logits == torch.float16 and self.passes == 3

    @property
    def of_directions(self) -> "Mode":
        """What Hessian products run in: a direction has any scale, which float16 can't follow."""
        return (
            Mode(self.products, self.products, self.passes)
            if self.logits == torch.float16
            else self
        )


MODES = {
    "bf16": Mode(torch.bfloat16, torch.bfloat16),
    "fp16": Mode(torch.float16, torch.float32),
    "tf32": Mode(torch.float32, torch.float32),
    "bf16x3": Mode(torch.bfloat16, torch.bfloat16, 3),
    "fp16x3": Mode(torch.float16, torch.bfloat16, 3),
    "tf32x3": Mode(torch.float32, torch.float32, 3),
}


def mode_named(name: str) -> Mode:
    if name not in MODES:
        raise ValueError(f"mode={name!r}: choose one of {', '.join(MODES)}")
    return MODES[name]


def padded(columns: int, multiple: int) -> int:
    return -(-columns // multiple) * multiple


def operand(x: Tensor, dtype: torch.dtype, passes: int, weight: Tensor | None = None) -> Tensor:
    """x (rows, columns) as the kernels read it: (rows, halves * width) contiguous, zero beyond
    `columns`.

    Each entry is rounded to nearest in `dtype`, where float32 stands for tf32 (the tensor cores
    would truncate). One pass: x itself where dtype, layout and 16-byte alignment already fit, else
    a copy. Three passes: [high | low]. weight (rows,) fp32 multiplies the rows first.
    """
    width = operand_width(x.shape[1], dtype, passes)
    fits = (
        x.dtype == dtype and dtype != torch.float32 and x.is_contiguous() and x.data_ptr() % 16 == 0
    )
    if passes == 1 and weight is None and fits and width == x.shape[1]:
        return x
    out = torch.empty((len(x), width), dtype=dtype, device=x.device)
    return prepare(x, out, 1 if passes == 1 else 2, weight)


def product_operand(x: Tensor, mode: Mode, weight: Tensor | None = None) -> tuple[Tensor, bool]:
    """(x (depth, columns) as the second factor of `add_product`, its `down`); weight (depth,)
    multiplies the rows first.

    In float32 the operand of the transpose: tensor cores read 32-bit numbers along the depth only.
    """
    if mode.products != torch.float32:
        return operand(x, mode.products, mode.passes, weight), True
    out = x.new_empty(
        (x.shape[1], operand_width(len(x), mode.products, mode.passes)), dtype=mode.products
    )
    return prepare(x, out, mode.halves, weight, turned=True), False


def operand_width(columns: int, dtype: torch.dtype, passes: int) -> int:
    """Entries in a row of an operand, both halves."""
    halves, multiple = (1, 16 // dtype.itemsize) if passes == 1 else (2, DEPTH_MULTIPLE)
    return halves * padded(columns, multiple)


def logit_operands(features: Tensor, weight: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
    """(H, W) whose products are the logits; `balanced` modes move a power of two, exactly, from the
    larger to the smaller.

    Then max|H| and max|W| are within a factor two of the root of their product, and no half leaves
    float16's range while that product stays below 2^30.
    """
    if mode.balanced:
        largest = [
            x.abs().amax().float().clamp_min(torch.finfo(torch.float32).tiny)
            for x in (features, weight)
        ]
        shift = ((largest[1].log2() - largest[0].log2()) / 2).round().clamp(-126, 126)
        shift = torch.where(
            largest[0] * 0 + largest[1] * 0 == 0, shift, 0.0
        )  # one row of nan must not unscale the others
        features, weight = (
            x.float() * power_of_two(s) for x, s in ((features, shift), (weight, -shift))
        )
    return operand(features, mode.logits, mode.passes), operand(weight, mode.logits, mode.passes)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent from its bits, exactly; exponents -126 to 127."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def operand_bytes(rows: int, columns: int, dtype: torch.dtype, passes: int) -> int:
    """Bytes of the copy that `operand` makes of a matrix that it can't take as it is, for planning
    memory.
    """
    return rows * operand_width(columns, dtype, passes) * dtype.itemsize


def empty_chunk(rows: int, classes: int, mode: Mode, device: torch.device) -> Tensor:
    """Room for E of a chunk: (rows, halves * width), width >= classes, every row 16-byte
    aligned.
    """
    multiple = 16 // mode.products.itemsize if mode.passes == 1 else WIDTH_MULTIPLE
    return torch.empty(
        (rows, mode.halves * padded(classes, multiple)), dtype=mode.products, device=device
    )


def chunk_bytes(rows: int, classes: int, mode: str) -> int:
    """Bytes of E for `rows` rows, for planning memory."""
    chosen = mode_named(mode)
    multiple = 16 // chosen.products.itemsize if chosen.passes == 1 else WIDTH_MULTIPLE
    return rows * chosen.halves * padded(classes, multiple) * chosen.products.itemsize
