"""Products of matrices by torch's library, in the precision that the kernels' have."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def tensor_float32() -> Iterator[None]:
    """Library products of float32 matrices in tf32, as the kernels take them: a setting of the
    whole process meanwhile.
    """
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    if before == "tf32":
        yield
        return
    setting.fp32_precision = "tf32"
    try:
        yield
    # It reads as what it inherits, and would stay that for good if written so: "none" inherits
    # again.
    finally:
        setting.fp32_precision = "none"
        if setting.fp32_precision != before:
            setting.fp32_precision = before


def library_product(
    a: Tensor, b: Tensor, out: Tensor | None = None, *, fresh: bool = False
) -> Tensor:
    """a @ b by the library in fp32, from operands as the mode has rounded them; added to `out` if
    given, or written there.
    """
    if not a.is_cuda:
        product = a.float() @ b.float()
        return product if out is None else out.copy_(product) if fresh else out.add_(product)
    beta = 0 if fresh else 1  # with 0 the library reads nothing of `out`
    if a.dtype == torch.float32:
        with tensor_float32(), torch.autocast("cuda", enabled=False):
            return torch.mm(a, b) if out is None else torch.addmm(out, a, b, beta=beta, out=out)
    if out is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.addmm(out, a, b, beta=beta, out_dtype=torch.float32, out=out)
