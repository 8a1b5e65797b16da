"""Named convention presets: a paper's constants, translated into our conventions, with what is
exact said apart.

Only what the authors' code or text states counts as exact. Everything else is marked 'our choice':
the papers train networks, or leave sizes open, where the model needs a number.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ufm_fast.errors import InputError


@dataclass(frozen=True)
class Preset:
    """Defaults for a problem. ``settings`` are keyword arguments of Problem, and of solve where
    ``solver`` is given.

    ``exact``: what the source states; ``choice``: what is ours. Flags given beside a preset
    override it.
    """

    name: str
    title: str
    source: str
    exact: str
    choice: str
    settings: Mapping[str, Any]
    solver: Mapping[str, Any] = field(default_factory=dict)

    @property
    def defaults(self) -> dict[str, Any]:
        return {**self.settings, **self.solver}


_PRESETS = (
    Preset(
        "demo",
        "a small balanced cross-entropy problem that is solved from a random start",
        "this project",
        "nothing",
        "all of it",
        {
            "loss": "ce",
            "classes": 100,
            "dim": 128,
            "per_class": 10,
            "lambda_w": 5e-4,
            "lambda_h": 5e-4,
        },
        {"start": "normal"},
    ),
    Preset(
        "zhu2021",
        "cross-entropy with weight decay on W, H and b",
        "arXiv 2105.02375",
        "the penalty (wd/2)|.|^2, thus lambda = wd",
        "wd = 5e-4 on W, H and b alike, K = 10, d = 64, n = 100: the experiments train networks "
        "on images",
        {
            "loss": "ce",
            "classes": 10,
            "dim": 64,
            "per_class": 100,
            "bias": "penalised",
            "lambda_w": 5e-4,
            "lambda_h": 5e-4,
            "lambda_b": 5e-4,
        },
    ),
    Preset(
        "zhou2022-mse",
        "squared error averaged over the K outputs, with weight decay",
        "arXiv 2203.01238",
        "the mean over N K entries is 2/K times our fit, thus lambda = (K/2) wd and the value is "
        "K/2 times the code's",
        "wd = 5e-4 on W, H and b alike, K = 10, d = 64, n = 100: the experiments train networks "
        "on images",
        {
            "loss": "mse",
            "classes": 10,
            "dim": 64,
            "per_class": 100,
            "bias": "penalised",
            "lambda_w": 2.5e-3,
            "lambda_h": 2.5e-3,
            "lambda_b": 2.5e-3,
        },
    ),
    Preset(
        "zhou2022-smoothing",
        "cross-entropy with label smoothing",
        "arXiv 2210.02192",
        "smoothing 0.05 in the form (1 - eps) e_y + eps/K, and wd = 5e-4 as (wd/2)|.|^2",
        "K = 10, d = 64, n = 100, and the same wd on features and bias: the experiments train "
        "networks on images",
        {
            "loss": "ce",
            "smoothing": 0.05,
            "classes": 10,
            "dim": 64,
            "per_class": 100,
            "bias": "penalised",
            "lambda_w": 5e-4,
            "lambda_h": 5e-4,
            "lambda_b": 5e-4,
        },
    ),
    Preset(
        "zhou2022-focal",
        "focal loss",
        "arXiv 2210.02192",
        "gamma 3, and wd = 5e-4 as (wd/2)|.|^2",
        "K = 10, d = 64, n = 100, and the same wd on features and bias: the experiments train "
        "networks on images",
        {
            "loss": "focal",
            "gamma": 3.0,
            "classes": 10,
            "dim": 64,
            "per_class": 100,
            "bias": "penalised",
            "lambda_w": 5e-4,
            "lambda_h": 5e-4,
            "lambda_b": 5e-4,
        },
    ),
    Preset(
        "dang2023",
        "squared error without a bias, balanced; its objective is ours to the letter",
        "arXiv 2301.00437",
        "K = 4, n = 100, d = 64, all penalties 5e-4, one weight layer",
        "the solver: the code runs 30,000 steps of gradient descent with rate 0.1 and momentum "
        "0.9 from N(0, 0.01)",
        {
            "loss": "mse",
            "classes": 4,
            "dim": 64,
            "per_class": 100,
            "lambda_w": 5e-4,
            "lambda_h": 5e-4,
        },
    ),
    Preset(
        "dang2023-imbalanced",
        "squared error without a bias, imbalanced",
        "arXiv 2301.00437",
        "counts 200, 100, 50, 50, d = 2048, all penalties 5e-4, one weight layer",
        "the solver",
        {
            "loss": "mse",
            "dim": 2048,
            "counts": [200, 100, 50, 50],
            "lambda_w": 5e-4,
            "lambda_h": 5e-4,
        },
    ),
    Preset(
        "dang2023-3",
        "squared error without a bias, three linear layers: deep neural collapse",
        "arXiv 2301.00437",
        "K = 4, n = 100, d = 64 everywhere, all penalties 5e-4, three weight layers",
        "the solver, from semi-orthogonal factors: the code runs 30,000 steps of gradient descent "
        "from N(0, 0.01)",
        {
            "loss": "mse",
            "classes": 4,
            "dim": 64,
            "per_class": 100,
            "layers": 3,
            "lambda_w": 5e-4,
            "lambda_h": 5e-4,
        },
        {"start": "orthogonal"},
    ),
    Preset(
        "dang2023-6",
        "squared error without a bias, six linear layers: deep neural collapse",
        "arXiv 2301.00437",
        "K = 4, n = 100, d = 64 everywhere, all penalties 5e-4, six weight layers",
        "the solver, from semi-orthogonal factors: the code runs 30,000 steps of gradient descent "
        "from N(0, 0.01)",
        {
            "loss": "mse",
            "classes": 4,
            "dim": 64,
            "per_class": 100,
            "layers": 6,
            "lambda_w": 5e-4,
            "lambda_h": 5e-4,
        },
        {"start": "orthogonal"},
    ),
    Preset(
        "sukenik2024",
        "four ReLU layers and the squared error: solutions of lower rank than deep neural "
        "collapse, and of lower value",
        "arXiv 2405.14468",
        "K = 10, four weight layers, width 30, all penalties 0.004",
        "n = 1, the solver, and ten starts from N(0, 2/width) in balanced variables, of which the "
        "best is kept",
        {
            "loss": "mse",
            "classes": 10,
            "dim": 30,
            "per_class": 1,
            "layers": 4,
            "activation": "relu",
            "lambda_w": 4e-3,
            "lambda_h": 4e-3,
        },
        {"start": "normal", "restarts": 10},
    ),
    Preset(
        "garrod2024",
        "cross-entropy with two linear layers: the cross-polytope lies below deep neural collapse",
        "arXiv 2410.23169",
        "K = 10, n = 5, two weight layers, width 70, all penalties 2^-10",
        "the solver, and ten starts from N(0, 1/width) in balanced variables, of which the best "
        "is kept",
        {
            "loss": "ce",
            "classes": 10,
            "dim": 70,
            "per_class": 5,
            "layers": 2,
            "lambda_w": 2.0**-10,
            "lambda_h": 2.0**-10,
        },
        {"start": "normal", "restarts": 10},
    ),
    Preset(
        "hong-ling2023",
        "cross-entropy with a penalised bias and two groups of classes, just below minority "
        "collapse",
        "arXiv 2309.09725",
        "penalties lambda |.|^2 without the 1/2, lambda_W = 5 l and lambda_H = l/20 (ours: 10 l "
        "and l/10, so mu = l), "
        "reg_b = 0.01 (ours: lambda_b = 0.02), two groups of 5 classes with 500 and 100 samples "
        "each",
        "d = 10, and l = 0.0033 among their grid: the minority's logits vanish at l = 1/300",
        {
            "loss": "ce",
            "dim": 10,
            "counts": [500] * 5 + [100] * 5,
            "bias": "penalised",
            "lambda_w": 0.033,
            "lambda_h": 3.3e-4,
            "lambda_b": 0.02,
        },
    ),
    Preset(
        "fang2021",
        "cross-entropy with two groups of classes, below the ratio at which the minority collapses",
        "arXiv 2101.12699",
        "ten classes in two groups of five, no bias",
        "counts 100 and 10 (their weights 1 and 1/R at R = 10), d = 10, and penalties in the "
        "place of their bounds, for they "
        "bound means over the classes where ours weigh by samples: at the minimum |W|^2 is their "
        "10 E_W = 10 and |H|^2 / N "
        "their E_H = 5, to three digits",
        {
            "loss": "ce",
            "dim": 10,
            "counts": [100] * 5 + [10] * 5,
            "lambda_w": 0.0816,
            "lambda_h": 2.966e-4,
        },
    ),
    Preset(
        "thrampoulidis2022",
        "cross-entropy with step imbalance and small penalties: on the way to SELI, which is "
        "approached logarithmically",
        "arXiv 2208.05512",
        "half of the classes with R times the samples of the others, no bias, the limit of "
        "vanishing penalties",
        "K = 4, R = 10, d = 8, and lambda_W = lambda_H = 1e-5, where the geometry is still far "
        "from the limit",
        {"loss": "ce", "dim": 8, "counts": [10, 10, 1, 1], "lambda_w": 1e-5, "lambda_h": 1e-5},
        {"start": "normal"},
    ),
    Preset(
        "yaras2022",
        "cross-entropy of unit rows: the simplex ETF on spheres",
        "arXiv 2209.09211",
        "rows of W and H of length one, no bias, logits times a temperature, t = 5 among their "
        "grid .001 to 100",
        "K = 10, d = 16, n = 100, and the solver: the experiments train networks on images",
        {
            "loss": "ce",
            "classes": 10,
            "dim": 16,
            "per_class": 100,
            "constraint": "sphere",
            "temperature": 5.0,
        },
        {"start": "normal"},
    ),
    Preset(
        "jiang2023",
        "cross-entropy of unit rows with more classes than dimensions: a softmax code",
        "arXiv 2310.05351",
        "100 classes in d = 10, rows of W and H of length one, no bias",
        "n = 1, t = 5, and a random start to tol 1e-6: their code takes subgradients of the one "
        "worst pair",
        {
            "loss": "ce",
            "classes": 100,
            "dim": 10,
            "per_class": 1,
            "constraint": "sphere",
            "temperature": 5.0,
        },
        {"start": "normal", "tol": 1e-6},
    ),
    Preset(
        "li2023-mlab",
        "pick-all-label loss for multi-label data (give `--multiplicities 1:3100,2:200` or "
        "`--targets FILE.npz`)",
        "arXiv 2310.15903",
        "loss summed over a sample's labels and averaged over a batch of 128; wd = 5e-4 as "
        "(wd/2)|W|^2; features are "
        "penalised as 1e-3 |H|^2 summed over the batch, without the 1/2: with N = 31,000 samples "
        "of which each is in one of "
        "N / 128 batches an epoch, ours is lambda_H = 2e-3 * 128 / N; 3,100 samples a class",
        "K = 10, d = 64, no bias",
        {
            "loss": "pick-all",
            "classes": 10,
            "dim": 64,
            "per_class": 3100,
            "lambda_w": 5e-4,
            "lambda_h": 2e-3 * 128 / 31000,
        },
    ),
    Preset(
        "tirer2022",
        "squared error without a bias: the orthogonal frame",
        "arXiv 2202.08087",
        "the objective",
        "all constants: K = 4, d = 20, n = 50, lambda_W = lambda_H = 0.005 are our choice",
        {
            "loss": "mse",
            "classes": 4,
            "dim": 20,
            "per_class": 50,
            "lambda_w": 5e-3,
            "lambda_h": 5e-3,
        },
    ),
    Preset(
        "tirer2022-linear2",
        "squared error without a bias behind a second linear layer: the orthogonal frame",
        "arXiv 2202.08087",
        "the objective",
        "all constants: K = 4, d = 20, n = 50 and penalties 0.005 are our choice, and the start "
        "from semi-orthogonal factors",
        {
            "loss": "mse",
            "classes": 4,
            "dim": 20,
            "per_class": 50,
            "layers": 2,
            "lambda_w": 5e-3,
            "lambda_h": 5e-3,
        },
        {"start": "orthogonal"},
    ),
    Preset(
        "tirer2022-relu2",
        "squared error without a bias behind a ReLU layer: the orthogonal frame",
        "arXiv 2202.08087",
        "the objective",
        "all constants: K = 4, d = 20, n = 50 and penalties 0.005 are our choice, and the best of "
        "five random starts",
        {
            "loss": "mse",
            "classes": 4,
            "dim": 20,
            "per_class": 50,
            "layers": 2,
            "activation": "relu",
            "lambda_w": 5e-3,
            "lambda_h": 5e-3,
        },
        {"start": "normal", "restarts": 5},
    ),
    Preset(
        "tirer2022-bias",
        "squared error with an unregularised bias: the simplex ETF",
        "arXiv 2202.08087",
        "the objective",
        "all constants: K = 4, d = 20, n = 50, lambda_W = lambda_H = 0.005 are our choice",
        {
            "loss": "mse",
            "classes": 4,
            "dim": 20,
            "per_class": 50,
            "bias": "free",
            "lambda_w": 5e-3,
            "lambda_h": 5e-3,
        },
    ),
)

#: Every preset by its name.
PRESETS: dict[str, Preset] = {preset.name: preset for preset in _PRESETS}


def get_preset(name: str) -> Preset:
    """Errors: InputError for an unknown name, with the nearest ones."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 3, 0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(PRESETS)}"
        raise InputError(f"preset {name!r} is unknown; {hint}")
    return PRESETS[name]
