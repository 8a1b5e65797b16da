"""Probing: the numbers of the whole batch, the model left as it was, mistakes named."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from ufm_fast.errors import InputError
from ufm_fast.metrics import (
    ClassStatistics,
    effective_rank,
    nc1_pinv,
    nc1_quotient,
    nc1_trace,
    stable_rank,
)
from ufm_fast.networks import probe, probe_solution
from ufm_fast.problem import Problem, TargetSets
from ufm_fast.solving import solve

K = 4


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(1, 6, 3),
            relu=nn.ReLU(),
            norm=nn.BatchNorm2d(6),
            drop=nn.Dropout(0.5),
            flat=nn.Flatten(),
            hidden=nn.Linear(6 * 16, 12),
            act=nn.ReLU(),
            head=nn.Linear(12, K),
        )
    )


def _batches(number: int = 5) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(9, 1, 6, 6, generator=generator), torch.randint(K, (9,), generator=generator))
        for _ in range(number)
    ]


def test_numbers_are_those_of_all_features_at_once():
    model, batches = _model(), _batches()
    found = probe(model, [nn.ReLU, "head"], batches, K)
    assert list(found) == ["relu", "act", "head"]
    model.eval()
    y = torch.cat([labels for _, labels in batches])
    # Batch by batch, as probe runs it: how a float32 product is rounded depends on its number of
    # rows.
    with torch.no_grad():
        runs = [
            {"relu": model[:2](x).mean((2, 3)), "act": model[:7](x), "head": model(x)}
            for x, _ in batches
        ]
    features = {name: torch.cat([run[name] for run in runs]) for name in runs[0]}
    for name, h in features.items():
        whole, layer = ClassStatistics(h, y, K), found[name]
        assert layer.within == pytest.approx(float(whole.within.trace()), rel=1e-10)
        assert layer.between == pytest.approx(float(whole.between().trace()), rel=1e-10)
        for measure in (nc1_pinv, nc1_trace, nc1_quotient):
            assert getattr(layer, measure.__name__) == pytest.approx(measure(whole), rel=1e-10)
        for measure in (effective_rank, stable_rank):
            assert getattr(layer, measure.__name__) == pytest.approx(
                measure(whole.centred_means), rel=1e-10
            )
        nearest = torch.cdist(h.double(), whole.class_means).argmin(1)
        assert layer.mismatch == pytest.approx(float((nearest != y).double().mean()))
    # relu is followed by hidden, whose 96 inputs are not relu's 6 channels; nothing follows head
    assert found["relu"].alignment is None
    assert found["head"].alignment is None
    means = torch.stack([features["act"][y == k].double().mean(0) for k in range(K)])
    V = torch.linalg.svd(model.head.weight.detach().double(), full_matrices=False).Vh.T
    U = torch.linalg.svd(means.T, full_matrices=False).U
    assert found["act"].alignment == pytest.approx(
        float(torch.linalg.svdvals(V[:, :K].T @ U[:, :K]).sum()) / K
    )


def test_channels_are_samples_when_unfolded():
    model, batches = _model(), _batches()
    found = probe(model, "conv", batches, K, unfold="channels")["conv"]
    y = torch.cat([labels for _, labels in batches])
    with torch.no_grad():
        rows = torch.cat([model[:1](x).permute(0, 2, 3, 1).reshape(-1, 6) for x, _ in batches])
    assert found.nc1_pinv == pytest.approx(
        nc1_pinv(ClassStatistics(rows, y.repeat_interleave(16), K)), rel=1e-10
    )


def test_a_convolution_aligned_with_its_channel_means():
    model = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 8, 1, bias=False))
    model[1].weight.data = torch.cat([torch.eye(4), torch.zeros(4, 4)])[:, :, None, None]
    labels = torch.arange(8) % 2
    images = torch.eye(4)[labels][:, :, None, None] + 0.01 * torch.rand(8, 4, 1, 1)
    assert probe(model, "0", [(images, labels)], 2)["0"].alignment == pytest.approx(1, abs=0.3)


def _snapshot(model: nn.Module) -> list[Tensor]:
    return [t.clone() for t in model.state_dict().values()] + [
        p.grad.clone() for p in model.parameters()
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model, batches = _model(), _batches()
    x, y = batches[0]
    model.head.eval()  # a mode that is not the others'
    nn.functional.cross_entropy(model(x), y).backward()
    before, modes = _snapshot(model), [m.training for m in model.modules()]
    state = torch.random.get_rng_state()
    if fails:
        with pytest.raises(InputError, match="layer 'relu': features must be finite"):
            probe(model, nn.ReLU, [(x, y), (x * torch.nan, y)], K)
    else:
        probe(model, nn.ReLU, batches, K)
    assert all(torch.equal(a, b) for a, b in zip(before, _snapshot(model), strict=True))
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(state, torch.random.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act, self.unused = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.act(self.act(x))
        return found


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("hiden", "no layer 'hiden'; the nearest names are hidden"),
        (nn.LSTM, "no module of type LSTM"),
    ],
)
def test_layers_that_are_not_there(layers, message):
    with pytest.raises(InputError, match=message):
        probe(_model(), layers, _batches(), K)


def test_layers_and_batches_that_do_not_fit():
    x, y = torch.randn(6, 3), torch.arange(6) % 2
    with pytest.raises(InputError, match="runs twice"):
        probe(_Twice(), "act", [(x, y)], 2)
    with pytest.raises(InputError, match="'unused' never ran"):
        probe(_Twice(), "unused", [(x, y)], 2)
    with pytest.raises(InputError, match=r"shape \(6,\)"):
        probe(nn.Sequential(nn.ReLU()), "0", [(x, y[:5])], 2)
    with pytest.raises(InputError, match="list or a DataLoader"):
        probe(nn.Sequential(nn.ReLU()), "0", iter([(x, y)]), 2)
    assert (
        probe(nn.Sequential(nn.ReLU()), "0", iter([(x, y)]), 2, mismatch=False)["0"].mismatch
        is None
    )


def test_a_deep_solution_has_the_numbers_of_a_network_with_its_factors():
    problem = Problem(
        loss="mse",
        classes=3,
        per_class=4,
        dim=5,
        layers=3,
        widths=(5, 6, 7),
        activation="relu",
        lambda_w=1e-2,
    )
    solution = solve(problem, reduce="none", start="normal", max_steps=20)
    found, x = probe_solution(solution), solution.point
    model = nn.Sequential(
        nn.Identity(),
        nn.Linear(5, 6, bias=False),
        nn.ReLU(),
        nn.Linear(6, 7, bias=False),
        nn.ReLU(),
        nn.Linear(7, 3, bias=False),
    ).double()
    for place, weight in zip((1, 3, 5), (*x.hidden, x.W), strict=True):
        model[place].weight.data = weight
    layers = probe(model, [nn.Identity, nn.ReLU], [(x.H, problem.sample_labels)], 3)
    assert list(found) == ["layer0", "layer1", "layer2"]
    for mine, other in zip(found.values(), layers.values(), strict=True):
        assert mine.numbers() == pytest.approx(other.numbers(), rel=1e-9)
    assert found["layer0"].nc1_quotient > 0
    reduced = probe_solution(solve(Problem(classes=3, counts=[5, 2, 1], dim=4), max_steps=3))
    assert list(reduced) == ["layer0"]
    assert (reduced["layer0"].within, reduced["layer0"].mismatch) == (0, 0)


def test_samples_with_several_labels_have_no_class_means():
    problem = Problem(
        loss="pick-all",
        target_sets=TargetSets.create([0, 1, 2, 4], [0, 1, 0, 2], 3),
        classes=3,
        dim=4,
    )
    with pytest.raises(InputError, match="several labels"):
        probe_solution(solve(problem, max_steps=1))
