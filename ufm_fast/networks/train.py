"""Training a small network: one loop, the library's fused losses, weight decay on all parameters.

The order of the samples follows from the seed and the epoch, and dropout or other random layers
there are none, so a run that goes on from ``Training.state`` takes the same steps to the bit as one
that was never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ufm_fast import functional
from ufm_fast.arguments import number, whole
from ufm_fast.errors import InputError
from ufm_fast.networks.data import DataSet, Examples
from ufm_fast.networks.models import Architecture, Network

OPTIMISERS = ("sgd", "adam")
SCHEDULES = ("cosine", "constant")
MOMENTUM = 0.9
#: Images at once where nothing is trained.
BLOCK = 2048

HeadLoss = Callable[["Options", Tensor, Tensor, Tensor | None, Tensor], Tensor]
#: Losses by name: mean over a batch, of features (B, d), W (K, d), b (K,) or None, and labels.
LOSSES: dict[str, HeadLoss] = {
    "ce": lambda o, h, W, b, y: functional.linear_cross_entropy(h, W, y, linear_bias=b),
    "mse": lambda o, h, W, b, y: functional.linear_squared_error(h, W, y, linear_bias=b),
    "smoothing": lambda o, h, W, b, y: functional.linear_cross_entropy(
        h, W, y, linear_bias=b, label_smoothing=o.smoothing
    ),
    "focal": lambda o, h, W, b, y: functional.linear_focal_loss(
        h, W, y, linear_bias=b, gamma=o.gamma
    ),
    "pick-all": lambda o, h, W, b, y: functional.linear_pick_all(h, W, y, linear_bias=b),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a network is trained; checked when made.

    loss: a name of LOSSES (pick-all for several labels). weight_decay: lambda of lambda/2 |.|^2 on
    every trained parameter, biases too. optimiser: "sgd" with momentum 0.9, or "adam" (the decay in
    its gradient). schedule: of the rate, "cosine" to zero at the last step or "constant". Errors:
    InputError naming the option.
    """

    architecture: Architecture = field(default_factory=Architecture)
    loss: str = "ce"
    smoothing: float = 0.05
    gamma: float = 3.0
    optimiser: str = "sgd"
    schedule: str = "cosine"
    learning_rate: float = 0.05
    weight_decay: float = 5e-4
    steps: int = 2000
    batch: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("loss", tuple(LOSSES)),
            ("optimiser", OPTIMISERS),
            ("schedule", SCHEDULES),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}"
                )
        for name in ("steps", "batch"):
            whole(getattr(self, name), name, 1)
        if self.batch == 1 and self.architecture.model == "cnn-bn":
            raise InputError("batch must be at least 2 for model cnn-bn, whose means are a batch's")
        whole(self.seed, "seed", 0, 2**63 - 1)
        if not number(self.learning_rate, "learning_rate") > 0:
            raise InputError(f"learning_rate must be > 0, got {self.learning_rate}")
        if not number(self.weight_decay, "weight_decay") >= 0:
            raise InputError(f"weight_decay must be >= 0, got {self.weight_decay}")

    def loss_of(self, network: Network, examples: Examples) -> Tensor:
        """The mean loss of a batch, differentiable."""
        features, (W, b) = network.features(examples.images), network.classifier()
        return LOSSES[self.loss](self, features, W, b, examples.labels)


