"""Squared error to target vectors over the ranks of a mesh: residuals E = H W' + b - Y (`residual`)
of the rows that go round and the classes that stay (`rounds`), in float64.

What is where. Every rank reads all target vectors, as it does all samples, and keeps those of its
own rows. Before the first evaluation each gives the others of its column the entries of their
classes, so that the rank at places (i, j) of the mesh has Y for the rows of place j and the classes
of place i, R t / P numbers as before: 8 (C - 1)/C h_R t bytes a rank, once.

What moves. Of an evaluation the features and their gradients along the class axis, and the classes
and theirs along the sample axis: with C S = P ranks and b bytes a number about

    2 (C - 1) h_R d b + 2 (S - 1) h_K d b

bytes a rank, h_R = ceil(R/P), h_K = ceil(t/P) (`cost`, to the byte; a Hessian product three of each
in place of two). With S = 1 no row of W moves; with C = 1, which sends least where outputs are
fewer than rows, no row of H does, and W is gathered. No rank ever holds all of W and of H.

2026-11-30. Gram matrices and the products Y'H and Y W, block by block of the classes, would send
the 2 (P - 1) h_K d b of C = 1, and do as many operations, for Y is as many numbers as E. But a Gram
value is a difference of O(1) terms and has lost the digits of a small minimum, as in one process
(`dense_targets`): ranks would stop elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from ufm_fast.backends.base import (
    Gradients,
    HeadInput,
    HeadPlan,
    HeadResult,
    HeadShape,
    LogitGradient,
    in_sums_dtype,
)
from ufm_fast.backends.residual import add_products, block_rows
from ufm_fast.backends.rounds import (
    Sums,
    chunk_height,
    chunk_weights,
    gathered_classes,
    going_round,
    layout_of,
    own_rows,
)
from ufm_fast.backends.squared_head import SquaredErrorHead
from ufm_fast.dense_targets import DenseTargets
from ufm_fast.layout import Layout, Mesh, block, share

_Chunk = tuple[slice, Tensor, Tensor, list[Tensor]]


class ShardedVectorsHead:
    """``chunk``: rows of a chunk on all ranks together; by default blocks of a million
    residuals.
    """

    def __init__(self, mesh: Mesh, chunk: int | None = None) -> None:
        self.mesh, self.chunk = mesh, chunk

    def value_and_grad(self, x: HeadInput, out: Gradients) -> HeadResult:
        sweep, sums = self.sweep(x), Sums.of(self.mesh, x, out.cleared())
        fit = torch.zeros((), dtype=torch.float64, device=x.weight.device)
        for part, E, o, (h,) in sweep.chunks(sweep.x.features):
            fit += 0.5 * (o @ torch.linalg.vecdot(E, E))
            _add(sums, part, (E.mul_(o[:, None]), h, sweep.W))
        sums.settle()
        return HeadResult(fit.new_tensor(self.mesh.total(float(fit))), None)

    def hvp(self, x: HeadInput, v: HeadInput, out: Gradients) -> None:
        v, sweep, sums = in_sums_dtype(v), self.sweep(x), Sums.of(self.mesh, x, out.cleared())
        dW, db = sweep.group(v.weight), None if v.bias is None else sweep.group(v.bias)
        for part, E, o, (h, dh) in sweep.chunks(sweep.x.features, v.features):
            dE = (dh @ sweep.W.T).addmm_(h, dW.T)
            dE = dE if db is None else dE.add_(db)
            terms = ((dE, h, sweep.W), (E, dh, dW))
            _add(sums, part, *((G.mul_(o[:, None]), left, right) for G, left, right in terms))
        sums.settle()

    def losses(self, x: HeadInput) -> Tensor:
        sweep, axis, found = self.sweep(x), self.mesh.classes, [x.row_weight.new_zeros(0).double()]
        for part, E, _, _ in sweep.chunks(sweep.x.features):
            losses = axis.sum_(0.5 * torch.linalg.vecdot(E, E), "row sums")
            found.append(own_rows(sweep.layout, sweep.height, losses, part))
        return torch.cat(found)

    def logit_gradient(self, x: HeadInput) -> LogitGradient:
        return _Gradient(self, x)

    def plan(self, shape: HeadShape) -> HeadPlan:
        C, S = self.mesh.shape
        rows, classes = share(shape.rows, S), share(shape.classes, C)
        plan = SquaredErrorHead().plan(replace(shape, rows=rows, classes=classes))
        twice = 8 * rows * classes if C > 1 else 0  # a rank's own rows of Y stay too
        chunk = min(rows, self.chunk or block_rows(classes, shape.dim))
        return replace(
            plan,
            chunk=chunk,
            workspace=plan.workspace + twice,
            workspace_hessian=plan.workspace_hessian + twice,
        )

    def sweep(self, x: HeadInput) -> _Residuals:
        return _Residuals(x, self.chunk)


class _Residuals:
    """The residuals of a head, a chunk at a time. ``W``: rows of the classes of this rank's place,
    float64.
    """

    def __init__(self, x: HeadInput, chunk: int | None) -> None:
        self.x, self.layout = in_sums_dtype(x), layout_of(x)
        classes = max(1, self.layout.mesh.shape[1] * self.layout.class_height)
        most = chunk or block_rows(classes, x.weight.shape[1])  # of sizes alone: on all ranks one
        self.height = chunk_height(self.layout, most)
        self.W = self.group(self.x.weight)
        self.bias = None if x.bias is None else self.group(x.bias.double())
        self.targets = _of_place(x.targets, self.layout)
        self.row_weight = chunk_weights(x, self.layout, self.height)

    def group(self, x: Tensor) -> Tensor:
        """The rows of x of all classes of the place, float64."""
        return gathered_classes(self.layout, x).double()

    def chunks(self, *moving: Tensor) -> Iterator[_Chunk]:
        """Which of this rank's rows are in each chunk, the chunk's E, its weights, and its rows of
        what moves, float64 (the features first). E may be overwritten.
        """
        for number, part, now in going_round(self.layout, self.height, None, *moving):
            place = slice(number * self.height, (number + 1) * self.height)
            rows = [x.double() for x in now]
            E = rows[0] @ self.W.T
            E = E if self.bias is None else E.add_(self.bias)
            for of_rank, Y in zip(torch.split(E, self.height), self.targets, strict=True):
                of_rank[: len(Y[place])].sub_(Y[place])
            yield part, E, self.row_weight[:, place].reshape(-1), rows


def _of_place(targets: object, layout: Layout) -> list[Tensor]:
    """The target vectors of the rows of each rank of this column, in the classes of this rank's
    place; remembered on the targets.
    """
    assert isinstance(targets, DenseTargets)
    kept, key = targets.remembered, ("place", layout.mesh.shape)
    if key not in kept:
        kept[key] = _swapped(targets.values, layout)
    return cast("list[Tensor]", kept[key])


def _swapped(values: Tensor, layout: Layout) -> list[Tensor]:
    mesh, axis = layout.mesh, layout.mesh.classes
    if axis.size == 1:
        return [values]
    pieces = [values[:, layout.group_classes(place)].reshape(-1) for place in range(axis.size)]
    parts = [
        block(layout.rows, mesh.ranks, place * mesh.shape[1] + mesh.samples.place)
        for place in range(axis.size)
    ]
    own = layout.group_classes()
    shapes = [(part.stop - part.start, own.stop - own.start) for part in parts]
    sizes = [rows * classes for rows, classes in shapes]
    got = axis.swap(torch.cat(pieces), [piece.numel() for piece in pieces], sizes, "targets")
    return [
        part.reshape(shape) for part, shape in zip(torch.split(got, sizes), shapes, strict=True)
    ]


def _add(sums: Sums, part: slice, *terms: tuple[Tensor, Tensor, Tensor]) -> None:
    """Sums of G'h and G w over terms (G, h, w), those of the rows on their way home."""
    forward = sums.forward(terms[0][1])
    add_products(Gradients(forward, sums.weight, sums.bias), slice(None), terms)
    sums.send(forward, part)


class _Gradient:
    """G = D E: this rank's rows of G right, and its classes of G' left, of its blocks of those."""

    def __init__(self, head: ShardedVectorsHead, x: HeadInput) -> None:
        self.head, self.x = head, x

    def times(self, right: Tensor) -> Tensor:
        product = right.new_zeros(self.x.features.shape[0], right.shape[1])
        sweep = self.head.sweep(self.x)
        sums = Sums.of(self.head.mesh, self.x, Gradients(product, None, None))
        of_classes = sweep.group(right)
        for part, E, o, (h,) in sweep.chunks(sweep.x.features):
            _add(sums, part, (E.mul_(o[:, None]), h, of_classes))
        sums.settle()
        return product

    def transposed_times(self, left: Tensor) -> Tensor:
        product = left.new_zeros(self.x.weight.shape[0], left.shape[1])
        sweep = self.head.sweep(self.x)
        sums = Sums.of(self.head.mesh, self.x, Gradients(None, product, None))
        for part, E, o, (_, own) in sweep.chunks(sweep.x.features, left):
            _add(sums, part, (E.mul_(o[:, None]), own, sweep.W))
        sums.settle()
        return product
