"""Train a classifier of handwritten digits on several processes, with FSDP2, and its head under
FSDP2 or sharded by class.

    torchrun --nproc-per-node 2 examples/train_sharded.py

Needs scikit-learn (its 1,797 digits ship with it). Both runs start from the same weights and see
the same batches, a part of each on every process, so their losses agree. Under FSDP2 the head's
weight is gathered once a step; sharded by class it never moves, and features go round in its place:
the better where classes are more than samples of a step.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from ufm_fast.nn import LinearCrossEntropyLoss

HEADS = ("FSDP2", "by class")
BATCH = 256  # samples of a step, on all processes together


def model(kind: str, mesh: DeviceMesh) -> tuple[nn.Module, LinearCrossEntropyLoss]:
    """Body and head, from the same numbers on every process."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
    head = LinearCrossEntropyLoss(64, 10, bias=True)
    if kind == "by class":
        parallelize_module(
            head, mesh, {"linear": ColwiseParallel()}
        )  # weight and bias with Shard(0)
        wrapped = [fully_shard(body, mesh=mesh)]
    else:  # the weight stays until the backward has used it
        wrapped = [
            fully_shard(body, mesh=mesh),
            fully_shard(head, mesh=mesh, reshard_after_forward=False),
        ]
    for module in (
        wrapped
    ):  # the loss is that of all samples, so gradients are summed over the processes, not averaged
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    return body, head


def train(
    kind: str, mesh: DeviceMesh, images: Tensor, labels: Tensor, epochs: int = 10
) -> tuple[list[float], float, float]:
    """Losses of the last batch of each epoch, the final accuracy, and samples a second after the
    first epoch.
    """
    body, head = model(kind, mesh)
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=1e-2)
    history, started, samples = [], 0.0, 0
    for epoch in range(epochs):
        if epoch == 1:  # the first one warms up
            started = time.perf_counter()
        for batch in torch.randperm(len(labels)).split(BATCH)[
            :-1
        ]:  # the same on every process, by model's seed
            mine = batch.chunk(mesh.size())[mesh.get_local_rank()]
            features = DTensor.from_local(body(images[mine]), mesh, [Shard(0)])
            value = head(features, labels[mine])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            samples += len(batch) * (epoch > 0)
        history.append(value.item())
    speed = samples / (time.perf_counter() - started)
    with torch.no_grad():
        weight, bias = (x.full_tensor() for x in (head.linear.weight, head.linear.bias))
        accuracy = float(
            (nn.functional.linear(body(images), weight, bias).argmax(1) == labels).float().mean()
        )
    return history, accuracy, speed


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    digits = load_digits()
    images, labels = (
        torch.tensor(digits.data, dtype=torch.float32) / 16.0,
        torch.tensor(digits.target),
    )
    for kind in HEADS:
        history, accuracy, speed = train(kind, mesh, images, labels)
        if dist.get_rank() == 0:
            print(
                f"head {kind}: loss {history[0]:.6f} after one epoch, {history[-1]:.6f} after "
                f"ten, accuracy {accuracy:.4f}, {speed:.0f} samples/s"
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