class Training:
    """A network in training: ``run`` takes steps, ``state`` and ``restore`` stop and go on.

    Errors: InputError where the loss does not fit the number of labels a sample.
    """

    def __init__(self, data: DataSet, options: Options, network: Network | None = None) -> None:
        if data.multi_label != (options.loss == "pick-all"):
            fits = "pick-all" if data.multi_label else "ce, mse, smoothing or focal"
            raise InputError(f"loss must be {fits} for data {data.name}, got {options.loss!r}")
        self.data, self.options, self.step = data, options, 0
        self.network = network or Network(
            options.architecture, data.shape, data.classes, options.seed
        )
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.optimiser = _optimiser(parameters, options)

    def run(
        self, on_step: Callable[[int, float], None] | None = None, until: int | None = None
    ) -> Training:
        """Steps up to ``until`` (default: all). on_step(step, batch loss) is called after each.
        Ctrl-C falls between steps.
        """
        self.network.train()
        last = self.options.steps if until is None else min(until, self.options.steps)
        for batch in self._batches():
            if self.step >= last:
                break
            for group in self.optimiser.param_groups:
                group["lr"] = self.rate()
            self.optimiser.zero_grad(set_to_none=True)
            loss = self.options.loss_of(self.network, self.data.train.where(batch))
            self.check_loss(float(loss.detach()))
            torch.autograd.backward(loss)
            self.optimiser.step()
            self.step += 1
            if on_step is not None:
                on_step(self.step, float(loss.detach()))
        return self

    def check_loss(self, loss: float) -> None:
        """Errors: InputError for a loss after the steps so far that is no number, or infinite."""
        if not math.isfinite(loss):
            raise InputError(
                f"training diverged: the loss after step {self.step} is {loss}; lower "
                f"learning_rate = {self.options.learning_rate:g}"
            )

    def rate(self) -> float:
        """Learning rate of the next step."""
        if self.options.schedule == "constant":
            return self.options.learning_rate
        return (
            self.options.learning_rate
            * 0.5
            * (1 + math.cos(math.pi * self.step / self.options.steps))
        )

    def _batches(self) -> Iterator[Tensor]:
        """Index sets from this step on: each epoch is a permutation of its own, cut in equal
        batches; the rest is left out.
        """
        samples = len(self.data.train)
        size = min(self.options.batch, samples)
        epoch, skip = divmod(self.step, samples // size)
        while True:
            generator = torch.Generator().manual_seed(
                (self.options.seed * 1_000_003 + epoch) % 2**63
            )
            batches = torch.split(
                torch.randperm(samples, generator=generator)[: samples // size * size], size
            )
            yield from batches[skip:]
            epoch, skip = epoch + 1, 0

    def state(self) -> dict[str, Tensor]:
        """All that ``restore`` needs, as flat named tensors (what safetensors takes)."""
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        for index, values in self.optimiser.state_dict()["state"].items():
            tensors |= {
                f"optimiser.{index}.{k}": torch.as_tensor(v)
                for k, v in values.items()
                if v is not None
            }
        return {**tensors, "step": torch.tensor(self.step)}

    def restore(self, tensors: dict[str, Tensor]) -> Training:
        """Go on from a ``state``. Errors: InputError where it is of another network."""
        network = {
            k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")
        }
        try:
            self.network.load_state_dict(network)
        except RuntimeError as error:
            raise InputError(
                f"state: it is of another network ({str(error).splitlines()[-1].strip()})"
            ) from error
        slots: dict[int, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimiser."):
                _, index, key = name.split(".", 2)
                slots.setdefault(int(index), {})[key] = tensor.clone()
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": slots})
        self.step = int(tensors["step"])
        return self

    @torch.no_grad()
    def evaluate(self, part: str = "test") -> dict[str, float]:
        """Mean loss and accuracy on "train" or "test"; of several labels also the accuracy by their
        number.

        A sample with m labels counts as right where its m largest logits are those of its labels.
        """
        examples: Examples = getattr(self.data, part)
        was_training = self.network.training
        self.network.eval()
        loss, hits = 0.0, []
        for block in torch.split(torch.arange(len(examples)), BLOCK):
            piece = examples.where(block)
            features, (W, b) = self.network.features(piece.images), self.network.classifier()
            mean = LOSSES[self.options.loss](self.options, features, W, b, piece.labels)
            loss += float(mean) * len(piece) / len(examples)
            hits.append(_right(torch.nn.functional.linear(features, W, b), piece.labels))
        self.network.train(was_training)
        right = torch.cat(hits).double()
        found = {"loss": loss, "accuracy": float(right.mean())}
        if self.data.multi_label:
            sizes = (examples.labels >= 0).sum(1)
            found |= {
                f"accuracy_{m}": float(right[sizes == m].mean())
                for m in sorted(set(sizes.tolist()))
            }
        return found


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    if labels.dim() == 1:
        return logits.argmax(1) == labels
    wanted = torch.zeros_like(logits, dtype=torch.bool)
    rows, columns = (labels >= 0).nonzero(as_tuple=True)
    wanted[rows, labels[rows, columns]] = True
    lowest = torch.where(wanted, logits, math.inf).amin(1)
    return lowest > torch.where(wanted, -math.inf, logits).amax(1)


def _optimiser(parameters: list[torch.nn.Parameter], options: Options) -> torch.optim.Optimizer:
    rate, decay = options.learning_rate, options.weight_decay
    if options.optimiser == "adam":
        return torch.optim.Adam(parameters, lr=rate, weight_decay=decay)
    return torch.optim.SGD(parameters, lr=rate, momentum=MOMENTUM, weight_decay=decay)


def train(data: DataSet, options: Options) -> Training:
    """A network trained for all its steps.

    >>> trained = train(load("digits"), Options(loss="mse", steps=500))
    >>> trained.evaluate("test")["accuracy"]
    """
    return Training(data, options).run()
