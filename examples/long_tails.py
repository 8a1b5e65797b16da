"""Long tails at any number of classes: what rare classes lose as the penalty grows, from a thousand
classes to a billion.

    python examples/long_tails.py [--out long_tails.png]

Class counts run from 1 to 1000 by a power law: K_g classes of n_g samples, K_g in proportion to
1/n_g, 75 distinct counts. The minimum of cross-entropy reduces exactly to one problem in 75 + 75^2
numbers, whatever K; every point drawn is certified. Penalties are in units of the mu at which a
class of one sample collapses onto the others, 1/N: there the cosine of two rare rows reaches 1.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np

from ufm_fast import plots
from ufm_fast.class_groups import ClassGroups
from ufm_fast.groups import Geometry, group_minimum

SIZES = (10**3, 10**4, 10**6, 10**9)
MOST = 1000


def power_law(classes: int) -> ClassGroups:
    """K classes whose counts follow K_g ~ 1/n_g, from 1 to MOST samples; of few classes the large
    counts have one each.
    """
    counts = np.unique(np.geomspace(1, MOST, 100).round().astype(int))
    sizes = np.maximum(1, (classes / counts / (1 / counts).sum()).round().astype(int))
    return ClassGroups.of_pairs(zip(sizes.tolist(), counts.tolist(), strict=True))


def curve(groups: ClassGroups, penalties: np.ndarray) -> np.ndarray:
    """Rows (loss of the rarest, loss of the most frequent, cosine of two of the rarest, gap) at
    each penalty.
    """
    rows = []
    for penalty in penalties:
        mu = penalty / groups.samples
        best = group_minimum(groups, mu, mu)
        cosine = Geometry(best).classifier.cosines[0, 0]
        rows.append((best.losses[0], best.losses[-1], cosine, best.certificate.relative_gap))
        if not best.certificate.certified:
            raise SystemExit(f"not certified: K = {groups.classes}, mu = {mu}: {best.certificate}")
    return np.array(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("long_tails.png"))
    parser.add_argument(
        "--points", type=int, default=24, help="penalties of a curve, about half of them"
    )
    args = parser.parse_args()
    below = 1 - np.geomspace(
        1e-4, 0.9, args.points
    )  # towards the threshold, where the cosine turns
    penalties = np.sort([*np.geomspace(1e-3, math.sqrt(MOST) * 0.98, args.points), *below, 1.0])
    with plots.paper_style():
        figure, (losses, cosines) = plots.panels(2, 2.9)
        for number, size in enumerate(SIZES):
            groups = power_law(size)
            found = curve(groups, penalties)
            style = {  # curves that coincide lie on one another, the narrower above
                "color": plots.COLOURS[number],
                "linewidth": 4.0 - number,
                "solid_capstyle": "butt",
            }
            label = f"K = 10$^{round(math.log10(groups.classes))}$"
            losses.loglog(penalties, found[:, 0], label=label, **style)
            losses.loglog(penalties, found[:, 1], **{**style, "linestyle": ":"})
            cosines.semilogx(penalties, found[:, 2], label=label, **style)
            print(f"K = {groups.classes}: largest gap {found[:, 3].max():.1e}", flush=True)
        for ax, name in (
            (losses, "loss of a sample"),
            (cosines, "cosine of two of the rarest rows"),
        ):
            ax.axvline(1.0, color="0.7", linewidth=0.8, zorder=0)
            ax.set_xlabel(r"$\mu N = N\sqrt{\lambda_W \lambda_H}$")
            ax.set_ylabel(name)
        losses.set_title("rarest (solid), most frequent (dotted)", loc="left")
        plots.finish(figure).savefig(args.out, dpi=160)
    print(args.out)


if __name__ == "__main__":
    main()
