"""What a plan says in words: what is saved, what does not fit, and the mend."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ufm_fast.backends.cost import Cost, best_mesh, what_moves
from ufm_fast.layout import height
from ufm_fast.theory.certificates import EXACT_CLASSES
from ufm_fast.theory.certificates.spread import bytes_held

if TYPE_CHECKING:
    from ufm_fast.plan import Plan


def notes_of(plan: Plan, reduced: int, method: str, *, vectors: bool) -> list[str]:
    """What is to be said of a plan; ``reduced``: rows with a row for each class, of ``method``;
    ``vectors``: whether targets are.
    """
    notes = []
    if reduced < plan.samples:
        share = reduced / plan.samples
        if plan.reduce == "classes":
            notes.append(
                f"reduce=classes is exact here: {reduced:,} rows for {plan.samples:,} samples "
                f"({share:.1%} of the work)"
            )
        else:
            notes.append(
                f"--reduce classes would solve {reduced:,} rows for {plan.samples:,} samples, "
                f"with the same minimum"
            )
    else:
        notes.append("reduce=classes saves nothing here: each row has a target of its own")
    if plan.classes > EXACT_CLASSES:
        notes.append(
            f"the certificate will be probabilistic: an exact one needs at most {EXACT_CLASSES:,} "
            f"classes"
        )
    name = "lbfgs" if method == "auto" else method
    for backend in plan.backends:
        need = plan.steps(method, backend.name)
        if need > plan.free:
            notes.append(
                f"not enough memory for {name} on {backend.name}: {readable(need)} needed, "
                f"{readable(plan.free)} free; "
                + ("use --backend tiled" if backend.name == "reference" else _mend(plan, name))
                + _shared(plan, method, backend.name, vectors=vectors)
            )
    largest = max(plan.backends, key=lambda row: row.kept).name
    if plan.proof(largest) > plan.free:
        wanted = readable(plan.proof(largest))
        notes.append(
            f"not enough memory for the certificate: {wanted} needed, {readable(plan.free)} free; "
            "solve it with --no-certificate" + _proved_by_ranks(plan)
        )
    return notes


def _shared(plan: Plan, method: str, backend: str, *, vectors: bool) -> str:
    """How many devices like this would hold it, in words."""
    number = plan.devices(method, backend)
    if number is None or backend == "reference":
        return ""
    K, R, d, item = plan.classes, plan.rows, plan.widths[-1], plan.itemsize
    mesh = best_mesh(K, R, d, number, vectors=vectors)
    cost = Cost(K, R, d, mesh, min(512, height(R, number)), item, vectors=vectors)
    sent = sum(cost.sent().values())
    proof = _rank_proof(plan)
    held = f", and {readable(proof)} of each for the certificate" if proof <= plan.free else ""
    return (
        f", or {number} devices like this (torchrun, --mesh {mesh[0]}x{mesh[1]}: "
        f"{what_moves(mesh)}, which sends least, {readable(sent)} a device an evaluation{held}"
        f"{'' if held else '; without a certificate, for which each holds ' + readable(proof)})"
    )


def _rank_proof(plan: Plan) -> int:
    """Bytes that each of several devices holds for a certificate, beside its blocks."""
    K, exact = plan.classes, plan.classes <= EXACT_CLASSES
    return bytes_held(K, plan.widths[-1]) + (3 * 8 * K**2 if exact else 0)


def _proved_by_ranks(plan: Plan) -> str:
    """Whether several devices like this would have room for a certificate, in words."""
    held = _rank_proof(plan)
    fits = held < plan.free
    return f", or on several devices, each of which holds {readable(held)} for it" if fits else ""


def _mend(plan: Plan, method: str) -> str:
    if plan.reduce == "none" and plan.rows > plan.classes:
        return "use --reduce classes"
    if method == "lbfgs":
        return "use a smaller --history, --method gd or --dtype float32"
    return "use --dtype float32, a smaller --dim, or a machine with more memory"


def readable(size: float) -> str:
    """Bytes in words: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
