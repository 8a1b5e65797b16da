"""Training: it learns, its losses are the textbook's, decay is on every parameter, and a stop
changes nothing.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from ufm_fast.errors import InputError
from ufm_fast.networks import (
    LOSSES,
    Architecture,
    DataSet,
    Examples,
    Network,
    Options,
    Training,
    train,
)

SHAPE, CLASSES = (4, 4), 3


def _data(multi_label: bool = False) -> DataSet:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % CLASSES
    images = 0.2 * torch.rand(60, 1, *SHAPE, generator=generator)
    images[torch.arange(60), 0, labels] += 0.8  # a bright row tells the class
    if multi_label:
        labels = torch.stack(
            [labels, torch.where(torch.arange(60) < 30, -1, (labels + 1) % CLASSES)], 1
        )
    return DataSet(
        "toy", CLASSES, Examples(images[:45], labels[:45]), Examples(images[45:], labels[45:])
    )


SMALL = Options(architecture=Architecture(widths=(16, 16)), steps=60, batch=20, learning_rate=0.1)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"loss": "mse"},
        {"loss": "focal", "learning_rate": 0.3},
        {"loss": "smoothing"},
        {"optimiser": "adam", "learning_rate": 0.03},
        {"architecture": Architecture(model="cnn", widths=(16,))},
        {"architecture": Architecture(model="cnn-bn", widths=(16,))},
        {"architecture": Architecture(widths=(16,), normalised=5.0, unbiased=1)},
        {"architecture": Architecture(widths=(16,), head="etf"), "schedule": "constant"},
    ],
    ids=str,
)
def test_every_choice_learns_a_task_that_is_easy(change):
    assert train(_data(), replace(SMALL, **change)).evaluate("test")["accuracy"] > 0.9


def test_losses_are_the_textbooks():
    network = Network(SMALL.architecture, SHAPE, CLASSES)
    single, several = _data().train, _data(multi_label=True).train
    z, y = network(single.images), single.labels
    sets = torch.zeros(len(single), CLASSES + 1).scatter_(1, several.labels % (CLASSES + 1), 1)[
        :, :CLASSES
    ]
    log_loss = functional.cross_entropy(z, y, reduction="none")
    expected = {
        "ce": log_loss.mean(),
        "mse": 0.5 * (z - functional.one_hot(y, CLASSES)).square().sum(1).mean(),
        "smoothing": functional.cross_entropy(z, y, label_smoothing=0.05),
        "focal": ((1 - torch.exp(-log_loss)) ** 3 * log_loss).mean(),
        "pick-all": -(sets * z.log_softmax(1)).sum(1).mean(),
    }
    assert expected.keys() == LOSSES.keys()
    for name, value in expected.items():
        found = replace(SMALL, loss=name).loss_of(
            network, several if name == "pick-all" else single
        )
        torch.testing.assert_close(found, value)


def test_heads_without_bias_fixed_and_normalised():
    x = _data().train.images
    etf = Network(Architecture(widths=(8,), head="etf"), SHAPE, CLASSES)
    gram = etf.head.weight @ etf.head.weight.T
    torch.testing.assert_close(gram, 1.5 * torch.eye(3) - 0.5)
    assert "head.weight" not in dict(etf.named_parameters())
    assert [
        n
        for n, _ in Network(
            Architecture(widths=(8, 8), unbiased=2), SHAPE, CLASSES
        ).named_parameters()
        if "bias" in n
    ] == ["body.linear1.bias"]
    unit = Network(Architecture(widths=(16,), normalised=5.0, unbiased=1), SHAPE, CLASSES)
    torch.testing.assert_close(unit.features(x).norm(dim=1), torch.ones(len(x)))
    assert unit(x).abs().max() <= 5.0 + 1e-5


def test_decay_is_on_all_parameters():
    network = train(
        _data(),
        replace(SMALL, weight_decay=100.0, learning_rate=0.01, steps=400, schedule="constant"),
    ).network
    assert max(float(p.detach().abs().max()) for p in network.parameters()) < 1e-2


@pytest.mark.parametrize(
    "change",
    [
        {"optimiser": "sgd"},
        {"optimiser": "adam"},
        {"architecture": Architecture(model="cnn-bn", widths=(16,))},
    ],
    ids=str,
)
def test_a_run_that_goes_on_takes_the_same_steps_to_the_bit(change):
    options, data = replace(SMALL, learning_rate=0.02, **change), _data()
    whole = train(data, options)
    stopped = Training(data, options).run(until=17)
    gone_on = (
        Training(data, options).restore({k: v.clone() for k, v in stopped.state().items()}).run()
    )
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, gone_on.state()[name]), name


def test_accuracy_by_the_number_of_labels():
    training = Training(_data(multi_label=True), replace(SMALL, loss="pick-all", steps=400))
    assert training.run().evaluate("train").keys() == {
        "loss",
        "accuracy",
        "accuracy_1",
        "accuracy_2",
    }
    found = training.evaluate("train")
    assert found["accuracy"] == pytest.approx(
        (30 * found["accuracy_1"] + 15 * found["accuracy_2"]) / 45
    )
    assert found["accuracy_1"] > 0.9


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"loss": "hinge"}, "loss must be one of"),
        ({"optimiser": "lion"}, "optimiser"),
        ({"schedule": "x"}, "schedule"),
        ({"steps": 0}, "steps"),
        ({"batch": 1, "architecture": Architecture(model="cnn-bn")}, "batch must be at least 2"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"weight_decay": -1.0}, "weight_decay"),
    ],
)
def test_bad_options_are_named(bad, message):
    with pytest.raises(InputError, match=message):
        replace(SMALL, **bad)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"model": "vit"}, "model must be one of mlp, cnn, cnn-bn"),
        ({"widths": ()}, "widths"),
        ({"widths": (0,)}, "widths"),
        ({"unbiased": 9}, "unbiased"),
        ({"head": "x"}, "head"),
        ({"normalised": 0.0}, "normalised"),
    ],
)
def test_bad_architectures_are_named(bad, message):
    with pytest.raises(InputError, match=message):
        Architecture(**bad)


def test_a_run_that_diverges_names_the_rate():
    with pytest.raises(InputError, match=r"diverged: the loss after step \d+ is .*learning_rate"):
        Training(_data(), replace(SMALL, learning_rate=1e15)).run()


def test_what_does_not_fit_together():
    with pytest.raises(InputError, match="pick-all for data toy"):
        Training(_data(multi_label=True), SMALL)
    with pytest.raises(InputError, match="at least classes - 1 = 9"):
        Network(Architecture(widths=(8,), head="etf"), SHAPE, 10)
    state = Training(_data(), SMALL).state()
    with pytest.raises(InputError, match="another network"):
        Training(_data(), replace(SMALL, architecture=Architecture(widths=(5,)))).restore(state)
