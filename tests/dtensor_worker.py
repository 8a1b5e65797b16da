"""What a rank does in the tests of DTensors: ``python dtensor_worker.py RANK FOLDER DEVICE RANKS``.

One start serves all tests: all ranks together, then the first two, and meanwhile the last alone.
Each writes RANK-NUMBER.json for the number of ranks together: for each check its name, an error and
what is allowed.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from dtensor_options import (
    Check,
    buffers,
    numbers,
    options,
    relative,
    second_derivatives,
    spread,
    whole,
    whole_only,
)
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from ufm_fast.adjustments import Adjustment
from ufm_fast.errors import InputError
from ufm_fast.functional import distributed, linear_cross_entropy
from ufm_fast.nn import LinearCrossEntropyLoss

#: (N, K, d): blocks of one height, ragged ones of both, and a rank without rows.
SHAPES = ((6, 4, 3), (7, 5, 3), (1, 3, 2))


def values(mesh: DeviceMesh) -> Iterator[Check]:
    """Value and gradients of both ways against one process."""
    cases = itertools.product(
        SHAPES, ("mean", "sum", "none"), (0.0, 0.1), (False, True), (1.0, 300.0)
    )
    for (N, K, d), reduction, smoothing, biased, scale in cases:
        H, W, b = scale * numbers(N, d), numbers(K, d), numbers(K) if biased else None
        target, upstream = torch.randint(K, (N,)), numbers(N)
        if N > 1:
            target[N // 2] = -1
            H[N // 2] = torch.nan
        given = {"reduction": reduction, "ignore_index": -1, "label_smoothing": smoothing}
        tensors = [x.requires_grad_() for x in (H, W, b) if x is not None]
        one = linear_cross_entropy(H, W, target, linear_bias=b, **given)
        one.backward(upstream if reduction == "none" else 2.0 * one.new_ones(()))
        for by_class in (True, False):
            name = f"{N} {K} {reduction} {smoothing} {biased} {scale} by class {by_class}"
            parts = [
                spread(mesh, H),
                *(
                    spread(mesh, x) if by_class else x.detach().clone().requires_grad_()
                    for x in tensors[1:]
                ),
            ]
            many = linear_cross_entropy(
                parts[0],
                parts[1],
                spread(mesh, target),
                linear_bias=parts[2] if biased else None,
                **given,
            )
            many.backward(
                spread(mesh, upstream)
                if reduction == "none"
                else distribute_tensor(
                    2.0 * one.detach().new_ones(()), mesh, [Replicate()], src_data_rank=None
                )
            )
            yield f"{name} value", relative(many.full_tensor(), one), 1e-12
            for x, part in zip(tensors, parts, strict=True):
                gradient = whole(mesh, part.grad)
                yield f"{name} gradient {tuple(x.shape)}", relative(gradient, x.grad), 1e-12


def weights(mesh: DeviceMesh) -> Iterator[Check]:
    """Weights of classes and samples, and a divisor, both ways against one process."""
    H, W, target, upstream = numbers(7, 3), numbers(5, 3), torch.randint(5, (7,)), numbers(7)
    of_classes, of_samples = torch.rand(5), torch.rand(7)
    cases = itertools.product(
        ("mean", "sum", "none"), (None, of_classes), (None, of_samples), (None, 3.0), (0.0, 0.1)
    )
    for reduction, by_class, by_sample, divisor, smoothing in cases:
        if divisor and reduction == "none":
            continue
        given = {"reduction": reduction, "divisor": divisor, "label_smoothing": smoothing}
        one_h, one_w = (x.detach().clone().requires_grad_() for x in (H, W))
        one = linear_cross_entropy(
            one_h, one_w, target, weight=by_class, sample_weight=by_sample, **given
        )
        (one @ upstream if reduction == "none" else one).backward()
        for sharded in (True, False):
            name = f"weights {reduction} {by_class} {by_sample} {divisor} {smoothing} {sharded}"
            x = spread(mesh, H.clone().requires_grad_())
            classifier = W.detach().clone().requires_grad_()
            classifier = spread(mesh, classifier) if sharded else classifier
            samples = None if by_sample is None else spread(mesh, by_sample)
            many = linear_cross_entropy(
                x, classifier, spread(mesh, target), weight=by_class, sample_weight=samples, **given
            )
            (many * spread(mesh, upstream) if reduction == "none" else many).sum().backward()
            yield f"{name} value", relative(many.full_tensor(), one), 1e-12
            yield f"{name} weight", relative(whole(mesh, classifier.grad), one_w.grad), 1e-12
            yield f"{name} features", relative(x.grad.full_tensor(), one_h.grad), 1e-12


def edges(mesh: DeviceMesh) -> Iterator[Check]:
    """Means over no rows, half precision, parts that require no gradient, and shards that are on
    their way.
    """
    H, W, target = numbers(5, 4), numbers(6, 4), torch.tensor([0, 5, 2, 1, 1])
    for classifier in (W, spread(mesh, W)):
        x = spread(mesh, H.requires_grad_())
        empty = linear_cross_entropy(x, classifier, spread(mesh, torch.full((5,), -100)))
        empty.backward()
        yield "mean of no rows is NaN", float(not empty.full_tensor().isnan()), 0.0
        yield "with gradients of zero", float(x.grad.full_tensor().norm()), 0.0
        spoilt = H.detach().clone()
        spoilt[1] = torch.nan
        y, scale = spread(mesh, spoilt.requires_grad_()), torch.tensor(0.7).requires_grad_()
        given = {"weight": torch.tensor([1.0] * 5 + [0.0]), "logit_scale": scale}
        linear_cross_entropy(y, classifier, spread(mesh, target), **given).backward()
        finite = [v.isfinite().all() for v in (scale.grad, y.grad.full_tensor())]
        yield "a row of class weight 0 may hold anything", float(not all(finite)), 0.0
        signs = torch.tensor([1.0, -0.5, *[0.0] * 4])  # which sum to 0 over the rows
        over_0, exact = (
            linear_cross_entropy(*tensors, weight=signs)
            for tensors in ((x, classifier, spread(mesh, target)), (H, W, target))
        )
        yield "mean over weights of 0", float(over_0.full_tensor() != exact), 0.0
        yield "which is infinite", float(exact.isfinite()), 0.0
        short = linear_cross_entropy(x.bfloat16(), classifier.bfloat16(), spread(mesh, target))
        yield "half precision", float(short.dtype != torch.bfloat16), 0.0
        yield (
            "half precision value",
            relative(short.full_tensor().double(), linear_cross_entropy(H, W, target)),
            1e-2,
        )
    moved = distribute_tensor(W, mesh, [Shard(1)], src_data_rank=None).redistribute(
        placements=[Shard(0)]
    )
    coming = distribute_tensor(H.detach(), mesh, [Shard(1)], src_data_rank=None).redistribute(
        placements=[Shard(0)]
    )
    found = linear_cross_entropy(coming, moved, spread(mesh, target))
    yield "redistributed", relative(found.full_tensor(), linear_cross_entropy(H, W, target)), 1e-12


def refusals(mesh: DeviceMesh) -> Iterator[Check]:
    """Each is refused on both ranks, and none of them waits for the other."""
    rank = mesh.get_local_rank()
    H, W, target = (
        spread(mesh, numbers(6, 4)),
        spread(mesh, numbers(6, 4)),
        spread(mesh, torch.arange(6)),
    )
    whole, mine = numbers(6, 4), target.to_local()

    def call(
        input: Any = H, weight: Any = W, labels: Any = target, **given: Any
    ) -> Callable[[], Tensor]:
        return lambda: linear_cross_entropy(input, weight, labels, **given)

    def local(x: Tensor) -> DTensor:
        return DTensor.from_local(x, mesh, [Shard(0)], run_check=False)

    shape = {"shape": torch.Size([6, 4]), "stride": (4, 1)}
    uneven = DTensor.from_local(
        numbers(4 - 2 * rank, 4), mesh, [Shard(0)], run_check=False, **shape
    )
    words = {
        "input must be a DTensor": call(input=whole),
        "input must be a DTensor|rank 1 was given": call(input=(H, whole)[rank]),
        "input must have placements": call(input=H.redistribute(placements=[Replicate()])),
        "linear_weight must have placements": call(weight=W.redistribute(placements=[Replicate()])),
        "linear_bias must be a DTensor": call(linear_bias=whole[:, 0]),
        "target must have placements": call(labels=target.redistribute(placements=[Replicate()])),
        "weight must be a plain tensor": lambda: linear_cross_entropy(
            H, W, target, weight=spread(mesh, whole[:, 0])
        ),
        "weight differs": lambda: linear_cross_entropy(
            H, W, target, weight=whole[:, 0].abs() + rank
        ),
        "logit_scale differs": call(logit_scale=1.0 + rank),
        "logit_scale must have placements": call(logit_scale=spread(mesh, whole[0])),
        "softcap differs": call(softcap=(3.0, None)[rank]),
        "adjustment differs": call(adjustment=Adjustment(offset=whole[:, 0] + rank)),
        "adjustment goes with class indices": call(
            adjustment=Adjustment(margin=whole[:, 0]), softcap=3.0
        ),
        "main_grad differs": call(main_grad=((W.detach(), None)[rank], None)),
        "main_grad must be a DTensor": call(main_grad=(whole, None)),
        "main_grad of linear_weight must be a plain tensor": call(
            weight=whole, main_grad=(W, None)
        ),
        "options must be None": call(options=3),
        "divisor differs": call(divisor=3.0 + rank),
        "sample_weight must have placements": call(
            sample_weight=spread(mesh, whole[:, 0]).redistribute(placements=[Replicate()])
        ),
        "target must hold class indices": call(labels=mine.double()),
        "reduction must be one of": call(reduction="max"),
        "target must have shape": call(labels=torch.arange(6)),
        "rows of input differs": call(
            input=local(numbers(3 + rank, 4)), labels=torch.arange(3 + rank)
        ),
        "where distribute_tensor puts": call(input=uneven, labels=mine),
        "input must have shape": call(weight=spread(mesh, numbers(6, 2, 4))),
        "target must lie in|rank 1 was given": call(labels=local(mine + 3 * rank)),
        "linear_weight differs": call(weight=(W, whole)[rank]),
        "linear_bias differs": call(linear_bias=(None, spread(mesh, whole[:, 0]))[rank]),
        "reduction differs": call(reduction=("sum", "mean")[rank]),
        "requires_grad differs": call(input=H.detach().requires_grad_(rank == 0)),
    }
    for message, refused in words.items():
        try:
            refused()
            said = "nothing"
        except InputError as error:
            said = str(error)
        yield f"{message}: {said}", float(not any(part in said for part in message.split("|"))), 0.0
    x = H.detach().requires_grad_()
    for reduction in ("mean", "none"):
        value = linear_cross_entropy(x, W, target, reduction=reduction).sum()
        (slope,) = torch.autograd.grad(value, x, create_graph=True)
        try:
            torch.autograd.grad(slope.sum(), x, create_graph=True)
            said = "nothing"
        except NotImplementedError as error:
            said = str(error)
        yield f"third derivatives: {said}", float("third derivatives" not in said), 0.0


def messages(mesh: DeviceMesh) -> Iterator[Check]:
    """By class no weight moves and features go round once each way, but rows that labels name for
    weights with smoothing; under FSDP2 the weight is gathered once.
    """
    N, K, d = 8, 1000, 4
    H, target = spread(mesh, numbers(N, d).requires_grad_()), spread(mesh, torch.arange(N))
    torch.manual_seed(1)
    head = LinearCrossEntropyLoss(d, K, bias=True, dtype=torch.float64)
    expected = head(H.full_tensor().detach(), target.full_tensor())
    expected.backward()
    exact = head.linear.weight.grad
    by_class, wrapped = (
        LinearCrossEntropyLoss(d, K, bias=True, dtype=torch.float64) for _ in range(2)
    )
    for module in (by_class, wrapped):
        module.load_state_dict(head.state_dict())
    parallelize_module(by_class, mesh, {"linear": ColwiseParallel()})
    fully_shard(wrapped, mesh=mesh, reshard_after_forward=False).set_gradient_divide_factor(1.0)
    traffic = distributed._mesh(mesh.get_group(), 2, mesh.get_local_rank(), H.device).traffic
    linear, rows, of_classes = by_class.linear, 2 * (N // 2) * d * 8, torch.rand(K)
    for given, more in (
        ({}, 0),
        ({"softcap": 3.0}, 0),
        ({"adjustment": Adjustment(margin=torch.rand(K))}, 0),
        ({"weight": of_classes, "label_smoothing": 0.1}, 2 * rows),
    ):
        traffic.clear()
        linear_cross_entropy(H, linear.weight, target, linear_bias=linear.bias, **given).backward()
        yield f"{[*given]}: features go once each way", abs(traffic["features"] - rows), 0.0
        rest = traffic.total() - traffic["features"]
        yield f"{[*given]}: else numbers of rows", max(0.0, rest - 600.0 - more), 0.0
    linear.weight.grad = None
    by_class(H, target).backward()
    with CommDebugMode() as heard:
        wrapped(H, target).backward()
    gathers = {
        str(name): count for name, count in heard.get_comm_counts().items() if "gather" in str(name)
    }
    yield f"gathers of the weight, and the message {gathers}", abs(sum(gathers.values()) - 2.0), 0.0
    for name, module in (("by class", by_class), ("FSDP2", wrapped)):
        yield f"module {name}", relative(module.linear.weight.grad.full_tensor(), exact), 1e-12


def example(mesh: DeviceMesh) -> Iterator[Check]:
    """Both heads of the example learn alike, as one process does."""
    import train_sharded

    images = torch.rand(2 * train_sharded.BATCH + 1, 64)
    labels = torch.randint(10, (len(images),))
    first, second = (
        train_sharded.train(kind, mesh, images, labels, epochs=3)[0] for kind in train_sharded.HEADS
    )
    yield f"example {first} {second}", relative(torch.tensor(second), torch.tensor(first)), 1e-4


OF_ANY = (options, buffers, second_derivatives)
OF_TWO = (values, weights, whole_only, edges, refusals, messages, example)


def main() -> None:
    rank, folder, device, ranks = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    torch.set_num_threads(1)
    torch.set_default_device(device if device == "cpu" else f"{device}:{rank}")
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=60),
    )
    together = [list(range(ranks)), *([[0, 1], [2]] if ranks > 2 else [])]
    meshes = [DeviceMesh(device, members) for members in together]
    for members, mesh in zip(together, meshes, strict=True):
        if rank in members:
            checks: list[Check] = []
            for checked in OF_ANY + OF_TWO if len(members) == 2 else OF_ANY:
                torch.manual_seed(0)
                checks += list(checked(mesh))
            (folder / f"{rank}-{len(members)}.json").write_text(json.dumps(checks))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
