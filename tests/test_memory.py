"""What memory is free: of the machine, of nested control groups, and where nobody tells."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from ufm_fast import memory

CPU = torch.device("cpu")


def test_what_is_free_is_known_without_proc_too_or_is_not_asked(monkeypatch):
    def missing(name, **_):
        raise FileNotFoundError(name)

    monkeypatch.setattr(memory, "open", missing, raising=False)
    monkeypatch.setattr(memory, "control_groups", lambda: [])
    free = types.SimpleNamespace(available=3 << 33)
    monkeypatch.setitem(sys.modules, "psutil", types.SimpleNamespace(virtual_memory=lambda: free))
    assert memory.available_bytes(CPU) == 3 << 33
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert memory.available_bytes(CPU) > 1 << 60


def _limit(folder, names, limit, used, cached=0):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(
        (names[0], names[1], "memory.stat"),
        (limit, used, f"anon 1\n{names[2]} {cached}"),
        strict=True,
    ):
        (folder / name).write_text(f"{text}\n")


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_group_from_the_own_one_up_counts(version, tmp_path, monkeypatch):
    names, root = (memory._V1, tmp_path / "memory") if version == 1 else (memory._V2, tmp_path)
    none = 2**63 - 4096 if version == 1 else "max"
    own = tmp_path / "own"
    own.write_text("4:memory:/a/b\n1:cpu:/z\n0::/\n" if version == 1 else "0::/a/b\n")
    _limit(root / "a", names, 1000, 700, 50)
    _limit(root / "a" / "b", names, none, 300)
    _limit(root / "z", names, 10, 0)
    groups = memory.control_groups.__wrapped__(tmp_path, own)
    assert [folder for folder, _ in groups] == [root / "a" / "b", root / "a"]
    monkeypatch.setattr(memory, "control_groups", lambda: groups)
    assert memory.available_bytes(CPU) == 350
    _limit(root / "a" / "b", names, 400, 300)
    assert memory.available_bytes(CPU) == 100
    _limit(root / "a" / "b", names, 200, 300)
    assert memory.available_bytes(CPU) == 0


def test_a_container_that_sees_its_group_as_the_top(tmp_path):
    (tmp_path / "own").write_text("0::/docker/of/the/host\n")
    _limit(tmp_path, memory._V2, 1000, 700)
    assert memory.control_groups.__wrapped__(tmp_path, tmp_path / "own") == [(tmp_path, memory._V2)]
    assert memory.control_groups.__wrapped__(tmp_path / "none", tmp_path / "none") == []
