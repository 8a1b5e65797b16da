"""The faces that a user sees, on every device there is: the CPU, and CUDA where it is present (then
by the kernels).
"""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from ufm_fast import InputError, Problem, solve
from ufm_fast import functional as fused
from ufm_fast.cli import main
from ufm_fast.nn import UFM, LinearCrossEntropyLoss

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def focal(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    l = F.cross_entropy(z, y, reduction="none")
    return ((1 - torch.exp(-l)) ** 2 * l).mean()


LOSSES = {
    "ce": (fused.linear_cross_entropy, lambda z, y: F.cross_entropy(z, y)),
    "smoothing": (
        lambda h, W, y: fused.linear_cross_entropy(h, W, y, label_smoothing=0.1),
        lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
    ),
    "focal": (
        lambda h, W, y: fused.linear_focal_loss(h, W, y, gamma=2.0),
        focal,
    ),
    "mse": (
        fused.linear_squared_error,
        lambda z, y: 0.5 * (z - F.one_hot(y, z.shape[1])).square().sum(1).mean(),
    ),
}


def batch(device: str, dtype: torch.dtype, rows: int = 37, classes: int = 29, dim: int = 16):
    generator = torch.Generator().manual_seed(5)
    h, W = (
        torch.randn(n, dim, generator=generator).to(device=device, dtype=dtype)
        for n in (rows, classes)
    )
    return (
        h.requires_grad_(),
        W.requires_grad_(),
        torch.randint(classes, (rows,), generator=generator).to(device),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4), (torch.bfloat16, 3e-2)]
)
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradients(name, dtype, tolerance, device):
    ours, dense = LOSSES[name]
    h, W, y = batch(device, dtype)
    found = ours(h, W, y)
    assert found.device.type == device
    h64, W64 = (x.detach().double().cpu().requires_grad_() for x in (h, W))
    wanted = dense(h64 @ W64.T, y.cpu())
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=tolerance)
    pairs = zip(
        torch.autograd.grad(found, (h, W)), torch.autograd.grad(wanted, (h64, W64)), strict=True
    )
    for a, b in pairs:
        assert float((a.double().cpu() - b).norm()) <= tolerance * float(b.norm())


@pytest.mark.parametrize("device", DEVICES)
def test_second_derivatives(device):
    h, W, y = batch(device, torch.float32)
    (slope,) = torch.autograd.grad(fused.linear_cross_entropy(h, W, y), h, create_graph=True)
    (found,) = torch.autograd.grad(slope.square().sum(), W)
    h64, W64 = (x.detach().double().cpu().requires_grad_() for x in (h, W))
    (slope,) = torch.autograd.grad(F.cross_entropy(h64 @ W64.T, y.cpu()), h64, create_graph=True)
    (wanted,) = torch.autograd.grad(slope.square().sum(), W64)
    assert float((found.double().cpu() - wanted).norm()) <= 1e-4 * float(wanted.norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bad_input_is_refused_before_a_kernel_sees_it_and_the_device_goes_on(dtype, device):
    h, W, y = batch(device, dtype)
    for wrong in (
        y.clone().index_fill_(0, torch.tensor([3], device=device), value)
        for value in (29, -1, 2**40, -(2**40))
    ):
        for name in (
            "linear_cross_entropy",
            "linear_focal_loss",
            "linear_squared_error",
            "linear_pick_all",
        ):
            with pytest.raises(InputError):
                getattr(fused, name)(h, W, wrong)
        with pytest.raises(InputError):
            fused.value_and_grad("ce", h, W, wrong)
    with pytest.raises(InputError, match="at least 2 rows"):
        fused.linear_cross_entropy(h, W[:1], y)
    if device != "cpu":
        with pytest.raises(InputError, match="move"):
            fused.linear_cross_entropy(h, W.cpu(), y)
        with pytest.raises(InputError, match="move"):
            fused.linear_cross_entropy(h, W, y.cpu())
    kept = y.clone()
    kept[3] = -100
    expanded = h[:1].expand(len(y), -1)
    for good in (
        fused.linear_cross_entropy(h, W, kept),
        fused.linear_cross_entropy(expanded, W, y),
    ):
        assert bool(torch.isfinite(good))
    strided = torch.cat([W, W], 1)[:, ::2]
    fused.linear_cross_entropy(h, strided, y).backward()
    assert fused.linear_cross_entropy(h[:0], W, y[:0], reduction="none").shape == (0,)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("loss", ["ce", "mse"])
def test_module_and_solver(loss, device):
    problem = Problem(
        classes=6,
        dim=8,
        per_class=3,
        loss=loss,
        lambda_w=0.01,
        lambda_h=0.01,
        dtype="float32",
        device=device,
    )
    solution = solve(problem)
    assert solution.success
    assert solution.point.W.device.type == device
    assert solution.value == pytest.approx(solution.theory.value, rel=1e-5)
    model = UFM(problem)
    optimiser = torch.optim.LBFGS(model.parameters(), max_iter=200, line_search_fn="strong_wolfe")
    optimiser.step(model.closure)
    assert float(model().detach()) == pytest.approx(solution.theory.value, rel=1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["lbfgs", "newton-cg", "momentum"])
@pytest.mark.parametrize(
    ("loss", "bias"),
    [
        ({"smoothing": 0.1}, "none"),
        ({"loss": "focal", "gamma": 2.0}, "none"),
        ({"loss": "pick-all"}, "free"),
    ],
)
def test_losses_and_methods(loss, bias, method, device):
    problem = Problem(
        classes=6,
        dim=8,
        counts=[3, 3, 3, 3, 2, 1],
        bias=bias,
        lambda_w=0.003,
        lambda_h=0.003,
        device=device,
        dtype="float32",
        **loss,
    )
    cpu = solve(dataclasses.replace(problem, device="cpu", dtype="float64"))
    solution = solve(problem, method=method, max_steps=300)
    assert solution.point.W.device.type == device
    assert solution.value == pytest.approx(cpu.value, rel=1e-3 if method == "momentum" else 1e-5)
    assert solution.certificate.relative_gap < (1.0 if method == "momentum" else 1e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_command_line(device, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    size = (
        "--classes",
        "12",
        "--dim",
        "16",
        "--per-class",
        "3",
        "--dtype",
        "float32",
        "--device",
        device,
    )
    assert (
        main(
            [
                "solve",
                *size,
                "--lambda-w",
                "0.003",
                "--lambda-h",
                "0.003",
                "--no-plots",
                "--out",
                "run",
                "--json",
            ]
        )
        == 0
    )
    solved = json.loads(capsys.readouterr().out)
    assert main(["metrics", "run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["metrics"]
    assert found["nc2_classifier"] == pytest.approx(solved["metrics"]["nc2_classifier"], abs=1e-5)
    assert main(["plan", *size]) == 0
    assert main(["doctor"]) == 0


@pytest.mark.parametrize("device", DEVICES)
def test_loss_module_and_autocast(device):
    torch.manual_seed(0)
    module = LinearCrossEntropyLoss(16, 29).to(device)
    h, _, y = batch(device, torch.float32)
    plain = module(h, y)
    with torch.autocast(device, dtype=torch.bfloat16):
        low = module(h, y)
    assert float(low.detach()) == pytest.approx(float(plain.detach()), rel=1e-2)
    low.backward()
    assert module.linear.weight.grad is not None
