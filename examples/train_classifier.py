"""Train a small classifier of handwritten digits twice: with torch's cross-entropy, and with one
import line changed.

    python examples/train_classifier.py

Needs scikit-learn (its 1,797 digits ship with it). Both runs start from the same weights and see
the same batches, so the losses agree while there is much to learn. The last table shows where they
part: as margins grow, here by scaling the trained head, float32 cross-entropy loses its digits and
ends at 0, and the fused one keeps them.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

# from torch.nn.functional import linear_cross_entropy      <- torch 2.13 or later
from ufm_fast.functional import linear_cross_entropy  # <- the changed line


def torch_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor
) -> Tensor:
    """What torch's function of that name computes, in the words of every torch version."""
    return nn.functional.cross_entropy(
        nn.functional.linear(input, linear_weight, linear_bias), target
    )


def data() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16.0
    return images, torch.tensor(digits.target, dtype=torch.int64)


def train(
    loss: Callable[..., Tensor], images: Tensor, labels: Tensor, epochs: int = 60
) -> tuple[Tensor, float, Tensor, nn.Linear]:
    """Losses of the epochs on all images, the final accuracy, the features and the head."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
    head = nn.Linear(64, 10)
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=1e-2)
    history = []
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(256):
            value = loss(body(images[batch]), head.weight, labels[batch], linear_bias=head.bias)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        with torch.no_grad():
            history.append(loss(body(images), head.weight, labels, linear_bias=head.bias))
    with torch.no_grad():
        features = body(images)
        accuracy = float((head(features).argmax(1) == labels).float().mean())
    return torch.stack(history), accuracy, features, head


@torch.no_grad()
def digits_kept(features: Tensor, labels: Tensor, head: nn.Linear) -> None:
    """The median image's loss in float32, by both, beside the truth in float64, for ever larger
    margins.
    """
    print(f"{'head times':>10}  {'torch':>12}  {'fused':>12}  {'float64':>12}")
    for scale in (0.5, 1.0, 2.0, 4.0):
        x, W, b = features, scale * head.weight, scale * head.bias
        torchs = nn.functional.cross_entropy(
            nn.functional.linear(x, W, b), labels, reduction="none"
        )
        fused = linear_cross_entropy(x, W, labels, linear_bias=b, reduction="none")
        truth = linear_cross_entropy(
            x.double(), W.double(), labels, linear_bias=b.double(), reduction="none"
        )
        print(
            f"{scale:10g}" + "".join(f"  {rows.median():12.6e}" for rows in (torchs, fused, truth))
        )


def main() -> None:
    images, labels = data()
    results = {}
    for name, loss in (("torch", torch_loss), ("fused", linear_cross_entropy)):
        start = time.perf_counter()
        history, accuracy, *trained = train(loss, images, labels)
        results[name] = history
        print(
            f"{name}: loss {history[-1]:.6e}, accuracy {accuracy:.4f}, "
            f"{time.perf_counter() - start:.1f} s"
        )
    for epoch in (0, 9, 24, 59):
        print(
            f"epoch {epoch + 1:3d}: torch {results['torch'][epoch]:.6e}  fused "
            f"{results['fused'][epoch]:.6e}"
        )
    digits_kept(trained[0], labels, trained[1])


if __name__ == "__main__":
    main()
