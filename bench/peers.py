"""Mean cross-entropy of a linear head, value and both gradients, by every peer that is installed.

A contender is a function (features, weight, labels) -> (loss, grad_features, grad_weight). Peers
are imported, never copied; one that is not installed, or does not offer an option in its version,
is left out with its reason.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from device import reason
from torch import Tensor
from torch.nn import functional

from ufm_kernels import head
from ufm_kernels.library import tensor_float32
from ufm_kernels.replays import Replays
from ufm_kernels.segments import Segments

Contender = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
PRODUCTS = "library products"
OURS = "ufm_kernels"
BLOCK = 24 << 20  # bytes of E that an L2 cache of 50 MB holds beside what else passes through it


def into_buffers(
    mode: str, chunk_rows: int, products: str | None = None, block_bytes: int | None = None
) -> Callable[..., Tensor]:
    """The chunked driver of this repository, (features, weight, labels, gradient buffers) -> loss.

    products: as its table says, or all of one kind. block_bytes: of E, after which dH follows.
    """

    def run(features: Tensor, weight: Tensor, labels: Tensor, *gradients: Tensor) -> Tensor:
        scale = torch.full((len(features),), 1.0 / len(features), device=features.device)
        result = head.softmax_value_and_grad(
            features,
            weight,
            None,
            labels,
            scale,
            grad_features=gradients[0],
            grad_weight=gradients[1],
            chunk_rows=chunk_rows,
            mode=mode,
            products=products,
            fresh=True,
            block_bytes=block_bytes,
        )
        return result.losses.mean()

    return run


def empty_gradients(features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(torch.empty_like(x, dtype=torch.float32) for x in (features, weight))


def ours(*arguments: Any) -> Contender:
    """`into_buffers` with buffers of its own."""
    step = into_buffers(*arguments)

    def run(features: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gradients = empty_gradients(features, weight)
        return step(features, weight, labels, *gradients), *gradients

    return run


class Rehearsed:
    """A recorder of steps where there is no device: a replay is the step once more."""

    def place(self, tensors: Sequence[Tensor | None]) -> str:
        return "rehearsal"

    def record(self, step: Callable[[], Any], place: Any) -> tuple[Callable[[], Any], Any]:
        return step, step()


def captured(*arguments: Any) -> Contender:
    """`into_buffers` as a CUDA graph of each set of inputs, from their second call on, as a solver
    replays it.
    """
    step = into_buffers(*arguments)
    replays = Replays(recorder=None if torch.cuda.is_available() else Rehearsed())
    buffers: dict[int, tuple[Tensor, Tensor]] = {}

    def run(features: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if features.data_ptr() not in buffers:
            buffers[features.data_ptr()] = empty_gradients(features, weight)
        gradients = buffers[features.data_ptr()]
        given = features, weight, labels, *gradients
        (loss,) = replays(lambda: (step(*given),), given)
        return loss, *gradients

    return run


def one_pass(mode: str) -> Contender:
    """The driver of this repository that never stores E (features of at most 128 columns)."""

    def run(features: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gradients = empty_gradients(features, weight)
        scale = torch.full((len(features),), 1.0 / len(features), device=features.device)
        segments = Segments.of(labels[:, None].int(), len(weight))
        result = head.one_pass_value_and_grad(
            features,
            weight,
            None,
            labels,
            scale,
            grad_features=gradients[0],
            grad_weight=gradients[1],
            mode=mode,
            segments=segments,
            fresh=True,
        )
        return result.losses.mean(), *gradients

    return run


def fp8(chunk_rows: int) -> Contender:
    """Mode fp8 of this repository, with its fall-back; it runs on sm_90 only."""
    from ufm_kernels.fp8_head import fp8_value_and_grad

    def run(features: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gradients = (
            torch.zeros_like(features, dtype=torch.float32),
            torch.zeros_like(weight, dtype=torch.float32),
        )
        scale = torch.full((len(features),), 1.0 / len(features), device=features.device)
        result, _ = fp8_value_and_grad(
            features,
            weight,
            None,
            labels,
            scale,
            grad_features=gradients[0],
            grad_weight=gradients[1],
            chunk_rows=chunk_rows,
        )
        return result.losses.mean(), *gradients

    return run


def library_products(chunk_rows: int) -> Contender:
    """The three matrix products alone, chunk by chunk: the practical ceiling. Its values are not a
    loss.

    float32 in tf32, which is what the tensor cores do with it: three-pass modes do three times the
    work of that.
    """

    def run(features: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grad_features, grad_weight = torch.empty_like(features), torch.empty_like(weight)
        with tensor_float32():
            for start in range(0, len(features), chunk_rows):
                part = slice(start, start + chunk_rows)
                logits = features[part] @ weight.T
                torch.mm(logits, weight, out=grad_features[part])
                grad_weight.addmm_(
                    logits.T, features[part], beta=min(start, 1)
                )  # the first chunk writes
        return grad_weight[0, 0], grad_features, grad_weight

    return run


def torch_chunked(chunk_rows: int, compiled: bool) -> Contender:
    """Row-chunked torch: log-sum-exp and softmax minus one-hot, as one writes it by hand."""

    def chunk(
        features: Tensor, weight: Tensor, labels: Tensor, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits = (features @ weight.T).float()
        loss = functional.cross_entropy(logits, labels, reduction="sum") / count
        gradient = torch.softmax(logits, 1)
        gradient[torch.arange(len(labels), device=labels.device), labels] -= 1
        gradient = gradient / count
        gradient = gradient.to(features.dtype)
        return loss, gradient @ weight, gradient.T @ features

    compiler = (
        "inductor" if torch.cuda.is_available() else "eager"
    )  # a rehearsal has no C++ compiler
    step = torch.compile(chunk, dynamic=True, backend=compiler) if compiled else chunk

    def run(features: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss = torch.zeros((), device=features.device)
        grad_features, grad_weight = (
            torch.empty_like(features),
            torch.zeros_like(weight, dtype=torch.float32),
        )
        for start in range(0, len(features), chunk_rows):
            part = slice(start, start + chunk_rows)
            value, grad_features[part], added = step(
                features[part], weight, labels[part], len(features)
            )
            loss += value
            grad_weight += added
        return loss, grad_features, grad_weight

    return run


def through_autograd(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Contender:
    """A peer that is a differentiable function of features and weight."""

    def run(features: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        leaves = features.detach().requires_grad_(), weight.detach().requires_grad_()
        value = loss(*leaves, labels)
        return value.detach(), *torch.autograd.grad(value, leaves)

    return run


def torch_function() -> Contender:
    """torch.nn.functional.linear_cross_entropy (2.13 and later) with its automatic chunking."""
    function = functional.linear_cross_entropy
    options = torch.nn.LinearCrossEntropyOptions()
    return through_autograd(lambda h, w, y: function(h, w, y, options=options))


def liger(chunk_mem_const: int) -> Contender:
    """Liger's fused linear cross-entropy with fp32 accumulation of the weight gradient."""
    function = importlib.import_module(
        "liger_kernel.transformers.functional"
    ).liger_fused_linear_cross_entropy
    options: dict[str, object] = {"accum_dtype": torch.float32, "chunk_mem_const": chunk_mem_const}
    missing = options.keys() - inspect.signature(function).parameters.keys()
    if missing:
        raise ImportError(f"this version of Liger has no {', '.join(sorted(missing))}")
    return through_autograd(lambda h, w, y: function(h, w, y, **options))


