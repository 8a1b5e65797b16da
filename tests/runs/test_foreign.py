"""Files from elsewhere that are none of ours, or hold more than memory."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from command_line import refused

from ufm_fast.errors import InputError
from ufm_fast.runs import foreign
from ufm_fast.runs.foreign import read_start, read_target_sets, read_tensors


def test_an_archive_whose_members_are_no_arrays(tmp_path: Path) -> None:
    with zipfile.ZipFile("bad.npz", "w") as archive:
        archive.writestr("W", b"text")
    with pytest.raises(InputError, match=r"source: W in bad\.npz is no array"):
        read_tensors(Path("bad.npz"), "source")


def test_an_archive_is_measured_before_it_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(
        "zeros.npz", indptr=np.zeros(10**6, dtype=np.int64), indices=np.zeros(4, dtype=np.int64)
    )
    assert Path("zeros.npz").stat().st_size < 10**5
    monkeypatch.setattr(foreign, "available_bytes", lambda device: 8 * 10**6)
    with monkeypatch.context() as patch:
        patch.setattr(np.lib.format, "read_array", lambda *_, **__: pytest.fail("unpacked"))
        with pytest.raises(InputError, match=r"unpacks to 0\.008 GB"):
            read_target_sets(Path("zeros.npz"), None)
    monkeypatch.setattr(foreign, "available_bytes", lambda device: 8 * 10**6 + 100)
    assert read_tensors(Path("zeros.npz"), "x")["indptr"].shape == (10**6,)


def test_a_start_beyond_the_dtype_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("big.npz", W=np.eye(4, 3) * 1e39, H=np.eye(4, 3))
    flags = (
        "--classes",
        "4",
        "--dim",
        "3",
        "--per-class",
        "1",
        "--start-from",
        "big.npz",
        "--out",
        "r",
    )
    for dtype in ("float32", "bfloat16"):
        assert "beyond what " + dtype in refused(capsys, "solve", *flags, "--dtype", dtype)
    assert float(read_start(Path("big.npz")).W.max()) == 1e39
