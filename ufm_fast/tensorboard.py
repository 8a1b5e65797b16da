"""A solve's log points as TensorBoard scalars, for `solve(callbacks=[TensorBoard(folder)])` and
`ufm-fast solve --tensorboard`.

    tensorboard --logdir runs

Needs the extra ``tensorboard``: ``pip install 'ufm-fast[tensorboard]'``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ufm_fast.errors import InputError
from ufm_fast.point import Point
from ufm_fast.solvers.callbacks import Callback

if TYPE_CHECKING:
    from ufm_fast.solvers.solution import Solution, StepRecord


class TensorBoard(Callback):
    """Writes ``solve/NAME`` at each log point, and metrics, gap and seconds by phase of the result
    at its last step.

    Errors: InputError where the package is missing or ``folder`` can't be written.
    """

    def __init__(self, folder: Path | str) -> None:
        self._make, self.folder = summary_writer(), Path(folder)
        self._writer: Any = (
            None  # made at the first log point: a solve that is refused leaves nothing behind
        )

    def log(self, record: StepRecord, point: Callable[[], Point]) -> None:
        numbers = {
            name: value
            for name, value in record.flat().items()
            if name != "step" and value is not None
        }
        self._scalars("solve", numbers, record.step)

    def end(self, solution: Solution) -> None:
        self._scalars("result", solution.metrics, solution.steps)
        self._scalars("seconds", solution.phases, solution.steps)
        if solution.certificate is not None:
            self._scalars(
                "result", {"relative_gap": solution.certificate.relative_gap}, solution.steps
            )
        if self._writer is not None:
            self._writer.close()

    def _scalars(self, group: str, numbers: dict[str, float], step: int) -> None:
        if self._writer is None:
            try:
                self._writer = self._make(str(self.folder))
            except OSError as error:
                raise InputError(
                    f"tensorboard: can't write to {self.folder} ({error.strerror or error})"
                ) from error
        for name, value in numbers.items():
            self._writer.add_scalar(f"{group}/{name}", float(value), step)


def summary_writer() -> Callable[[str], Any]:
    """The class that writes. Errors: InputError where its package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            "tensorboard needs its package: pip install 'ufm-fast[tensorboard]'"
        ) from error
    return SummaryWriter
