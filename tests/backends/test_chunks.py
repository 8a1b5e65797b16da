"""Chunks: how many rows, whatever is free; buffers that are kept."""

from __future__ import annotations

import itertools

import pytest
import torch
from strategies import random_point

from ufm_fast.backends import (
    TiledBackend,
    chunks,
)
from ufm_fast.backends.chunks import buffer_bytes, chunk_rows
from ufm_fast.objective import Objective
from ufm_fast.problem import Problem


def test_out_of_memory_halves_the_chunk(monkeypatch):
    asked = []
    real = torch.empty

    def scarce(*shape, **options):
        asked.append(shape[1])
        if shape[1] > 2:
            raise torch.OutOfMemoryError("out of memory")
        return real(*shape, **options)

    problem = Problem(classes=9, dim=3)
    objective = Objective(problem, backend=TiledBackend(9))
    x = random_point(objective, 1)
    expected = objective.value_and_grad(x)
    monkeypatch.setattr(torch, "empty", scarce)
    actual = Objective(problem, backend=TiledBackend(9)).value_and_grad(x)
    assert asked[:3] == [9, 4, 2]
    assert actual.value == pytest.approx(expected.value, rel=1e-14)


def test_a_kept_buffer_changes_nothing():
    """One backend for problems of several sizes and dtypes, in and out of inference mode, against a
    new one each time.
    """
    backend = TiledBackend()
    for seed, (classes, dtype, inference) in enumerate(
        [
            (5, "float64", False),
            (5, "float64", False),
            (9, "float64", True),
            (9, "float64", False),
            (9, "float32", False),
        ]
    ):
        problem = Problem(classes=classes, dim=4, dtype=dtype)
        with torch.inference_mode(inference):
            x = random_point(Objective(problem), seed)
            found = Objective(problem, backend=backend).value_and_grad(x)
            wanted = Objective(problem, backend=TiledBackend()).value_and_grad(x)
        assert float(found.value) == float(wanted.value)
        assert torch.equal(found.gradient.W, wanted.gradient.W)
        assert torch.equal(found.gradient.H, wanted.gradient.H)


def test_chunks_are_bounded_and_never_empty():
    cpu = torch.device("cpu")
    assert chunk_rows(10, 5, 8, cpu) == 10
    for rows, classes, buffers in itertools.product(
        (1, 15, 17, 33, 64, 500, 4096, 10**6), (2, 100, 8192, 65536, 10**6), (1, 2)
    ):
        chunk = chunk_rows(rows, classes, 4, cpu, buffers)
        number = -(-rows // chunk)
        assert 1 <= chunk <= rows
        assert buffers * buffer_bytes(chunk, classes, 4) <= max(
            132 << 20, buffers * 32 * classes * 4
        )  # padding included
        if number > 1:
            assert (
                rows + number - 1
            ) // number > chunk - 64  # no chunk is much shorter than the others


def test_chunks_fit_what_is_free(monkeypatch):
    monkeypatch.setattr(chunks, "available_bytes", lambda device: 8 * 20 * 10**6 * 4)
    assert chunk_rows(10**6, 10**6, 4, torch.device("cpu")) == 16
    monkeypatch.setattr(chunks, "available_bytes", lambda device: 100)
    assert chunk_rows(10**6, 10**6, 4, torch.device("cpu")) == 1
