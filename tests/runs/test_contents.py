"""A log or a summary that is none of ours is refused in words."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_runs import make

from ufm_fast.errors import InputError


def test_steps_and_numbers_that_no_float_holds_are_no_log(tmp_path: Path) -> None:
    run = make(tmp_path / "r")
    for text in (
        '{"step": 123456789012345678901234567890}',
        '{"step": -1}',
        '{"step": 0, "value": 1' + "0" * 400 + "}",
        "[" * 10**5,
    ):
        (run.path / "metrics.jsonl").write_text(text + "\n")
        with pytest.raises(InputError, match="line 1 of"):
            run.records()


@pytest.mark.parametrize(
    "change",
    [
        {"theory": 3},
        {"theory": {"value": "x"}},
        {"certificate": [1]},
        {"certificate": {"lower_bound": []}},
        {"metrics": 1},
        {"tol": "x"},
        {"steps": "3"},
        {"outcome": 1},
        {"method": None},
    ],
)
def test_a_summary_that_is_none_of_ours_is_refused(
    change: dict[str, object], tmp_path: Path
) -> None:
    run = make(tmp_path / "r")
    run.write_summary(
        {
            "outcome": "converged",
            "method": "auto",
            "steps": 3,
            "tol": 1e-9,
            "theory": None,
            **change,
        }
    )
    with pytest.raises(InputError, match="damaged"):
        run.summary  # noqa: B018
