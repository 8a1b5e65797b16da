"""What stands between the free features H and the head: nothing, or layers
A = s(... s(H W_1') ... W_(M-1)').

The head never knows: it is given A. One forward pass is a Tape, which pushes directions through and
pulls gradients back. Both activations are positively homogeneous, s(c z) = c s(z) for c > 0, so
that scales of H and of the layers may be moved about (`scales`). A row of TRUNKS is all that
another activation needs; a trunk without layers is the plain model.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ufm_fast.arguments import MOST_DIM, sequence, whole
from ufm_fast.errors import InputError

#: A number larger than it is a slip.
MOST_LAYERS = 1000
Gradients = tuple[Tensor, tuple[Tensor, ...]]  # of H and of the hidden layers


class Linear:
    """s(z) = z."""

    gain = 1.0

    def value(self, z: Tensor) -> Tensor:
        """s(z)."""
        return z

    def slope(self, z: Tensor) -> Tensor | None:
        """s'(z), None where it is one everywhere."""
        return None

    def bend(self, z: Tensor) -> Tensor | None:
        """s''(z), None where it is zero everywhere."""
        return None


@dataclass(frozen=True)
class ReLU(Linear):
    """s(z) = max(z, 0), or with ``rounding`` e > 0 the smooth (z + sqrt(z^2 + e^2) - e)/2, which
    tends to it.

    At z = 0 the slope of the exact one is 0: the piece on which zero stays zero. ``rest``: inputs
    up to that part of the largest count as zero there.
    """

    rounding: float = 0.0
    rest: float = 0.0
    gain = 2.0**0.5  # keeps the scale of a random layer's output

    def value(self, z: Tensor) -> Tensor:
        e = self.rounding
        if e == 0.0:
            return torch.relu(
                z
            )  # whose derivative at 0 is 0, as ``slope`` says; that of clamp_min is 1
        root = torch.hypot(z, z.new_tensor(e))
        # Where z < 0 the sum cancels: z + root = e^2 / (root - z).
        return 0.5 * (torch.where(z < 0, e * e / (root + z.abs()), z + root) - e)

    def slope(self, z: Tensor) -> Tensor:
        if self.rounding == 0.0:
            return (z > (self.rest * z.abs().max() if self.rest else 0.0)).to(z.dtype)
        return 0.5 * (1.0 + z / torch.hypot(z, z.new_tensor(self.rounding)))

    def bend(self, z: Tensor) -> Tensor | None:
        e = self.rounding
        return None if e == 0.0 else 0.5 * e * e / torch.hypot(z, z.new_tensor(e)) ** 3


#: Activations by the name that ``activation=`` takes.
TRUNKS: dict[str, type[Linear]] = {"linear": Linear, "relu": ReLU}


def checked_widths(given: Any, layers: int, dim: int) -> int | tuple[int, ...] | None:
    """``widths`` of a problem: None, one number for d_1 .. d_(M-1), or all of d_0 .. d_(M-1).

    Errors: InputError / InputTypeError naming the number and the mend.
    """
    if given is None:
        return None
    if isinstance(given, (int, np.integer)):
        width = whole(given, "widths", 1, MOST_DIM)
        if layers == 1:
            raise InputError(
                f"widths = {width} are of hidden layers, and layers is 1; give layers >= 2, or dim "
                f"alone"
            )
        return width
    widths = tuple(whole(d, "widths", 1, MOST_DIM) for d in sequence(given, "widths"))
    if len(widths) != layers:
        raise InputError(
            f"widths must hold d_0 .. d_(M-1), {layers} numbers for layers = {layers}, got "
            f"{len(widths)}"
        )
    if widths[0] != dim:
        raise InputError(
            f"widths begins with {widths[0]} but dim is {dim}; dim is d_0, the columns of H"
        )
    return widths


@dataclass(frozen=True)
class Trunk:
    """``widths``: columns of H first, of the features last; a single width is no layer at all."""

    widths: tuple[int, ...]
    activation: Linear = Linear()  # noqa: RUF009  # has no state

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Shape of each hidden layer, (outputs, inputs)."""
        return tuple((after, before) for before, after in pairwise(self.widths))

    @property
    def entries(self) -> int:
        """Numbers in all hidden layers."""
        return sum(outputs * inputs for outputs, inputs in self.shapes)

    @property
    def empty(self) -> bool:
        """Whether the head sees H itself."""
        return len(self.widths) == 1

    def forward(self, H: Tensor, hidden: tuple[Tensor, ...]) -> Tape:
        """The features of H (R x d_0) behind the layers W_j (d_j x d_(j-1))."""
        inputs, sums = [H], []
        for W in hidden:
            sums.append(inputs[-1] @ W.T)
            inputs.append(self.activation.value(sums[-1]))
        slopes, bends = (tuple(map(f, sums)) for f in (self.activation.slope, self.activation.bend))
        return Tape(tuple(inputs), tuple(hidden), slopes, bends)


@dataclass(frozen=True)
class Tape:
    """A forward pass: the input of each layer and last the features, the layers, and slope and bend
    of each activation.

    With Z_j = A_(j-1) W_j', A_j = s(Z_j), and G_j the gradient in A_j: the gradient in Z_j is G_j
    s', in W_j (G_j s')' A_(j-1).
    """

    inputs: tuple[Tensor, ...]
    layers: tuple[Tensor, ...]
    slopes: tuple[Tensor | None, ...]
    bends: tuple[Tensor | None, ...]

    @property
    def features(self) -> Tensor:
        """What the head sees, R x d_(M-1)."""
        return self.inputs[-1]

    def _tangents(
        self, dH: Tensor, dlayers: tuple[Tensor, ...]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Changes of the layers' inputs (the features last) and of their sums."""
        moves, sums = [dH], []
        for X, W, dW, slope in zip(self.inputs, self.layers, dlayers, self.slopes, strict=False):
            sums.append((moves[-1] @ W.T).addmm_(X, dW.T))
            moves.append(_times(sums[-1], slope))
        return moves, sums

    def push(self, dH: Tensor, dlayers: tuple[Tensor, ...]) -> Tensor:
        """The features' change along a direction."""
        return self._tangents(dH, dlayers)[0][-1]

    def pull(self, G: Tensor) -> Gradients:
        """Gradients of H and of the layers from that of the features."""
        gradients = []
        for X, W, slope in reversed(list(zip(self.inputs, self.layers, self.slopes, strict=False))):
            G = _times(G, slope)
            gradients.append(G.T @ X)
            G = G @ W
        return G, tuple(reversed(gradients))

    def curve(self, G: Tensor, dG: Tensor, dH: Tensor, dlayers: tuple[Tensor, ...]) -> Gradients:
        """The change of ``pull(G)`` along a direction along which G changes by dG."""
        moves, sums = self._tangents(dH, dlayers)
        changes = []
        for j in reversed(range(len(self.layers))):
            W, bend = self.layers[j], self.bends[j]
            dG = _times(dG, self.slopes[j])
            if bend is not None:
                dG = dG + G * bend * sums[j]
            G = _times(G, self.slopes[j])
            changes.append((dG.T @ self.inputs[j]).addmm_(G.T, moves[j]))
            G, dG = G @ W, (dG @ W).addmm_(G, dlayers[j])
        return dG, tuple(reversed(changes))


def _times(x: Tensor, slope: Tensor | None) -> Tensor:
    return x if slope is None else x * slope
