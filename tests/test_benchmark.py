"""`ufm-fast bench` and `python -m bench`: what they measure is what they say, and every script of
bench/ is listed.
"""

from __future__ import annotations

import csv
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from command_line import refused

import bench.__main__ as cases
from bench import table
from bench.measure import in_child, in_turn, ratio
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
    assert "use cpu, cuda or cuda:0" in refused(capsys, "bench", "--device", "tpu")


def test_every_script_is_a_case_with_its_question():
    scripts = {path.stem for path in (*BENCH.glob("*.py"), *BENCH.glob("reasons/*.py"))}
    named = [name for names in cases.CASES.values() for name in names]
    assert sorted(named) == sorted(scripts - set(cases.SHARED))
    assert all(len(cases.question(name)) > 20 for name in named)
    for name in named:
        function = "main" if name in cases.SCRIPTS else "records"
        assert f"\ndef {function}(" in cases.path_of(name).read_text("utf-8"), name
    assert cases.main(["nothing"]) == 2


def test_a_case_runs_by_name_and_adds_its_figures_to_a_table(tmp_path, monkeypatch, capsys):
    """Options are the function's arguments; a second run adds lines and takes none away."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    out = tmp_path / "table.csv"
    words = ["solve_time", "--classes", "6", "--dim", "8", "--only", "ours", "--out", str(out)]
    assert cases.main(words) == 0
    assert "relative gap" not in capsys.readouterr().out
    once = out.read_text()
    assert cases.main(words) == 0
    assert out.read_text().startswith(once)
    records = table.read(out, "solve_time")
    assert [record.case["start"] for record in records] == ["spectral", "normal"] * 2
    assert all(float(record.measured["gap"]) < 1e-6 for record in records)
    with out.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert {line["torch"] for line in lines} == {torch.__version__}
    assert {line["unit"] for line in lines if line["quantity"] == "seconds"} == {"s"}


def test_a_function_of_a_case_runs_in_a_process_of_its_own():
    assert in_child("bench.table", "unit", "peak_MB") == "MB"
    with pytest.raises(RuntimeError, match=r"bench\.table\.unit: TypeError"):
        in_child("bench.table", "unit")


def test_a_slow_contender_is_called_once_and_one_that_fails_says_why():
    made = {"fine": lambda: lambda: None, "slow": lambda: lambda: time.sleep(0.03)}
    seconds, failed = in_turn({**made, "broken": lambda: 1 // 0}, rounds=3, slow=0.02)
    assert {name: len(times) for name, times in seconds.items()} == {"fine": 3, "slow": 1}
    assert ratio(seconds["slow"], seconds["fine"]) > 1.0 > ratio(seconds["fine"], seconds["slow"])
    assert failed == {"broken": "ZeroDivisionError: integer division or modulo by zero"}


@pytest.mark.parametrize("path", sorted(BENCH.glob("results/*.csv")), ids=lambda path: path.stem)
def test_every_committed_figure_says_where_it_is_from(path):
    named = {name for names in cases.CASES.values() for name in names}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        lines = list(reader)
    assert tuple(reader.fieldnames) == table.COLUMNS
    for line in lines:
        assert line["bench"] in named
        assert line["unit"] == table.unit(line["quantity"])
        assert all(line[name] for name in ("case", "machine", "python", "torch", "commit", "date"))
        assert bool(line["quantity"]) == bool(line["value"])
        assert line["value"] or line["note"]
        assert table.path_of(line["machine"]).name == path.name


def test_what_the_devices_scripts_wrote_joins_the_machines_table(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "RESULTS", tmp_path / "results")
    columns = "task,N,K,d,stage,dtype,chunk_rows,contender,note,device,machine,python,torch,commit"
    versions = "date,capability,triton,liger-kernel,cut-cross-entropy,quack-kernels,ms"
    wide = tmp_path / "gpu.csv"
    row = 'errors,4,5,6,1e-2,torch.float32,8,{},{},NVIDIA X1,"P, 2 threads",3.12,2.11,abc'
    there = "2026-11-26,9.0,3.6.0,none,none,none,{}"
    rows = [
        f"{row.format(*x[:2])},{there.format(x[2])}" for x in (("ours", "", 1.5), ("B", "no", ""))
    ]
    wide.write_text("\n".join((f"{columns},{versions}", *rows)))
    for _ in range(2):  # from its own form, and from the long one
        assert cases.main(["gather", str(wide)]) == 0
        wide = tmp_path / "results" / "nvidia-x1.csv"
    ours, other = table.read(wide, "gpu")[:2]
    assert (ours.contender, ours.measured["ms"], other.measured, other.note) == (
        "ours", "1.5", {"": ""}, "no",
    )  # fmt: skip
    assert len(wide.read_text().splitlines()) == 5
