"""Whether what is read from a run's summary and log is what a run writes there."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ufm_fast.arguments import MOST


def wrong_in_summary(content: Mapping[str, Any]) -> str:
    """The first entry that is not what a solve or a training writes, of those that are read again;
    "" where there is none.
    """
    parts = {name: content.get(name) or {} for name in ("theory", "certificate", "metrics")}
    for name, part in parts.items():
        if not isinstance(part, dict):
            return name
    numbers = {name: content.get(name) for name in ("value", "tol", "steps")}
    numbers |= {
        "theory": parts["theory"].get("value"),
        "certificate": parts["certificate"].get("lower_bound"),
    }
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            return name
    words = {name: content.get(name, "") for name in ("outcome", "method", "message")}
    return next((name for name, value in words.items() if not isinstance(value, str)), "")


def is_record(content: Any) -> bool:
    """A log record: a whole step, and numbers or null under every other name."""
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("step"), int)
        or not 0 <= content["step"] <= MOST
    ):
        return False
    return all(
        value is None or (isinstance(value, (int, float)) and abs(value) <= sys.float_info.max)
        for value in content.values()
    )
