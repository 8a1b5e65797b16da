"""What a plan says, and the sums that follow from it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ufm_fast.backends.base import compute_dtype
from ufm_fast.problem import DTYPES


@dataclass(frozen=True)
class BackendPlan:
    """One backend: rows of a chunk, bytes beside the vectors for a gradient and a Hessian product,
    of which ``kept`` stay between calls, and seconds an evaluation of the method.
    """

    name: str
    chunk: int
    workspace: int
    workspace_hessian: int
    kept: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes, times in seconds. ``methods``: optimiser state of each. ``hidden``: of the
    parameters, those of the hidden layers; ``tape``: what a pass through them leaves (both zero of
    one layer). ``certificate``, ``measuring``: of the proof and of the metrics beside points and
    gradient. ``notes``: what a user should know.
    """

    device: str
    dtype: str
    samples: int
    classes: int
    dim: int
    widths: tuple[int, ...]
    reduce: str
    rows: int
    rows_unreduced: int
    parameters: int
    hidden: int
    tape: int
    gradient: int
    methods: dict[str, int]
    flops: float
    rate: float
    backends: list[BackendPlan]
    certificate: int
    measuring: int
    free: int
    notes: list[str]

    def total(self, method: str, backend: str) -> int:
        """Peak bytes of a solve: of its steps, or of what follows them."""
        return max(self.steps(method, backend), self.proof(backend), self.metrics(backend))

    def steps(self, method: str, backend: str) -> int:
        """Bytes that the steps of a method need; ``auto`` is lbfgs with a finish by newton-cg."""
        return self.vectors(method) + self._work(method, backend)

    def vectors(self, method: str) -> int:
        """Bytes of the vectors of a method, which a mesh of devices shares out."""
        return (
            self.parameters + self.gradient + self.methods["lbfgs" if method == "auto" else method]
        )

    def _work(self, method: str, backend: str) -> int:
        plan = self.backend(backend)
        return (
            max(plan.workspace, plan.workspace_hessian)
            if method in ("auto", "newton-cg")
            else plan.workspace
        )

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the parameters."""
        return compute_dtype(DTYPES[self.dtype]).itemsize

    def backend(self, name: str) -> BackendPlan:
        """The row of a backend."""
        return next(row for row in self.backends if row.name == name)

    def proof(self, backend: str) -> int:
        """Bytes while the certificate is made; 0 where none is wanted."""
        return self._after(backend) + self.certificate if self.certificate else 0

    def metrics(self, backend: str) -> int:
        """Bytes while the metrics are made."""
        return self._after(backend) + self.measuring

    def _after(self, backend: str) -> int:
        """What stays after the steps: the solver's point, its gradient and the model's point, and
        the backend's buffer.
        """
        return 3 * self.parameters + self.backend(backend).kept

    def devices(self, method: str, backend: str) -> int | None:
        """The least number of devices like this that hold the steps, each its share of the vectors;
        None: no number does.
        """
        room = self.free - self._work(method, backend)
        return None if room <= 0 else max(1, math.ceil(self.vectors(method) / room))

    def fits(self, backend: str) -> str:
        """Whether L-BFGS and what follows it fit the device, in words, or how many devices would
        hold it.
        """
        if self.total("auto", backend) <= self.free:
            return "yes"
        number = self.devices("auto", backend)
        if self.steps("auto", backend) <= self.free:
            return "without a certificate"
        return "no" if number is None or backend == "reference" else f"on {number} devices"

    def summary(self) -> dict[str, Any]:
        """JSON-ready."""
        totals = {b.name: {m: self.total(m, b.name) for m in self.methods} for b in self.backends}
        return {**asdict(self), "totals": totals}
