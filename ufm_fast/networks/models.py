"""Two small networks, each a body that makes features and one linear head, so that a fused loss can
take both apart.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from ufm_fast.arguments import factor, whole
from ufm_fast.errors import InputError
from ufm_fast.theory import simplex_frame

CHANNELS = (32, 64)
HEADS = ("learned", "etf")


@dataclass(frozen=True)
class Architecture:
    """What a network is made of; checked when it is built.

    model: a name of MODELS. widths: of the hidden linear layers. unbiased: the number of last
    linear layers, the head counted, that have no bias. head: "learned", or "etf": a simplex that is
    not trained, rows of norm one. normalised: t for logits t <w_k/|w_k|, h/|h|> (arXiv 2209.09211),
    None for plain ones.
    Errors: InputError naming what does not fit.
    """

    model: str = "mlp"
    widths: tuple[int, ...] = (128, 128)
    unbiased: int = 0
    head: str = "learned"
    normalised: float | None = None

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise InputError(f"model must be one of {', '.join(MODELS)}; got {self.model!r}")
        if self.head not in HEADS:
            raise InputError(f"head must be one of {', '.join(HEADS)}; got {self.head!r}")
        if not self.widths:
            raise InputError("widths must name at least one hidden layer, as 128,128")
        for width in self.widths:
            whole(width, "widths", 1, 2**20)
        whole(self.unbiased, "unbiased", 0, len(self.widths) + 1)
        if self.normalised is not None:
            factor(self.normalised, "normalised")


class Network(nn.Module):
    """logits = W h(x) + b, with h(x) = ``features(x)`` and (W, b) = ``classifier()``.

    images: (B, 1, height, width); features (B, d), d the last width; logits (B, K). ``body`` has
    named layers ``linear1, relu1, ...`` (and ``conv1``, ...), the names that a probe takes; a fixed
    head is a buffer.
    Errors: InputError for a fixed simplex in fewer than K - 1 dimensions.
    """

    def __init__(
        self, architecture: Architecture, shape: tuple[int, int], classes: int, seed: int = 0
    ) -> None:
        super().__init__()
        classes, dim = whole(classes, "classes", 2), architecture.widths[-1]
        if architecture.head == "etf" and dim < classes - 1:
            raise InputError(
                f"head etf needs a last width of at least classes - 1 = {classes - 1}, got {dim}"
            )
        self.architecture = architecture
        biased = (
            len(architecture.widths) + 1 - architecture.unbiased
        )  # the first so many linear layers have a bias
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = MODELS[architecture.model](shape, architecture.widths, biased)
            self.head = nn.Linear(
                dim, classes, bias=architecture.unbiased == 0 and architecture.head == "learned"
            )
        if architecture.head == "etf":
            del self.head.weight
            self.head.register_buffer("weight", _fixed_simplex(classes, dim, seed))

    def features(self, images: Tensor) -> Tensor:
        found: Tensor = self.body(images)
        return found if self.architecture.normalised is None else functional.normalize(found, dim=1)

    def classifier(self) -> tuple[Tensor, Tensor | None]:
        if self.architecture.normalised is None:
            return self.head.weight, self.head.bias
        return self.architecture.normalised * functional.normalize(
            self.head.weight, dim=1
        ), self.head.bias

    def forward(self, images: Tensor) -> Tensor:
        if self.architecture.normalised is None:
            logits: Tensor = self.head(self.features(images))  # as a module, so that hooks see it
            return logits
        return functional.linear(self.features(images), *self.classifier())

    @property
    def hidden(self) -> list[str]:
        """Names of the activations, in order: where collapse by layer is measured."""
        return [name for name, layer in self.named_modules() if isinstance(layer, nn.ReLU)]


def _fixed_simplex(classes: int, dim: int, seed: int) -> Tensor:
    """A simplex of unit rows, (K, d), turned at random: features behind a ReLU are not negative,
    and no axis may be special.
    """
    generator = torch.Generator().manual_seed(seed)
    rotation: Tensor = torch.linalg.qr(
        torch.randn(dim, dim, dtype=torch.float64, generator=generator)
    ).Q
    frame = math.sqrt(classes / (classes - 1)) * simplex_frame(classes, dim)
    turned: Tensor = frame @ rotation
    return turned.to(torch.get_default_dtype())


def _linear_layers(
    inputs: int, widths: tuple[int, ...], biased: int, batch_norm: bool = False
) -> list[tuple[str, nn.Module]]:
    layers: list[tuple[str, nn.Module]] = []
    for number_, (before, after) in enumerate(zip((inputs, *widths), widths, strict=False), 1):
        layers.append((f"linear{number_}", nn.Linear(before, after, bias=number_ <= biased)))
        if batch_norm:
            layers.append((f"norm{number_}", nn.BatchNorm1d(after)))
        layers.append((f"relu{number_}", nn.ReLU()))
    return layers


def _mlp(shape: tuple[int, int], widths: tuple[int, ...], biased: int) -> nn.Sequential:
    layers = _linear_layers(shape[0] * shape[1], widths, biased)
    return nn.Sequential(OrderedDict([("flatten", nn.Flatten()), *layers]))


def _cnn(
    shape: tuple[int, int], widths: tuple[int, ...], biased: int, batch_norm: bool = False
) -> nn.Sequential:
    """Two blocks of a 3 x 3 convolution, ReLU and 2 x 2 pooling, then the linear layers.

    batch_norm: before each ReLU.
    """
    layers: list[tuple[str, nn.Module]] = []
    for number_, (before, after) in enumerate(zip((1, *CHANNELS), CHANNELS, strict=False), 1):
        layers.append((f"conv{number_}", nn.Conv2d(before, after, 3, padding=1)))
        if batch_norm:
            layers.append((f"conv_norm{number_}", nn.BatchNorm2d(after)))
        layers += [
            (f"conv_relu{number_}", nn.ReLU()),
            (f"pool{number_}", nn.MaxPool2d(2)),
        ]
    inputs = CHANNELS[-1] * (shape[0] // 4) * (shape[1] // 4)
    layers += [("flatten", nn.Flatten()), *_linear_layers(inputs, widths, biased, batch_norm)]
    return nn.Sequential(OrderedDict(layers))


#: Bodies by the name that ``model=`` and ``--model`` take: (height and width, widths, biased
#: layers) -> modules.
MODELS: dict[str, Callable[[tuple[int, int], tuple[int, ...], int], nn.Sequential]] = {
    "mlp": _mlp,
    "cnn": _cnn,
    "cnn-bn": partial(_cnn, batch_norm=True),
}
