"""New classes for a trained network: what the first rows of their classifier do to loss and
training (arXiv 2503.06385).

A network learns the first half of the classes, then gets a head for all of them and goes on with
replay, that is on all training data. The rows of the new classes come from torch's random start,
from class means of unit features, or from the least-squares head with lambda = the weight decay.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional

from ufm_fast.continual import StreamingSums, init_rows_
from ufm_fast.errors import InputError
from ufm_fast.networks.data import DataSet
from ufm_fast.networks.models import Architecture, Network
from ufm_fast.networks.train import BLOCK, Options, Training


@dataclass(frozen=True)
class Variant:
    """How the head for all classes is begun: a method of ``init_rows_``, and whether old rows
    stay.
    """

    method: str
    keep_old: bool = True


VARIANTS = {
    "random": Variant("random"),
    "class mean": Variant("class-mean"),
    "least squares, new rows": Variant("least-squares"),
    "least squares, all rows": Variant("least-squares", keep_old=False),
}
#: The training loss that counts as learned, by the network's loss and number of classes.
LEARNED = {"mse": lambda classes: 0.1, "ce": lambda classes: 0.1 * math.log(classes)}
OPTIONS = Options(architecture=Architecture(widths=(128, 128), unbiased=1), loss="mse", steps=1500)


@dataclass(frozen=True)
class Switch:
    """One variant of one seed: training loss and test accuracy just after the switch, and the steps
    to LEARNED.

    steps: None where ``most_steps`` did not suffice.
    """

    variant: str
    seed: int
    loss: float
    accuracy: float
    steps: int | None


def switches(
    data: DataSet, options: Options = OPTIONS, *, lam: float | None = None, most_steps: int = 300
) -> Iterator[Switch]:
    """Train on the first half of the classes, then measure every variant of VARIANTS from there.

    lam: of the least-squares head, by default the weight decay. Errors: InputError for a loss
    without a row in LEARNED, or data with several labels.
    """
    if options.loss not in LEARNED or data.multi_label:
        raise InputError(
            f"loss must be one of {', '.join(LEARNED)}, with one label a sample; got "
            f"{options.loss!r} on {data.name}"
        )
    old = data.classes // 2
    first = replace(data.only(range(old)), classes=old)
    before = Training(first, options).run().network
    sums, unit = _sums(before, data)
    going_on = replace(options, schedule="constant", steps=most_steps)
    for name, variant in VARIANTS.items():
        network = _widened(before, data.classes, options.seed)
        new = range(old, data.classes)
        chosen = unit if variant.method == "class-mean" else sums
        penalty = options.weight_decay if lam is None else lam
        init_rows_(
            network.head,
            chosen,
            new,
            variant.method,
            lam=penalty,
            keep_old=variant.keep_old,
            seed=options.seed,
        )
        training = Training(data, going_on, network)
        start, accuracy = training.evaluate("train")["loss"], training.evaluate("test")["accuracy"]
        yield Switch(
            name,
            options.seed,
            start,
            accuracy,
            _steps_to(training, LEARNED[options.loss](data.classes)),
        )


@torch.no_grad()
def _sums(network: Network, data: DataSet) -> tuple[StreamingSums, StreamingSums]:
    """Of the training features of all classes, as they are and at length one."""
    dim = network.head.weight.shape[1]
    sums, unit = StreamingSums(data.classes, dim), StreamingSums(data.classes, dim)
    network.eval()
    for block in torch.split(torch.arange(len(data.train)), BLOCK):
        part = data.train.where(block)
        features = network.features(part.images)
        sums.update(features, part.labels)
        unit.update(functional.normalize(features, dim=1), part.labels)
    return sums, unit


def _widened(network: Network, classes: int, seed: int) -> Network:
    """A copy with a head for all classes: old rows kept, new ones at torch's random start."""
    wider, old = copy.deepcopy(network), network.head
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        wider.head = nn.Linear(old.in_features, classes, bias=old.bias is not None)
        wider.head.weight[: old.out_features] = old.weight
        if old.bias is not None:
            wider.head.bias[: old.out_features] = old.bias
    return wider


def _steps_to(training: Training, level: float) -> int | None:
    while training.evaluate("train")["loss"] > level:
        if training.step >= training.options.steps:
            return None
        training.run(until=training.step + 1)
    return training.step
