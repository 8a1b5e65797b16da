"""Training in a run directory: log, checkpoints, the end's numbers, and going on where it stopped.

The directory is one of ufm-fast like any other, its config marked ``kind = "network"``. Its state
holds, beside network and optimiser, the classifier and the training features as W, H, b and labels,
so ``metrics``, ``plot`` and ``export`` take it.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ufm_fast.doctor import environment
from ufm_fast.errors import InputError
from ufm_fast.metrics import collect
from ufm_fast.networks.data import load
from ufm_fast.networks.models import Architecture
from ufm_fast.networks.overlay import has_tail, tail_of
from ufm_fast.networks.probe import probe
from ufm_fast.networks.train import BLOCK, Options, Training
from ufm_fast.runs.directory import RunDirectory, refuse_occupied
from ufm_fast.runs.files import config_hash
from ufm_fast.runs.signals import ending_signals
from ufm_fast.runs.state import Progress, read_safetensors, write_state
from ufm_fast.runs.words import quoted
from ufm_fast.solvers.minimise import log_spaced

KIND = "network"
SAVE_SECONDS = 10.0
#: Metrics of the last layer that each log point has, where samples have one label; where the last
#: two layers are those of the extended model, beside `Tail.collapse`.
LOGGED = ("nc1_pinv", "nc1_quotient", "nc2_classifier", "nc2_means", "nc3")

Report = Callable[[int, float], None]


def options_of(config: Mapping[str, Any]) -> Options:
    """Options of a flat configuration. Errors: InputError naming what does not fit."""
    parts = str(config["widths"]).split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise InputError(f"widths must be whole numbers as 128,128, got {config['widths']!r}")
    of_network = {name: config[name] for name in ("model", "unbiased", "head", "normalised")}
    architecture = Architecture(widths=tuple(int(part) for part in parts), **of_network)
    names = (
        "loss",
        "smoothing",
        "gamma",
        "optimiser",
        "schedule",
        "learning_rate",
        "weight_decay",
        "steps",
        "batch",
        "seed",
    )
    return Options(architecture=architecture, **{name: config[name] for name in names})


@dataclass
class TrainingRun:
    """A training and the directory that it writes to."""

    run: RunDirectory
    training: Training
    seconds: float = 0.0
    fresh: bool = True

    @classmethod
    def begin(cls, config: Mapping[str, Any], out: Path | None) -> TrainingRun:
        """Check everything, then make the directory. Errors: InputError; then nothing is left
        behind.
        """
        config = {"kind": KIND, **config}
        digest = config_hash(config)
        path = (
            out
            or Path("runs") / f"{config['data']}-{config['model']}-{config['loss']}-{digest[:8]}"
        )
        refuse_occupied(path, digest)
        training = _training(config)
        return cls(RunDirectory.create(path, config, digest, environment()), training)

    @classmethod
    def resume(cls, path: Path, name: str = "resume") -> TrainingRun:
        """Go on from the last checkpoint; ``name``: of the argument that gave the path.

        Errors: InputError for a run of another kind, changed or damaged.
        """
        run = RunDirectory.open(path, name, by="train")
        if run.config.get("kind") != KIND:
            mend = (
                f"go on with: ufm-fast solve --resume {quoted(path)}"
                if name == "resume"
                else "give one of ufm-fast train"
            )
            raise InputError(f"{name}: {path} is a run of ufm-fast solve; {mend}")
        if config_hash(run.config) != run.hash:
            raise InputError(
                f"{name}: the settings in {path / 'config.json'} were changed after the run was "
                f"made; undo that"
            )
        training = _training(run.config)
        if not run.state_file.exists():
            return cls(run, training, fresh=False)
        tensors, metadata = read_safetensors(run.state_file, name)
        return cls(run, training.restore(tensors), float(metadata.get("seconds", 0.0)), fresh=False)

    @property
    def finished(self) -> bool:
        return self.training.step >= self.training.options.steps and self.run.summary is not None

    def execute(self, report: Report | None = None) -> dict[str, Any]:
        """Train to the end, or to an interrupt; returns the summary. The state is saved either
        way.
        """
        with self.run.locked(), _interrupts() as interrupted:
            if not self.fresh:
                self.run.truncate_log(self.training.step)
            log = _Log(self, interrupted, report)
            try:
                log.point()
                self.training.run(log)
                outcome = "finished"
            except KeyboardInterrupt:
                outcome = "interrupted"
            log.save()
            summary = {
                "outcome": outcome,
                "steps": self.training.step,
                "seconds": log.seconds(),
                "hash": self.run.hash,
            }
            summary |= summary_of(self.training)
            self.run.write_summary(summary)
        return summary


def summary_of(training: Training) -> dict[str, Any]:
    """Loss and accuracy of both parts, and the collapse of each hidden layer on the training
    images.
    """
    data, network = training.data, training.network
    found: dict[str, Any] = {part: training.evaluate(part) for part in ("train", "test")}
    found["trainable"] = sum(p.numel() for p in network.parameters() if p.requires_grad)
    examples = data.train
    if data.multi_label:
        alone = examples.where(examples.labels[:, 1] < 0)
        examples = type(alone)(alone.images, alone.labels[:, 0])
    blocks = torch.split(torch.arange(len(examples)), BLOCK)
    batches = [(examples.images[block], examples.labels[block]) for block in blocks]
    layers = probe(network, network.hidden, batches, data.classes)
    found["layers"] = {name: layer.numbers() for name, layer in layers.items()}
    return found


def _training(config: Mapping[str, Any]) -> Training:
    data = load(
        config["data"],
        seed=config["seed"],
        least=config["least"],
        look_alikes=config["look_alikes"],
    )
    return Training(data, options_of(config))


class _Log:
    """After each step: a line at log-spaced steps, the state every ten seconds, the caller's bar,
    the interrupt.
    """

    def __init__(
        self, run: TrainingRun, interrupted: Callable[[], bool], report: Report | None
    ) -> None:
        self.run, self.training, self.interrupted, self.report = (
            run,
            run.training,
            interrupted,
            report,
        )
        self._spaced = log_spaced()
        self._next = next(step for step in self._spaced if step >= run.training.step)
        self._begun = self._saved = time.monotonic()

    def seconds(self) -> float:
        return self.run.seconds + time.monotonic() - self._begun

    def __call__(self, step: int, loss: float) -> None:
        if step >= self._next or step == self.training.options.steps:
            self.point()
        if time.monotonic() - self._saved >= SAVE_SECONDS:
            self.save()
        if self.report is not None:
            self.report(step, loss)
        if self.interrupted():
            raise KeyboardInterrupt

    def point(self) -> None:
        step = self.training.step
        while self._next <= step:
            self._next = next(self._spaced)
        if any(record["step"] == step for record in self.run.run.records()[-1:]):
            return
        test = {f"test_{name}": value for name, value in self.training.evaluate("test").items()}
        train = self.training.evaluate("train")
        self.training.check_loss(train["loss"])
        metrics = {} if self.training.data.multi_label else self._metrics()
        record = {
            "step": step,
            "value": train.pop("loss"),
            "gradient_norm": None,
            "seconds": self.seconds(),
            **train,
        }
        self.run.run.append({**record, **test, **metrics})
        self.training.network.train()

    def _metrics(self) -> dict[str, float]:
        (W, b), H = self.training.network.classifier(), _features(self.training)
        found = collect(H, W, self.training.data.train.labels, b, pairwise="none")
        of_tail = tail_of(self.training).collapse() if has_tail(self.training) else {}
        return {name: found[name] for name in LOGGED if name in found} | of_tail

    @torch.no_grad()
    def save(self) -> None:
        tensors = {**self.training.state(), **_head(self.training)}
        write_state(self.run.run, tensors, Progress(self.training.step, 0, self.seconds()), "none")
        self._saved = time.monotonic()


@torch.no_grad()
def _features(training: Training) -> Tensor:
    images = training.data.train.images
    training.network.eval()
    found = [
        training.network.features(images[block])
        for block in torch.split(torch.arange(len(images)), BLOCK)
    ]
    training.network.train()
    return torch.cat(found)


def _head(training: Training) -> dict[str, Tensor]:
    """Classifier, training features and their labels, as the state of a solve has them."""
    (W, b), labels = training.network.classifier(), training.data.train.labels
    tensors = {"W": W, "H": _features(training), "row_counts": torch.ones(len(labels))}
    if b is not None:
        tensors["b"] = b
    flat = labels[labels >= 0]
    tensors["counts"] = torch.bincount(flat, minlength=training.data.classes)
    if labels.dim() == 1:
        return {**tensors, "labels": labels}
    ends = (labels >= 0).sum(1).cumsum(0)
    return {
        **tensors,
        "row_indices": flat,
        "row_indptr": torch.cat([torch.zeros(1, dtype=torch.int64), ends]),
    }


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or another ending signal has come, asked between steps: within one, an
    optimiser has moved half of all.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    numbers = (signal.SIGINT, *ending_signals())
    before = {number: signal.signal(number, lambda *_: asked.set()) for number in numbers}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
