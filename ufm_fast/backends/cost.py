"""What an evaluation on several ranks costs: bytes that a rank sends and floating-point operations,
as formulas.

With P = C S ranks, blocks of h_R = ceil(R/P) rows and h_K = ceil(K/P) classes, T = ceil(h_R / q)
chunks of q rows a rank and b bytes a number, a rank sends for one value and gradient of a softmax
loss

    features    2 (C - 1) T q d b          rows to the ranks with the other classes, and their
                gradients back
    classes     2 (S - 1) h_K d b          the weight from the ranks with the other rows, and its
                gradient back
    row sums    2 (C - 1) T q (1 + m) 8    a sum a row, and m = 2 numbers a target (3 with
                smoothing); with margins (C - 1) T q 8 more
    layers      2 (P - 1)/P h b            gradients of h numbers of hidden layers
    sums        2 (C - 1)/C d 8 + 4 (P - 1)/P 16      the mean row of W (twice with smoothing), and
                data term and penalty

by algorithms that send least (rings), and does 6 R K d / P operations and R K / P exponentials. A
Hessian product has three times the features' and classes' bytes in place of two. A bias adds its
entries to ``classes``, and one number to the mean. Weighted sets send what single labels do.
Margins in the angle are margins that also take the row statistics (m = 3) and a third number among
the sums, and where e rows of W that this rank's rows have as targets are on others, which ask it
for a, (2 a b + 8 e) d more (``targets``), as long as no row is held at its kink (`angular`).
Squared error to target vectors sends neither row sums nor the mean row of W, and takes no
exponentials. Kernels send a number a row more, 2 (C - 1) q 8 bytes, for a chunk that has a target
not far from the others (`triton_sharded`). `tests/sharded_heads.py` holds the formulas to what is
counted, to the byte.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ufm_fast.layout import height


@dataclass(frozen=True)
class Cost:
    """An evaluation of K ``classes`` and R ``rows`` in ``dim`` columns of ``itemsize`` bytes on a
    mesh of C x S ranks, in chunks of ``chunk`` rows a rank.
    """

    classes: int
    rows: int
    dim: int
    mesh: tuple[int, int]
    chunk: int
    itemsize: int = 4
    bias: bool = False
    smoothing: bool = False
    margins: bool = False
    angular: bool = False
    targets: tuple[int, int] = (0, 0)  # of others' classes, and of those here for others' rows
    hidden: tuple[int, ...] = ()  # numbers of each hidden layer
    vectors: bool = False  # squared error to target vectors

    @property
    def ranks(self) -> int:
        return self.mesh[0] * self.mesh[1]

    def sent(self) -> dict[str, int]:
        """Bytes that a rank sends for one value and gradient, by what for."""
        (C, S), P, d = self.mesh, self.ranks, self.dim
        of_classes = height(self.classes, P)
        chunks = math.ceil(height(self.rows, P) / self.chunk)
        # A sum a row, two numbers a target, a third with smoothing, the largest other logit with
        # angles; residuals need none of them, nor a mean.
        entries = 0 if self.vectors else 3 + self.smoothing + self.angular
        margins, (asks, asked) = self.margins or self.angular, self.targets
        means = 0 if self.vectors else 2 * (C - 1) * 8 * (d + self.bias) // C
        return {
            "features": 2 * (C - 1) * chunks * self.chunk * d * self.itemsize,
            "classes": 2 * (S - 1) * of_classes * (d * self.itemsize + 8 * self.bias),
            "row sums": chunks * (C - 1) * self.chunk * 8 * (2 * entries + margins),
            "targets": (2 * asked * self.itemsize + 8 * asks) * d if self.angular else 0,
            "layers": sum(2 * (P - 1) * number * self.itemsize // P for number in self.hidden),
            "sums": means * (1 + self.smoothing) + (2 + self.angular) * (2 * (P - 1) * 16 // P),
        }

    @property
    def flops(self) -> float:
        """Floating-point operations of a rank."""
        return 6.0 * self.rows * self.classes * self.dim / self.ranks

    def seconds(self, flops_a_second: float, bytes_a_second: float) -> tuple[float, float]:
        """Of the products, and of what is sent; they overlap but for the first chunk and the
        classes.
        """
        return self.flops / flops_a_second, sum(self.sent().values()) / bytes_a_second


def best_mesh(
    classes: int, rows: int, dim: int, ranks: int, chunk: int = 512, *, vectors: bool = False
) -> tuple[int, int]:
    """The mesh (C, S) of so many ranks that sends least. ``chunk``: at most so many rows a rank."""
    chunk = min(chunk, height(rows, ranks))
    meshes = [(C, ranks // C) for C in range(1, ranks + 1) if ranks % C == 0]
    costs = [Cost(classes, rows, dim, mesh, chunk, vectors=vectors) for mesh in meshes]
    return min(costs, key=lambda cost: sum(cost.sent().values())).mesh


def what_moves(mesh: tuple[int, int]) -> str:
    """Which blocks go to other ranks in an evaluation on a mesh, in words."""
    C, S = mesh
    if S == 1:
        return "features go round, classes stay"
    return (
        "classes are gathered, features stay"
        if C == 1
        else f"features go round {C}, classes are gathered by {S}"
    )
