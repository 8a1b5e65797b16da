"""`ufm-fast bench` and `python -m bench`: what they measure is what they say, and every script of
bench/ is listed.
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import refused

from ufm_fast.benchmark import claims
from ufm_fast.benchmark.measuring import interleave, median_ratio
from ufm_fast.benchmark.rivals import available, inputs, make
from ufm_fast.cli import main

CPU = torch.device("cpu")
BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def small(monkeypatch):
    """Sizes at which a claim takes no time, and no child processes."""
    monkeypatch.setattr(claims, "SHAPES", ((20, 30, 8), (30, 20, 8)))
    monkeypatch.setattr(claims, "_extra_bytes", lambda name, shape, device, call: 1 << 20)


def test_the_rivals_compute_the_same(small):
    N, K, d = 20, 30, 8
    H, W, y = inputs(N, K, d)
    h, w = H.double().requires_grad_(), W.double().requires_grad_()
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(h @ w.T, y), (h, w))
    names = [name for name in claims.NAMES if name not in ("three products", "ufm_fast tiled")]
    assert {"autograd", "ufm_fast drop-in"} <= set(names)
    for name in names:
        if name == "ufm_fast drop-in" or name in available():
            for found, right in zip(make(name, N, K, d)(), expected, strict=True):
                torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-7)
    _, out = make("ufm_fast tiled", N, K, d)()
    torch.testing.assert_close(out.features.double(), expected[0], rtol=1e-4, atol=1e-7)


def test_contenders_take_turns():
    calls = []
    seconds = interleave({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=5)
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 5, "b": 5, "c": 5}
    assert sorted(calls[3:6]) == ["a", "b", "c"]
    assert median_ratio([2.0, 6.0, 1.0], [1.0, 2.0, 1.0]) == 2.0


def test_digits_are_kept_where_torch_loses_them():
    rows = claims.digits(CPU)
    assert [row["margin"] for row in rows] == list(claims.MARGINS)
    assert all(row["ufm_fast drop-in"] < 1e-4 for row in rows)
    assert rows[-1]["torch"] > 0.5


def test_a_solve_is_certified_with_both():
    ours, torchs = claims.solves(CPU, quick=True)
    assert ours["relative_gap"] < 1e-6
    assert 0.0 <= torchs["relative_gap"] < 1.0
    assert torchs["evaluations"] > 20


def test_the_peak_of_dense_autograd_is_that_of_its_logits():
    """4 MiB of gradients, and logits, softmax and their gradient of 16 MiB each."""
    code = (
        "from ufm_fast.benchmark.claims import peak_of; print(peak_of('autograd', (2048, 2048, "
        "256)))"
    )
    assert claims.number_of(code) > 2 * 4 * 2048 * 2048


def test_the_command_prints_tables_and_writes_a_picture(small, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(claims, "MARGINS", (5.0, 40.0))
    assert main(["bench", "--quick", "--device", "cpu", "--out", str(tmp_path / "b")]) == 0
    words = capsys.readouterr().out
    assert all(
        word in words for word in ("three products", "autograd", "torch.optim.LBFGS", "margin")
    )
    content = json.loads((tmp_path / "b" / "bench.json").read_text())
    assert content.keys() == {"environment", "heads", "solves", "digits"}
    products = [row for row in content["heads"] if row["contender"] == "three products"]
    assert [row["percent_of_products"] for row in products] == [100.0]
    assert (tmp_path / "b" / "bench.png").stat().st_size > 1000
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    assert "can't write to file" in refused(capsys, "bench", "--quick", "--out", "file/b")


def test_every_script_is_a_case_with_its_question():
    module = runpy.run_path(str(BENCH / "__main__.py"))
    scripts = {path.stem for path in BENCH.glob("*.py")}
    assert module["cases"]().keys() == scripts - set(module["SHARED"])
    assert {"head", "plan"} <= module["cases"]().keys()
    assert all(module["cases"]().values())
    assert module["main"](["nothing"]) == 2


def test_cases_run_by_name():
    command = [sys.executable, "-m", "bench", "exponentials", "--help"]
    done = subprocess.run(command, cwd=BENCH.parent, capture_output=True, text=True, check=True)
    assert "exp2" in done.stdout
    listed = subprocess.run(
        command[:3], cwd=BENCH.parent, capture_output=True, text=True, check=True
    ).stdout
    assert "exponentials" in listed
