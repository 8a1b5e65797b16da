"""What kind of point a point is: the smallest eigenvalue of the Hessian there, a verdict, and the
way out of a saddle.

    objective, p = Objective(problem), solution.point
    found = classify(objective, objective.from_model(p.W, p.H, p.b, p.hidden))
    found.classification, found.curvature.eigenvalue

One layer and a loss convex in the logits, at a critical point with rank(W) < d: the smallest
eigenvalue is mu (1 - S) in balanced variables, S the certificate's spectral ratio |G|/mu. So there
every critical point that is no global minimum is a strict saddle (Zhu et al., arXiv 2105.02375).
That holds for one layer only: with M >= 2 layers zero is a strict local minimum, with smallest
eigenvalue mu, and points with classes dropped have smallest eigenvalue 0 and are local minima. At a
minimum of rank r the rotations of the features leave zeros, r (2d - r - 1)/2 of them between two
factors.

Everything is in the variables of the Objective, along its space (tangent on spheres, nothing along
a frozen factor). With ``reduce='classes'`` directions in which the samples of a class part are left
out; for a loss convex in the logits they curve up.

Behind exact ReLUs the function has kinks: where an input of one is zero, gradient and Hessian are
those of the active piece and say nothing across the kink. A unit without weights has such inputs:
rounding switches it on for some classes and off for others, as no weights can, and such a piece may
curve down (by mu/3 at a local minimum of 4 classes). So `classify` takes the piece on which inputs
that are zero but for rounding rest, and calls a point there a saddle only if the value falls along
the vector too; `Landscape.kinks` and ``note`` say so.
"""

from ufm_fast.landscape.critical import Landscape, classify, escape
from ufm_fast.landscape.curvature import Curvature, curvature_unit, smallest_curvature, spectrum

__all__ = [
    "Curvature",
    "Landscape",
    "classify",
    "curvature_unit",
    "escape",
    "smallest_curvature",
    "spectrum",
]
