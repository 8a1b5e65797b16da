"""Problem: what is minimised, over which data, in which numbers. Everything is checked when it is
built.

Decisions

2026-11-25. Sizes and penalties have ranges, which stand where they are checked (`arguments`,
`sample_data`, `trunks`, `penalties`); what goes with what is in `contradictions`. A solve on the
command line is refused before its run directory is made if point, gradient and one step do not fit
the free memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ufm_fast import contradictions
from ufm_fast.adjustments import Adjustment, make_adjustment, penalty_factors
from ufm_fast.angular_margins import AngularMargin, make_angular
from ufm_fast.arguments import MOST_DIM, cpu_by_default, device_of, factor, whole
from ufm_fast.errors import InputError
from ufm_fast.geometries import GEOMETRIES
from ufm_fast.kinds import Kind
from ufm_fast.layout import Layout
from ufm_fast.losses import loss_of
from ufm_fast.penalties import (
    Penalties,
    checked_hidden_penalties,
    checked_penalty,
    default_penalty,
    geometric_mean,
)
from ufm_fast.point import Point
from ufm_fast.sample_data import DATA
from ufm_fast.samples import Samples
from ufm_fast.targets import Rows, TargetSets
from ufm_fast.trunks import MOST_LAYERS, TRUNKS, Trunk, checked_widths

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
BIASES = ("none", "penalised", "free")
FREEZES = (None, "w", "h")
REDUCTIONS = ("auto", "classes", "none", "groups")


@dataclass(frozen=True, eq=False, init=False)
class Problem:
    """The regularised unconstrained features model, plain, extended by layers, or on spheres.

    f = (1/N) sum_i l(z_i, y_i) + lambda_w/2 |W|^2 + lambda_h/2 |H|^2 + lambda_b/2 |b|^2 + sum_j
    lambda_hidden_j/2 |W_j|^2

    with logits z_i = W h_i + b, or with M = ``layers`` > 1

        z_i = W s(W_(M-1) ... s(W_1 h_i)) + b,
        s(z) = z (``activation`` 'linear') or max(z, 0) ('relu').

    H is N x d_0 (a row per sample), W_j is d_j x d_(j-1), W is K x d_(M-1), b is (K,). Data are
    given by exactly one of

    - ``per_class``: n samples of each of the K classes;
    - ``counts``: K class counts (zeros allowed: an empty class still is an output);
    - ``groups``: pairs (classes, samples of each), or the words '10:500,90:50';
    - ``labels``: integers in [0, K), an array or tensor, a .npy file, or the name of a data set
      (``digits``, ``glyphs``);
    - ``target_sets``: a TargetSets of multi-label data (loss ``pick-all``), with weights of
      distillation or of next tokens;
    - ``multiplicities``: {m: n_m}, or the words '1:310,2:20': all C(K, m) sets of m labels, n_m
      samples each (``pick-all``);
    - ``targets``: an N x t array of target vectors, of regression or of encoded labels (loss
      ``mse``; K is t then);

    and become ``samples`` (Samples), which ``dataclasses.replace(problem, lambda_w=...)`` hands on,
    while ``dataclasses.replace(problem, counts=...)`` puts new data in their place. ``classes`` may
    be left out where the data tell it. ``bias``: 'none', 'penalised' (lambda_b > 0) or 'free'.
    ``freeze``: 'w' or 'h' keeps that factor at its initial value. ``loss``: a name of LOSSES or a
    loss object; ``smoothing`` and ``gamma`` are its parameters. ``dtype``: 'float64', 'float32' or
    'bfloat16'.

    Penalties that are left out are 5e-4, or, where classes or samples are so many that this would
    hold all classes together, half of the most that does not: (1 - smoothing) / (2 sqrt(K N)), to
    two digits.

    Layers: ``dim`` is d_0 and the default of all widths; ``widths`` is one number for d_1 ..
    d_(M-1), or all of d_0 .. d_(M-1). ``lambda_hidden``: one number, or one for each of W_1 ..
    W_(M-1); by default lambda_w.

    ``constraint`` 'sphere': the rows of W and H have length one, the logits are ``temperature``
    <w_k, h_i>, the loss is the cross-entropy (with smoothing), and there are neither penalties nor
    a bias.

    Adjusted logits (`adjustments`), of softmax losses: ``logit_adjustment`` tau or K offsets,
    ``margin`` m or K numbers, m (n_min/n_k)^``margin_power`` (on spheres times the temperature),
    ``class_scales`` gamma or K factors on the rows of W. ``angular_margin``, on spheres: a target's
    logit is temperature cos(theta + m), m in radians or K of them (`angular_margins`).
    ``feature_penalties``: gamma or K factors kappa_k on lambda_h, so that a sample of class k has
    lambda_h kappa_k/2 |h|^2; ``classifier_penalties`` likewise on lambda_w, of w_k. One number
    gamma is the rule (n_k/n_max)^gamma; -1 is the mean over each class in the place of the sum over
    samples.

    Errors: InputError / InputTypeError naming the argument, the value and what is allowed.
    Source: Tirer and Bruna, arXiv 2202.08087; Zhu et al., arXiv 2105.02375; Yaras et al., arXiv
    2209.09211 (spheres).
    """

    dim: int
    classes: int
    samples: Samples
    loss: Any
    smoothing: float
    gamma: float | None
    lambda_w: float
    lambda_h: float
    lambda_b: float
    bias: str
    freeze: str | None
    layers: int
    activation: str
    widths: Any
    lambda_hidden: Any
    constraint: str
    temperature: float
    logit_adjustment: Any
    margin: Any
    margin_power: float
    class_scales: Any
    angular_margin: Any
    feature_penalties: Any
    classifier_penalties: Any
    dtype: str
    device: str
    seed: int

    @cpu_by_default
    def __init__(
        self,
        *,
        dim: int,
        classes: int | None = None,
        per_class: int | None = None,
        counts: Any = None,
        groups: Any = None,
        labels: Any = None,
        targets: Any = None,
        target_sets: TargetSets | None = None,
        multiplicities: Any = None,
        samples: Samples | None = None,
        loss: Any = "ce",
        smoothing: float = 0.0,
        gamma: float | None = None,
        lambda_w: float | None = None,
        lambda_h: float | None = None,
        lambda_b: float = 0.0,
        bias: str = "none",
        freeze: str | None = None,
        layers: int = 1,
        activation: str = "linear",
        widths: int | Sequence[int] | None = None,
        lambda_hidden: float | Sequence[float] | None = None,
        constraint: str = "none",
        temperature: float = 1.0,
        logit_adjustment: float | Sequence[float] | None = None,
        margin: float | Sequence[float] | None = None,
        margin_power: float = 0.0,
        class_scales: float | Sequence[float] | None = None,
        angular_margin: float | Sequence[float] | None = None,
        feature_penalties: float | Sequence[float] | None = None,
        classifier_penalties: float | Sequence[float] | None = None,
        dtype: str = "float64",
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        given = dict(locals())
        for item in fields(self):
            self._set(item.name, given[item.name])
        self._set("dim", whole(self.dim, "dim", 1, MOST_DIM))
        self._set("seed", whole(self.seed, "seed", 0, 2**63 - 1))
        self._set("loss", loss_of(self.loss, smoothing=self.smoothing, gamma=self.gamma))
        self._check_choices()
        self._check_layers()
        self._gather({name: given[name] for name in DATA if given[name] is not None})
        self._check_penalties()
        contradictions.of_penalties(self)
        contradictions.of_adjustments(self)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_choices(self) -> None:
        for name, value, allowed in (
            ("bias", self.bias, BIASES),
            ("dtype", self.dtype, tuple(DTYPES)),
            ("activation", self.activation, tuple(TRUNKS)),
            ("constraint", self.constraint, tuple(GEOMETRIES)),
        ):
            if value not in allowed:
                raise InputError(
                    f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}"
                )
        if self.freeze not in FREEZES:
            raise InputError(
                f"freeze must be w or h, or be left out (None in Python); got {self.freeze!r}"
            )
        device_of(self.device)

    def _gather(self, data: dict[str, Any]) -> None:
        """The samples: of new data if there are, else those handed on, for the number of classes
        that is asked for.
        """
        samples = (
            self.samples
            if self.samples is not None and not data
            else Samples.create(self.classes, **data)
        )
        self._set("samples", samples.with_classes(self.classes))
        self._set("classes", self.samples.classes)
        contradictions.of_data(self)

    def _check_layers(self) -> None:
        layers = whole(self.layers, "layers", 1, MOST_LAYERS)
        contradictions.of_layers(self)
        self._set("widths", checked_widths(self.widths, layers, self.dim))
        self._set("lambda_hidden", checked_hidden_penalties(self.lambda_hidden, layers))

    def _check_penalties(self) -> None:
        temperature = factor(self.temperature, "temperature")
        if self.constraint == "none" and temperature != 1.0:
            raise InputError(
                f"temperature = {temperature} goes with constraint sphere; without it scales are "
                f"free: drop it"
            )
        self._set("temperature", temperature)
        for name in ("lambda_w", "lambda_h"):
            if getattr(self, name) is None:
                self._set(name, self._default_penalty())
        for name in ("lambda_w", "lambda_h", "lambda_b"):
            self._set(name, checked_penalty(getattr(self, name), name))

    def _default_penalty(self) -> float:
        if self.constraint != "none":
            return 0.0
        return default_penalty(
            self.samples, self.loss.smoothing, centred=self.bias == "free", layers=self.layers
        )

    @cached_property
    def angular(self) -> AngularMargin | None:
        """The margins in the angle, on the device; None where there are none."""
        return make_angular(self.counts, self.angular_margin, self.temperature, self.device)

    @cached_property
    def adjustment(self) -> Adjustment:
        """What the settings change in the logits, on the device; false where that is nothing."""
        return make_adjustment(
            self.counts,
            logit_adjustment=self.logit_adjustment,
            margin=self.margin,
            margin_power=self.margin_power,
            class_scales=self.class_scales,
            temperature=self.temperature,
        ).to(self.device)

    @cached_property
    def feature_factors(self) -> Tensor | None:
        """kappa_k on lambda_h of each class, float64 (K,); None where all are one."""
        return penalty_factors("feature_penalties", self.counts, self.feature_penalties)

    @cached_property
    def classifier_factors(self) -> Tensor | None:
        """eta_k on lambda_w of each class, float64 (K,); None where all are one."""
        return penalty_factors("classifier_penalties", self.counts, self.classifier_penalties)

    @property
    def one_penalty(self) -> bool:
        """Whether all rows of W have the same penalty, and all of H."""
        return self.feature_factors is None and self.classifier_factors is None

    def penalty_weights(self, rows: Rows) -> Tensor:
        """What each row weighs in the penalty of H, float64 (R,): its samples, times the factor of
        its class.
        """
        counts = rows.counts.to(device=self.device, dtype=torch.float64)
        factors = self.feature_factors
        return (
            counts
            if factors is None
            else counts * factors.to(counts)[rows.targets.indices.to(counts.device)]
        )

    @property
    def kind(self) -> Kind:
        """The key that tables know this problem by."""
        return Kind.of(self)

    @property
    def num_classes(self) -> int:
        """K, the number of outputs."""
        return self.classes

    @property
    def num_samples(self) -> int:
        """N: samples, also for multi-label data (not samples times targets)."""
        return self.samples.number

    @property
    def multi_label(self) -> bool:
        """Whether rows have sets of targets, of one label or more."""
        return bool(self.loss.multi_label)

    @property
    def dense(self) -> bool:
        """Whether samples have target vectors, which name no classes."""
        return self.samples.given_vectors is not None

    @property
    def weighted(self) -> bool:
        """Whether samples have weighted target sets: distributions over a few classes."""
        given = self.samples.given_sets
        return given is not None and given.weights is not None

    @cached_property
    def trunk(self) -> Trunk:
        """The layers between H and the head; of one layer a trunk without any."""
        widths = self.widths
        if not isinstance(widths, tuple):
            widths = (self.dim, *[self.dim if widths is None else widths] * (self.layers - 1))
        return Trunk(widths, TRUNKS[self.activation]())

    @property
    def head_dim(self) -> int:
        """Columns of W: ``dim``, or with layers the last width."""
        return self.trunk.widths[-1]

    def entries(self, rows: int) -> int:
        """Numbers in W, in H with so many rows, and in the hidden layers."""
        return self.num_classes * self.head_dim + rows * self.dim + self.trunk.entries

    @property
    def hidden_penalties(self) -> tuple[float, ...]:
        """lambda of W_1 .. W_(M-1)."""
        given = self.lambda_w if self.lambda_hidden is None else self.lambda_hidden
        return given if isinstance(given, tuple) else (given,) * (self.layers - 1)

    @property
    def mu(self) -> float:
        """The geometric mean of the penalties of all factors; of two sqrt(lambda_w lambda_h), the
        coefficient of the nuclear norm in the convex form.
        """
        return geometric_mean((self.lambda_w, self.lambda_h, *self.hidden_penalties))

    def features(self, point: Point) -> Tensor:
        """What the head sees of a model point, R x d_(M-1): its logits are features @ W' + b."""
        features = self.trunk.forward(point.H, point.hidden).features
        return features if self.temperature == 1.0 else self.temperature * features

    def penalties(self, rows: Rows, layout: Layout | None = None) -> Penalties:
        """lambda of each part of a model point with these rows, each of which weighs its number of
        samples (times the factor of its class, `feature_factors`); float64. With a ``layout`` rows
        and rows of W are this rank's.
        """
        weights, factors = self.penalty_weights(rows), self.classifier_factors
        if factors is not None and layout is not None:
            factors = factors[layout.class_part]
        of_w = self.lambda_w if factors is None else self.lambda_w * factors.to(weights)[:, None]
        return Penalties(
            of_w, (self.lambda_h * weights)[:, None], self.lambda_b, self.hidden_penalties
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def counts(self) -> Tensor:
        """Samples of each class, int64 (K,); with target sets, of how many samples it is a
        target.
        """
        return self.samples.counts

    @property
    def target_sets(self) -> TargetSets | None:
        """The target sets of a multi-label loss, else None."""
        return self.samples.sets if self.multi_label else None

    @property
    def sample_labels(self) -> Tensor:
        """Labels of the N samples, int64 (N,); by ascending class when the data were given as
        counts.
        """
        return self.samples.labels

    def reduction(self, reduce: str = "auto") -> str:
        """What ``reduce`` means here: itself, or for 'auto' 'classes', and 'none' where frozen
        features are given one a sample, which merging would change. Errors: InputError for another
        name, or 'classes' there.
        """
        if reduce not in REDUCTIONS:
            raise InputError(f"reduce must be one of {', '.join(REDUCTIONS)}; got {reduce!r}")
        if self.freeze == "h" and reduce == "classes":
            raise InputError(
                "reduce classes merges the features that freeze h holds fixed; use reduce none"
            )
        return ("none" if self.freeze == "h" else "classes") if reduce == "auto" else reduce

    def rows(self, reduce: str = "classes") -> Rows:
        """Rows to solve on: ``Samples.rows``, of target sets where the loss has them."""
        return self.samples.rows(reduce, as_sets=self.multi_label)

    def sample_row(self) -> Tensor:
        """Row of ``rows('classes')`` that each of the N samples belongs to, int64 (N,): how a
        solution is lifted back.
        """
        return self.samples.sample_row(as_sets=self.multi_label)
