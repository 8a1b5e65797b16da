"""The plots and the summary of ``gpu.py``, from the rows of its table."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from oracle import STAGES

OURS, PRODUCTS = "ufm_kernels", "library products"
Row = dict[str, object]


def timed_heads(rows: Iterable[Row]) -> list[Row]:
    """Timed rows of the heads, sizes as integers also where they were read from the file."""
    timed = (row for row in rows if row.get("task") == "cross-entropy" and row.get("ms"))
    return [row | {name: int(row[name]) for name in ("N", "K", "d")} for row in timed]


def shape_of(row: Row) -> tuple[int, int, int]:
    return row["N"], row["K"], row["d"]


def roofline(rows: list[Row], path: Path) -> None:
    """TFLOP/s of 6 N K d against d, bfloat16 near collapse, at the N = K of most widths; the
    products are the roof.
    """
    import matplotlib.pyplot as plt

    rows = [
        row
        for row in timed_heads(rows)
        if row["dtype"] == "torch.bfloat16" and row["stage"] == list(STAGES)[-1]
    ]
    widths: dict[int, set[int]] = {}
    for row in rows:
        if row["N"] == row["K"]:
            widths.setdefault(row["N"], set()).add(row["d"])
    if not widths:
        return
    side = max(widths, key=lambda n: (len(widths[n]), n))
    figure, axes = plt.subplots()
    for name in dict.fromkeys(row["contender"] for row in rows):
        mine = sorted(
            (row["d"], float(row["tflops_6NKd"]))
            for row in rows
            if row["contender"] == name and row["N"] == row["K"] == side
        )
        if mine:
            axes.plot(*zip(*mine, strict=True), "--" if name == PRODUCTS else "o-", label=name)
    axes.set(
        xscale="log", xlabel="feature width d", ylabel="TFLOP/s of 6 N K d", title=f"N = K = {side}"
    )
    axes.legend(fontsize=6)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def ratios(rows: list[Row], path: Path) -> None:
    """Every rival's time over our best one in the same dtype and stage, shape by shape; hollow in
    float32.
    """
    import matplotlib.pyplot as plt

    rows = timed_heads(rows)
    shapes = list(dict.fromkeys(shape_of(row) for row in rows))
    rivals = [
        name
        for name in dict.fromkeys(str(row["contender"]) for row in rows)
        if not name.startswith(OURS)
    ]
    figure, axes = plt.subplots(figsize=(9, 4))
    for name in rivals:
        points: dict[bool, list[tuple[int, float]]] = {True: [], False: []}
        for row in rows:
            alike = [
                x
                for x in rows
                if all(x[key] == row[key] for key in ("N", "K", "d", "stage", "dtype"))
            ]
            ours = [float(x["ms"]) for x in alike if str(x["contender"]).startswith(OURS)]
            if row["contender"] == name and ours:
                single = row["dtype"] == "torch.float32"
                points[single].append((shapes.index(shape_of(row)), float(row["ms"]) / min(ours)))
        colour = f"C{rivals.index(name)}"
        for single, found in points.items():
            if found:
                fill = "none" if single else colour
                axes.plot(
                    *zip(*found, strict=True),
                    "o",
                    color=colour,
                    markerfacecolor=fill,
                    label=None if single else name,
                )
    axes.axhline(1.0, color="black", linewidth=0.5)
    axes.set_xticks(range(len(shapes)), [f"{n}\n{k}\n{d}" for n, k, d in shapes], fontsize=6)
    axes.set(yscale="log", ylabel="time over our best", xlabel="N, K, d")
    axes.legend(fontsize=6)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def fused_or_library(rows: list[Row]) -> list[str]:
    """Lines 'N K d dtype stage: fused or library products, by how much' for the choice that `head`
    leaves to its caller.
    """
    heads = {
        (shape_of(x), x["dtype"], x["stage"], x["contender"]): float(x["ms"])
        for x in timed_heads(rows)
    }
    lines = []
    for (shape, dtype, stage, name), library in heads.items():
        fused = heads.get(
            (shape, dtype, stage, str(name).removesuffix(PRODUCTS) + "fused products")
        )
        if str(name).startswith(OURS) and str(name).endswith(PRODUCTS) and fused:
            better = "fused" if fused <= library else "library"
            lines.append(
                f"{shape} {name.removesuffix(', ' + PRODUCTS)} {stage}: {better}, library/fused "
                f"{library / fused:.3f}"
            )
    return lines


def draw(rows: list[Row], stem: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    if timed_heads(rows):
        roofline(rows, Path(f"{stem}_roofline.png"))
        ratios(rows, Path(f"{stem}_ratio.png"))