def cut_cross_entropy(filtered: bool = False) -> Contender:
    """Cut Cross-Entropy, by default without its filter, which drops every tile without a target
    once K > 4096.
    """
    module = importlib.import_module("cut_cross_entropy")
    if filtered:
        return through_autograd(lambda h, w, y: module.linear_cross_entropy(h, w, y, impl="cce"))
    exact = hasattr(
        getattr(module, "LinearCrossEntropyImpl", None), "CCE_EXACT"
    )  # a name of later versions for the same
    options: dict[str, object] = (
        {"impl": "cce_exact"} if exact else {"impl": "cce", "filter_eps": None}
    )
    return through_autograd(lambda h, w, y: module.linear_cross_entropy(h, w, y, **options))


def quack() -> Contender:
    """QuACK's chunked linear cross-entropy, without its search, which takes minutes a shape.

    Its 0.6.5 refuses chunks of as many rows as there are columns.
    """
    function = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy

    def loss(features: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        rows = 2048 if features.shape[1] == 4096 else 4096
        return function(features, weight, labels, chunk_size=rows, reduction="mean", tuned=False)

    return through_autograd(loss)


def contenders(
    modes: list[str], dim: int, chunk_rows: int
) -> tuple[dict[str, Contender], dict[str, str]]:
    """(contenders by name, reasons why the others are missing). Ours come first, the products
    last.
    """
    found: dict[str, Contender] = {}
    missing: dict[str, str] = {}
    for mode in modes:
        found[f"{OURS} {mode}"] = ours(mode, chunk_rows)
        if mode in ("bf16", "tf32"):
            found[f"{OURS} {mode}, fused products"] = ours(mode, chunk_rows, "triton")
            found[f"{OURS} {mode}, library products"] = ours(mode, chunk_rows, "library")
        if dim <= head.NARROW:
            found[f"{OURS} {mode}, one pass"] = one_pass(mode)
        if dim <= head.NARROW and mode == "bf16":
            blocks = mode, chunk_rows, "library", BLOCK
            found[f"{OURS} {mode}, blocks"] = ours(*blocks)
            found[f"{OURS} {mode}, blocks, captured"] = captured(*blocks)
    if "bf16" in modes:
        found[f"{OURS} fp8"] = fp8(chunk_rows)
    makers: dict[str, Callable[[], Contender]] = {
        "torch chunked": lambda: torch_chunked(chunk_rows, compiled=False),
        "torch chunked, compiled": lambda: torch_chunked(chunk_rows, compiled=True),
        "torch linear_cross_entropy": torch_function,
        "Liger, chunk_mem_const 1": lambda: liger(1),
        "Liger, chunk_mem_const 16": lambda: liger(16),
        "Liger, chunk_mem_const 64": lambda: liger(64),
        "Cut Cross-Entropy exact": cut_cross_entropy,
        "Cut Cross-Entropy with its filter": lambda: cut_cross_entropy(filtered=True),
        "QuACK": quack,
    }
    for name, maker in makers.items():
        try:
            found[name] = maker()
        except Exception as error:  # whatever a peer does when it is imported
            missing[name] = reason(error)
    found[PRODUCTS] = library_products(chunk_rows)
    return found, missing
