"""A run directory: written whole or not at all, recognised, and refused where it is not ours or
damaged.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from made_runs import CONFIG, make

from ufm_fast.errors import InputError
from ufm_fast.runs import settings
from ufm_fast.runs.directory import RunDirectory, is_run
from ufm_fast.runs.files import WriteError, atomic, config_hash, json_ready, read_json, write_text
from ufm_fast.runs.state import load_state

ROOT = Path(__file__).parents[2]


# ---- writing


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def write_half() -> None:
        with atomic(path) as temporary:
            temporary.write_text("half of the n")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_written_files_obey_the_umask(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    write_text(tmp_path / "ours", "")
    assert (tmp_path / "ours").stat().st_mode == plain.stat().st_mode


def test_json_has_no_nan() -> None:
    content = {"a": math.nan, "b": [math.inf, 1.5, (2, -math.inf)], "c": {"d": math.nan}, 3: True}
    assert json_ready(content) == {
        "a": None,
        "b": [None, 1.5, [2, None]],
        "c": {"d": None},
        "3": True,
    }


def test_the_hash_does_not_see_the_order_of_keys() -> None:
    assert config_hash({"a": 1, "b": 2.5}) == config_hash({"b": 2.5, "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2})


# ---- creating and opening


def test_what_is_created_is_read_back(tmp_path: Path) -> None:
    run = make(tmp_path / "a" / "b")
    run.append({"step": 0, "value": math.nan})
    run.append({"step": 5, "value": 0.1})
    run.write_summary({"outcome": "converged", "value": 0.1})
    again = RunDirectory.open(run.path)
    assert (again.config, again.hash) == (CONFIG, "digest")
    assert again.records() == [{"step": 0, "value": None}, {"step": 5, "value": 0.1}]
    assert again.summary == {"outcome": "converged", "value": 0.1}
    assert is_run(run.path)
    assert not is_run(tmp_path)


def test_an_empty_folder_is_taken_and_an_occupied_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty")
    with pytest.raises(InputError, match="--resume"):
        make(tmp_path / "empty")
    with pytest.raises(InputError, match="another configuration"):
        RunDirectory.create(tmp_path / "empty", CONFIG, "other digest", {})
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"format": "something else"}')
    with pytest.raises(InputError, match="not a run of ufm-fast"):
        make(tmp_path / "foreign")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        make(tmp_path / "file")


def test_a_place_that_cannot_be_written_is_refused_and_left_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can't write"):
        make(tmp_path / "file" / "below")

    def full(path: Path, text: str) -> None:
        raise WriteError(path, OSError(28, "No space left on device"))

    monkeypatch.setattr("ufm_fast.runs.directory.write_text", full)
    with pytest.raises(InputError, match="No space left"):
        make(tmp_path / "new" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_discard_takes_back_what_was_made_and_no_more(tmp_path: Path) -> None:
    run = make(tmp_path / "a" / "b")
    (tmp_path / "a" / "other").write_text("mine")
    run.discard()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "other"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"format": "ufm-fa', "truncated"),
        ("[1, 2]", "does not hold an object"),
        ('{"format": "x"}', "not a run directory"),
        ('{"format": "ufm-fast-run", "version": 99}', "version 99"),
        ('{"format": "ufm-fast-run", "version": 1}', "damaged"),
        ("\xff\xfe", "not text"),
    ],
)
def test_damaged_and_foreign_configurations(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=words):
        RunDirectory.open(tmp_path)


def test_a_missing_folder_and_a_missing_configuration(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a folder"):
        RunDirectory.open(tmp_path / "none")
    with pytest.raises(InputError, match=r"no config\.json"):
        RunDirectory.open(tmp_path)
    with pytest.raises(InputError, match="missing"):
        read_json(tmp_path / "none", "x")


# ---- the log


def test_a_last_line_cut_short_is_left_out_and_a_bad_one_refused(tmp_path: Path) -> None:
    run = make(tmp_path / "r")
    log = run.path / "metrics.jsonl"
    log.write_text('{"step": 0}\n{"step": 1}\n{"ste')
    assert [record["step"] for record in run.records()] == [0, 1]
    for text in ('{"step": 0}\n{"ste\n{"step": 1}\n', "[]\n", '{"value": 1}\n'):
        log.write_text(text)
        with pytest.raises(InputError, match="line"):
            run.records()


def test_truncating_keeps_the_steps_that_the_state_has_seen(tmp_path: Path) -> None:
    run = make(tmp_path / "r")
    for step in (0, 1, 2, 5, 10):
        run.append({"step": step})
    run.truncate_log(2)
    run.append({"step": 4})
    assert [record["step"] for record in run.records()] == [0, 1, 2, 4]


# ---- damaged files


def test_deep_nesting_and_pipes_are_words(tmp_path: Path) -> None:
    run = make(tmp_path / "r")
    for name, text in (("config.json", '{"a":' * 10**5), ("summary.json", "[" * 10**5)):
        (run.path / name).write_text(text)
        with pytest.raises(InputError, match=name):
            read_json(run.path / name, "run")
    Path("deep.toml").write_text("a = " + "[" * 10**5)
    with pytest.raises(InputError, match=r"deep\.toml"):
        settings.read_toml(Path("deep.toml"))
    for name in ("config.json", "metrics.jsonl", "state.safetensors"):
        (run.path / name).unlink(missing_ok=True)
        os.mkfifo(run.path / name)
    for read in (lambda: RunDirectory.open(run.path), run.records, lambda: load_state(run)):
        with pytest.raises(InputError, match="is not a file"):
            read()
