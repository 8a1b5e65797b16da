"""Memory and time of a solve before it runs: what is held, counted, and seconds by rates that were
measured (`calibration`).

With R rows (classes, or samples), (K + R) d parameters and one evaluation = value and gradient:

    softmax losses     6 R K d floating-point operations (three products), the exponentials a chunk
                       of rows at a time
    squared error      8 (R + K) d^2 (Gram matrices), nothing of size R K; 6 R P d (residuals) where
                       at most P = d classes, d + 1 with a bias, have rows; 6 R t d (residuals) to
                       target vectors, R x t themselves
    hidden layers      6 R d_(j-1) d_j each; d is then the last width. What a forward pass leaves (a
                       tape) is R x d_j for each layer, with a ReLU also its slopes and bends, and
                       the tape of the last point stays

`make` puts a plan together, of bytes (`memory`) and operations (`work`); `base` is what it holds,
`notes` what it says.

A solve has three phases, and its peak is the largest of theirs: the steps; the certificate and the
metrics, beside which the solver's point, its gradient and the model's point stay (3 times the
parameters), and the backend's buffer.

Decisions

2026-11-25. Few rows in many dimensions need no d x d matrix. The gauge of L-BFGS works in the 2K
dimensions that A and B span, balancedness in the K + R that all rows span, and the squared error by
residuals where K <= d. Alternating least squares does form them; `plan` says so.

2026-11-26. A plan counts the vectors that a method holds at its peak, measured by
`bench/memory.py`: within 4 % at K = 100, d = 60,000. The loop lets go of the start, and plain
gradient descent has no velocity.

2026-11-30. Certificates, metrics, alternating least squares and the model of codes are planned by
the arrays that they hold (`bench/plan.py`; measured over planned memory had been up to 8). A
curvature says itself what its model takes. Of 30 settings measured memory is 0.86 to 1.16 of what
is planned for all, and CPU seconds an evaluation 2/3 to 1.5 for 28; Adam and multi-label rows take
1.51 to 1.55 (`bench/results/amd-epyc.csv`, two cores of an AMD EPYC, torch 2.13.0, shared).
"""

from ufm_fast.plan.base import BackendPlan, Plan
from ufm_fast.plan.make import make_plan

__all__ = ["BackendPlan", "Plan", "make_plan"]
