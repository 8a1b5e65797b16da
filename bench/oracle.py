"""Inputs at a stage of collapse, and the float64 oracle that every timed result is checked
against.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Nats by which the target leads the mean of the others: from initialisation to the terminal phase.
STAGES = {"start": 0.0, "learning": 8.0, "late": 20.0, "terminal": 45.0}
#: Rungs of the ladder of errors: 1 - p_y of a row, and the terminal phase.
LADDER = ("1e-2", "1e-3", "1e-5", "1e-8", "terminal")
_NOISE = 0.3  # of the features
SAMPLED = 256  # rows and classes on which the float64 reference is evaluated


def data(
    N: int, K: int, d: int, margin: float, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """(features, weight, labels), every feature near its class direction so that the target leads
    by about `margin`.
    """
    make = torch.Generator(device).manual_seed(seed)
    weight = torch.nn.functional.normalize(torch.randn(K, d, generator=make, device=device))
    labels = torch.randint(K, (N,), generator=make, device=device).sort().values
    features = torch.randn(N, d, generator=make, device=device).mul_(_NOISE)
    for part in torch.arange(N, device=device).split(65536):
        features[part] += margin * weight[labels[part]]
    return features.to(dtype), weight.to(dtype), labels


def margin_of(stage: str, K: int, d: int) -> float:
    """Nats by which the target leads: those of a stage, or those at which `data` leaves a row about
    that 1 - p_y.

    The others' logits are normal about their mean, with the variance of the features' noise and of
    margin <w_y, w_k>.
    """
    if stage in STAGES:
        return STAGES[stage]
    left, margin = float(stage), 0.0
    for _ in range(50):
        variance = _NOISE**2 + min(margin, d / 2) ** 2 / d
        margin = math.log(K - 1) + variance / 2 - math.log(left / (1 - left))
    return margin


def row_block(features: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(E, s, loss) of some rows in float64, by the off-target mass."""
    z = features.double() @ weight.double().T
    own = z.gather(1, labels[:, None])
    z.sub_(own).exp_().scatter_(1, labels[:, None], 0.0)
    mass = z.sum(1)
    return z, mass, torch.log1p(mass)


def reference(
    features: Tensor, weight: Tensor, labels: Tensor, block: int = 256, *, sweep: bool = True
) -> dict[str, Tensor]:
    """float64 mean loss, and both gradients on the sampled rows and classes; without `sweep` what
    the rows alone tell.
    """
    N, K = len(features), len(weight)
    device = features.device
    rows = torch.linspace(0, N - 1, min(N, SAMPLED), device=device).long()
    classes = torch.linspace(0, K - 1, min(K, SAMPLED), device=device).long()
    total = torch.zeros((), dtype=torch.float64, device=device)
    grad_weight = torch.zeros(len(classes), features.shape[1], dtype=torch.float64, device=device)
    for part in torch.arange(N if sweep else 0, device=device).split(block):
        E, mass, loss = row_block(features[part], weight, labels[part])
        total += loss.sum()
        chosen = E[:, classes] - mass[:, None] * (labels[part][:, None] == classes)
        grad_weight += (chosen / (1 + mass[:, None])).T @ features[part].double() / N
    E, mass, _ = row_block(features[rows], weight, labels[rows])
    grad_features = (
        (E @ weight.double() - mass[:, None] * weight[labels[rows]].double())
        / (1 + mass[:, None])
        / N
    )
    of_rows = {"rows": rows, "grad_features": grad_features}
    return of_rows | (
        {"loss": total / N, "classes": classes, "grad_weight": grad_weight} if sweep else {}
    )


def errors(found: tuple[Tensor, Tensor, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of the loss, normwise of the gradients on the sample."""
    loss, grad_features, grad_weight = found
    of_rows = {
        "grad_features_error": normwise(grad_features[expected["rows"]], expected["grad_features"])
    }
    if "loss" not in expected:
        return of_rows
    return {
        "loss_error": float((loss.double() - expected["loss"]).abs() / expected["loss"]),
        **of_rows,
        "grad_weight_error": normwise(grad_weight[expected["classes"]], expected["grad_weight"]),
    }


def normwise(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| in float64."""
    return float((a.double() - b).norm() / b.norm())


def squared_reference(features: Tensor, weight: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """float64 mean squared error by Gram matrices, and both gradients on the sampled rows and
    classes.
    """
    N, K = len(features), len(weight)
    rows = torch.linspace(0, N - 1, min(N, SAMPLED), device=features.device).long()
    classes = torch.linspace(0, K - 1, min(K, SAMPLED), device=features.device).long()
    gram_h = torch.zeros(
        features.shape[1], features.shape[1], dtype=torch.float64, device=features.device
    )
    gram_w, own = gram_h.clone(), torch.zeros((), dtype=torch.float64, device=features.device)
    for part in weight.split(1 << 16):
        gram_w += part.double().T @ part.double()
    for h, y in zip(features.split(1 << 16), labels.split(1 << 16), strict=True):
        gram_h += h.double().T @ h.double()
        own += (h.double() * weight[y].double()).sum()
    sums = torch.stack([features[labels == k].double().sum(0) for k in classes])
    return {
        "loss": ((gram_w * gram_h).sum() - 2 * own + N) / (2 * N),
        "rows": rows,
        "classes": classes,
        "grad_features": (features[rows].double() @ gram_w - weight[labels[rows]].double()) / N,
        "grad_weight": (weight[classes].double() @ gram_h - sums) / N,
    }
