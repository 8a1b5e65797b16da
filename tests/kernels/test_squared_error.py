"""Gram matrices."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DEVICE, MARKS, Case, error, quick, sizes

from ufm_kernels.squared_error import gram, library_gram

pytestmark = MARKS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(**sizes, weighted=st.booleans())
@quick
def test_gram_matrix_by_the_library(dtype, rows, classes, dim, seed, weighted):
    case = Case(rows, classes, dim, seed, "tf32x3")
    X, weight = case.features.to(dtype), case.row_weight if weighted else None
    double = X.double() if weight is None else X.double() * weight[:, None].double()
    torch.testing.assert_close(
        library_gram(X, weight), X.double().T @ double, rtol=1e-12, atol=1e-12
    )


def test_gram_matrix_of_no_rows():
    assert torch.equal(
        gram(torch.zeros(0, 5, device=DEVICE)),
        torch.zeros(5, 5, dtype=torch.float64, device=DEVICE),
    )


def test_gram_of_float64_keeps_it():
    x, weight = torch.randn(200, 3, dtype=torch.float64), torch.rand(200)
    torch.testing.assert_close(gram(x), x.T @ x, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gram(x, weight), x.T @ (x * weight[:, None]), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@given(**sizes, parts=st.sampled_from([1, 3]))
@quick
def test_gram_is_float64_grade(dtype, rows, classes, dim, seed, parts):
    X = torch.randn(rows + classes, dim, generator=torch.Generator().manual_seed(seed)).to(
        DEVICE, dtype
    )
    found = gram(X, parts=parts)
    assert error(found, X.double().T @ X.double()) < (1e-14 if dtype == torch.float32 else 3e-7)
    weight = torch.randn(rows + classes, generator=torch.Generator().manual_seed(seed + 1)).to(
        DEVICE
    )  # of either sign
    expected = X.double().T @ (X.double() * weight[:, None])
    assert (
        float((gram(X, weight, parts=parts) - expected).norm() / X.double().square().sum()) < 1e-14
    )
    assert torch.equal(found, found.T)
