"""A network with many classes, from nothing but installed packages: the characters of matplotlib's
fonts (ours).

The last width is beyond K - 1, so that a simplex fits and the model's minimum is the closed form.

The full setting ends at a training accuracy of 99.46 % (99.3 % after 8 of its 10 epochs) and a test
accuracy of .868, in 165 s of the processor after the data are made, the measuring among them (one
thread of an AMD EPYC (Zen 3), torch 2.13.0, 2026-11-30). The last layer has not collapsed by then:
the NC1 quotient rises from .42 to .57 while NC2 of the means falls from 1.29 to 1.25 and NC3 from
1.34 to 1.31, and the objective, .031, is 17 times the model's minimum, .0019. Without batch
normalisation 20 epochs of a network with 256 features ended at 96.8 %.
"""

from __future__ import annotations

import time

import torch

from ufm_fast import plots
from ufm_fast.metrics import collect
from ufm_fast.networks import Architecture, Options, Training, load
from ufm_fast.networks.train import BLOCK
from ufm_fast.reproduce.claim import Claim, Evidence, Quantity
from ufm_fast.reproduce.common import Rows
from ufm_fast.theory import ce_minimum

DECAY, BATCH, EPOCHS = 1e-6, 64, 10
#: Epochs after which the features are measured, beside the last.
LOOKS = (1, 2, 3, 4, 6, 8)
MEASURED = ("nc1_quotient", "nc2_classifier", "nc2_means", "nc3")


@torch.no_grad()
def _measured(training: Training) -> dict[str, float]:
    """Metrics of the last layer, and the model's minimum with lambda_H by balance and equal classes
    of the mean size.
    """
    network, examples, K = training.network, training.data.train, training.data.classes
    network.eval()
    H = torch.cat(
        [
            network.features(examples.images[block])
            for block in torch.split(torch.arange(len(examples)), BLOCK)
        ]
    )
    (W, b), N = network.classifier(), len(examples)
    found = collect(H, W, examples.labels, b, pairwise="none")
    lambda_h = DECAY * float(W.square().sum() / H.square().sum())
    penalties = DECAY * float(W.square().sum())  # of W and H together: each has half
    train, test = training.evaluate("train"), training.evaluate("test")
    return {
        "train_accuracy": train["accuracy"],
        "test_accuracy": test["accuracy"],
        "loss": train["loss"],
        "objective": train["loss"] + penalties,
        "model": ce_minimum(K, max(round(N / K), 1), DECAY, lambda_h),
        **{name: found[name] for name in MEASURED},
    }


def _large(quick: bool) -> Evidence:
    data = load("glyphs", least=22 if quick else 14, look_alikes=False)
    epoch = len(data.train) // BATCH
    epochs = 3 if quick else EPOCHS
    options = Options(
        architecture=Architecture(model="cnn-bn", widths=(1024,)),
        optimiser="adam",
        learning_rate=2e-3,
        weight_decay=DECAY,
        batch=BATCH,
        steps=epoch * epochs,
    )
    training, begun = Training(data, options), time.process_time()
    rows: Rows = []
    for number in (*(n for n in LOOKS if n < epochs), epochs):
        training.run(until=number * epoch)
        rows.append(
            {"epoch": number, "cpu_seconds": time.process_time() - begun, **_measured(training)}
        )
    numbers = {
        name: rows[-1][name]
        for name in ("train_accuracy", "test_accuracy", "objective", "model", *MEASURED)
    }
    numbers |= {"classes": float(data.classes), "cpu_seconds": rows[-1]["cpu_seconds"]}
    drawn, axes = plots.panels(2)
    names = {
        "nc1_quotient": "NC1 quotient",
        "nc2_classifier": "NC2 W",
        "nc2_means": "NC2 means",
        "nc3": "NC3",
    }
    plots.curves(axes[0], rows, names, against="epoch")
    plots.curves(
        axes[1], rows, {"objective": "objective", "model": "minimum of the model"}, against="epoch"
    ).set_ylabel("value")
    return Evidence(numbers, rows, drawn)


ROWS = (
    Claim(
        "glyphs-large-k",
        "ours",
        "A small network fits hundreds of classes long before its last layer collapses: NC1 to NC3 "
        "by epoch, beside the model's minimum.",
        "none",
        "898 characters that 14 fonts draw, look-alikes left out, CNN with batch normalisation and "
        "1024 features, batch 64, Adam 2e-3, decay 1e-6, 10 epochs",
        tuple(
            Quantity(name)
            for name in (
                "train_accuracy",
                "test_accuracy",
                "objective",
                "model",
                *MEASURED,
                "classes",
                "cpu_seconds",
            )
        ),
        _large,
        seconds=200,
        quick="characters that 22 fonts draw, 3 epochs",
        quick_seconds=20,
    ),
)
