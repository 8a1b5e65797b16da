"""The claims, measured: a head against the three products and torch's own losses, a solve, and
digits near collapse.

heads       seconds, percent of the rate of the three products, peak bytes beyond inputs and
            gradients (CPU: of a process of its own; CUDA: of the allocator)
solves      seconds and evaluations to a certified relative gap of 1e-6, against torch.optim.LBFGS
            on dense autograd
digits      relative error of a row's float32 loss at margins that grow, of the median row
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ufm_fast.benchmark.measuring import interleave, median_ratio, number_of
from ufm_fast.benchmark.rivals import DROP_IN, OURS, PRODUCTS, available, inputs, make
from ufm_fast.functional import linear_cross_entropy
from ufm_fast.memory import begin_peak, peak_memory
from ufm_fast.point import Point
from ufm_fast.problem import Problem
from ufm_fast.solving import solve
from ufm_fast.theory.certificates import certify

Row = dict[str, Any]
#: (N, K, d) of heads, of a quick run the first.
SHAPES = ((1024, 4096, 256), (4096, 1024, 512))
NAMES = (OURS, DROP_IN, PRODUCTS, "autograd", "torch linear_cross_entropy")
MARGINS = (2.0, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0)
_GAP = 1e-6


def heads(device: torch.device, *, quick: bool) -> list[Row]:
    """A row a shape and contender."""
    rows: list[Row] = []
    names = [name for name in NAMES if name == DROP_IN or name in available()]
    for shape in SHAPES[: 1 if quick else None]:
        data = _on(device, *shape)
        calls = {name: make(name, *shape, data=data) for name in names}
        seconds = interleave(calls, 3 if quick else 7)
        rows += [
            {
                "N": shape[0],
                "K": shape[1],
                "d": shape[2],
                "contender": name,
                "seconds": statistics.median(seconds[name]),
                "percent_of_products": 100.0 * median_ratio(seconds[PRODUCTS], seconds[name]),
                "extra_bytes": None
                if name == PRODUCTS
                else _extra_bytes(name, shape, device, calls[name]),
            }
            for name in names
        ]
    return rows


def _on(device: torch.device, N: int, K: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    H, W, y = inputs(N, K, d)
    return H.to(device), W.to(device), y.to(device)


def _extra_bytes(
    name: str, shape: tuple[int, int, int], device: torch.device, call: Callable[[], object]
) -> int:
    """Peak bytes of a call beyond inputs and gradients."""
    gradients = sum(4 * rows * shape[2] for rows in shape[:2])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        call()
        return max(torch.cuda.max_memory_allocated(device) - held - gradients, 0)
    return max(
        number_of(
            f"from ufm_fast.benchmark.claims import peak_of; print(peak_of({name!r}, {shape!r}))"
        )
        - gradients,
        0,
    )


def peak_of(name: str, shape: tuple[int, int, int]) -> int:
    """Peak bytes of one call beyond what was held before, in this process."""
    make(
        name, 64, 64, shape[2]
    )()  # thread pools and workspaces of the libraries, which any contender has
    call = make(name, *shape)
    before = begin_peak(torch.device("cpu"))
    found = call()
    del found
    return peak_memory(torch.device("cpu"), before)["peak_extra_bytes"]


def solves(device: torch.device, *, quick: bool) -> list[Row]:
    """Ours, and torch's L-BFGS with a strong Wolfe search on dense autograd, from the same random
    start.
    """
    classes, dim = (60, 64) if quick else (200, 256)
    problem = Problem(
        counts=[1 + 3 * k % 17 for k in range(classes)],
        dim=dim,
        lambda_w=1e-4,
        lambda_h=1e-5,
        device=str(device),
    )
    start = solve(problem, start="normal", max_steps=0, certificate=False, metrics=False).point
    began = time.perf_counter()
    found = solve(problem, initial=start, metrics=False)
    seconds = time.perf_counter() - began
    assert found.certificate is not None
    of_problem = {"K": classes, "d": dim}
    ours = {"contender": "ufm_fast solve", "seconds": seconds, "evaluations": found.evaluations}
    return [
        {**of_problem, **ours, "relative_gap": found.certificate.relative_gap},
        {
            **of_problem,
            "contender": "torch.optim.LBFGS",
            **_torch_solve(problem, start, 100 if quick else 2000),
        },
    ]


def _torch_solve(problem: Problem, start: Point, limit: int) -> Row:
    """Iterations by twenties until the gap is certified, ``limit`` of them, or twenty that change
    nothing; certificates are not timed.
    """
    W, H = (part.detach().clone().requires_grad_() for part in (start.W, start.H))
    rows, evaluations, seconds, gap = problem.rows("classes"), 0, 0.0, float("inf")
    counts = rows.counts.to(W)
    y = rows.targets.indices.to(W.device)
    optimiser = torch.optim.LBFGS(
        (W, H),
        max_iter=20,
        history_size=10,
        line_search_fn="strong_wolfe",
        tolerance_grad=0,
        tolerance_change=0,
    )

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        optimiser.zero_grad()
        data = counts @ functional.cross_entropy(H @ W.T, y, reduction="none") / problem.num_samples
        value: Tensor = (
            data
            + problem.lambda_w / 2 * W.square().sum()
            + problem.lambda_h / 2 * (counts @ H.square().sum(1))
        )
        value.backward()  # type: ignore[no-untyped-call]
        return value

    for _ in range(0, limit, 20):
        before = W.detach().clone()
        began = time.perf_counter()
        with torch.enable_grad():
            optimiser.step(closure)  # type: ignore[no-untyped-call]
        seconds += time.perf_counter() - began
        gap = certify(problem, rows, Point(W.detach(), H.detach())).relative_gap
        if gap <= _GAP or torch.equal(before, W):
            break
    return {"seconds": seconds, "evaluations": evaluations, "relative_gap": gap}


def digits(device: torch.device) -> list[Row]:
    """A row a margin: the target leads the mean of the others by so many nats."""
    generator = torch.Generator().manual_seed(0)
    W = functional.normalize(torch.randn(500, 64, generator=generator, dtype=torch.float64))
    y = torch.randint(500, (256,), generator=generator)
    H = 0.1 * torch.randn(256, 64, generator=generator, dtype=torch.float64)
    rows = []
    for margin in MARGINS:
        h, w = (x.float().to(device) for x in (H + margin * W[y], W))
        truth = linear_cross_entropy(h.double(), w.double(), y.to(device), reduction="none")
        losses = {
            "ufm_fast drop-in": linear_cross_entropy(h, w, y.to(device), reduction="none"),
            "torch": functional.cross_entropy(
                functional.linear(h, w), y.to(device), reduction="none"
            ),
        }
        errors = {
            name: float(((loss.double() - truth) / truth).abs().median())
            for name, loss in losses.items()
        }
        rows.append({"margin": margin, "loss": float(truth.median()), **errors})
    return rows


def measure(device: torch.device, *, quick: bool = False) -> dict[str, list[Row]]:
    """All claims by their names."""
    return {
        "heads": heads(device, quick=quick),
        "solves": solves(device, quick=quick),
        "digits": digits(device),
    }
