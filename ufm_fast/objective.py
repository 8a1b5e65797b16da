"""The objective in the variables a solver works in (`scales`): its value and derivatives are those
of a backend's data term, of the trunk before it and of the penalties, along the geometry.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ufm_fast.backends import Backend, Gradients, HeadInput, RowStatistics, TiledBackend
from ufm_fast.backends.base import compute_dtype
from ufm_fast.backends.exchange import home_of
from ufm_fast.backends.sharded import ShardedBackend
from ufm_fast.backends.squared_error import by_residuals
from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.geometries import GEOMETRIES, Flat, Spheres, TiedSpheres
from ufm_fast.layout import Layout
from ufm_fast.losses import SquaredError
from ufm_fast.point import Point
from ufm_fast.problem import Problem
from ufm_fast.scales import VARIABLES, Scales
from ufm_fast.stopwatch import NO_WATCH, NoWatch
from ufm_fast.targets import Rows
from ufm_fast.trunks import Gradients as TrunkGradients
from ufm_fast.trunks import ReLU, Tape

_Method = TypeVar("_Method", bound=Callable[..., Any])


@dataclass(frozen=True)
class Evaluation:
    """Value of the objective at a point, its data term, its gradient there, and row statistics
    where asked for.
    """

    value: float
    data_value: float
    gradient: Point
    statistics: RowStatistics | None = None


def _exact(method: _Method) -> _Method:
    """The method without autocast, under which products would be rounded to half precision."""

    @wraps(method)
    def run(self: Objective, *given: Any, **named: Any) -> Any:
        with torch.autocast(torch.device(self.problem.device).type, enabled=False):
            return method(self, *given, **named)

    return cast("_Method", run)


class Objective:
    """f and its derivatives over the rows of a problem, in the variables of ``scales``: 'balanced',
    or 'raw', as those of a problem on spheres, whose rows keep their length, always are.

    ``reduce='classes'`` has one row for each class (exact); 'none' a row for each sample; 'auto' is
    'classes'. Parameters are kept in float32 where the problem's dtype is bfloat16, and rounded to
    it before each product.

    Solvers touch the space through ``move``, ``carry`` and the tangent gradient alone. With the
    backend `sharded` each rank has its blocks of a point (``layout``), and ``targets``,
    ``row_weight`` and the scales of its own rows; ``rows`` are all. ``watch`` gets the seconds of
    the head, in the tiled backend's softmax head those of logits, dH and dW apart.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        backend: Backend | None = None,
        reduce: str = "auto",
        variables: str = "balanced",
        watch: NoWatch = NO_WATCH,
    ) -> None:
        if not isinstance(problem, Problem):
            raise InputTypeError(f"problem must be a Problem, got {type(problem).__name__}")
        if variables not in VARIABLES:
            raise InputError(f"variables must be one of {', '.join(VARIABLES)}; got {variables!r}")
        self.problem = problem
        self.backend: Backend = TiledBackend() if backend is None else backend
        self.watch = watch
        if isinstance(self.backend, TiledBackend):
            self.backend.softmax.watch = watch
        self.reduce = problem.reduction(reduce)
        self.geometry: Flat = GEOMETRIES[problem.constraint]()
        self.trunk = problem.trunk
        self.variables = "raw" if self.geometry.curved else variables
        self.rows: Rows = problem.rows(self.reduce)
        self.layout = self._spread()
        here = self.rows if self.layout is None else self.rows.part(self.layout.row_part)
        device = torch.device(problem.device)
        self.dtype = compute_dtype(problem.torch_dtype)
        self.targets = here.targets.to(device)
        self.angular = problem.angular
        if self.angular is not None:
            kinked = self.angular.angles[self.targets.indices] > 0
            self.geometry = TiedSpheres(home_of(self.targets, self.layout), kinked)
        counts = here.counts.to(device=device, dtype=torch.float64)
        self.row_weight = counts / problem.num_samples
        self.scales = Scales.of(
            problem,
            problem.penalty_weights(here),
            balanced=self.variables == "balanced",
            layout=self.layout,
        )
        self._spent = [0.0]  # shared with `rounded` copies
        self._last: _Pass | None = None

    def _spread(self) -> Layout | None:
        """Which rank holds what."""
        if not isinstance(self.backend, ShardedBackend):
            return None
        return Layout(self.backend.mesh, self.problem.num_classes, self.rows.number)

    @property
    def evaluations(self) -> float:
        """Gradient-equivalents so far; a Hessian product counts as two."""
        return self._spent[0]

    @evaluations.setter
    def evaluations(self, value: float) -> None:
        self._spent[0] = value

    @property
    def plain(self) -> bool:
        """One layer in flat space, logits as they are: what preconditioners are made for."""
        if not self.problem.one_penalty or self.problem.weighted:
            return False
        return self.trunk.empty and not self.geometry.curved and not self.scales.adjustment

    def agreed(self, answer: bool) -> bool:
        """What all ranks go by where their answers may differ: the first one's."""
        return answer if self.layout is None else self.layout.mesh.agreed(answer)

    # ---- the model's parameters

    def from_model(
        self, W: Tensor, H: Tensor, b: Tensor | None, hidden: Sequence[Tensor] = ()
    ) -> Point:
        """Solver variables of a model point with one feature row for each row of the problem."""
        return self.scales.from_model(W, H, b, hidden)

    def to_model(self, x: Point) -> Point:
        """The model's parameters with one feature row for each row of the problem."""
        return self.scales.to_model(x)

    def lift(self, x: Point) -> Point:
        """(W, H, b) with one feature row for each of the N samples."""
        model = self.to_model(x)
        if self.reduce == "none":
            return model
        if self.layout is not None:
            raise InputError(
                "a point that is spread over ranks has no rows of all samples; load its "
                "checkpoint in one process"
            )
        return replace(
            model, H=model.H.index_select(0, self.problem.sample_row().to(model.H.device))
        )

    # ---- value and derivatives

    def head_input(self, x: Point) -> HeadInput:
        """The data term's input: features scaled so that the logits are features @ B' + b."""
        return self._head(x, self.forward(x).features)

    def forward(self, x: Point) -> Tape:
        """The pass through the trunk, of features in units of the logits: temperature and the rows'
        scales taken in.
        """
        return self.trunk.forward(self.scales.features(x), x.hidden)

    def _head(self, x: Point, features: Tensor, *, direction: bool = False) -> HeadInput:
        adjustment, dtype = self.scales.adjustment, self.problem.torch_dtype
        head = HeadInput(
            self.problem.loss,
            features,
            x.W,
            self.scales.model_bias(x),
            self.targets,
            self.row_weight,
            layout=self.layout,
            angular=self.angular,
        )
        if adjustment:
            head = adjustment.apply_scale(head) if direction else adjustment.apply(head)
        if dtype != self.dtype:
            head = replace(head, features=features.to(dtype), weight=head.weight.to(dtype))
        return head

    @_exact
    def value_and_grad(self, x: Point, *, statistics: bool = False) -> Evaluation:
        """f(x) and its gradient along the space in the solver's variables (zero in a frozen
        factor).
        """
        self.evaluations += 1
        gradient, out = self.scales.prefilled(x)
        tape = self.forward(x)
        pulled = None if self.trunk.empty else torch.zeros_like(tape.features)
        with self.watch("head"):
            result = self.backend.head(
                self._head(x, tape.features), _into(out, pulled), statistics=statistics
            )
        if pulled is not None:
            gradient = _with(gradient, *self._of_all_rows(*tape.pull(pulled)))
        self.scales.to_variables(gradient)
        gradient, normal = self.geometry.split(x, gradient)
        if pulled is not None or normal is not None:
            self._last = _Pass(x, tape, pulled, normal)
        if isinstance(self.geometry, TiedSpheres):
            gradient = self.geometry.tied(x, gradient, result.reach)
        data = float(result.value)
        return Evaluation(data + self.penalty(x), data, gradient, result.statistics)

    @_exact
    def hvp(self, x: Point, v: Point) -> Point:
        """Hessian of f at x times a tangent v. Counts as two gradient evaluations."""
        self.evaluations += 2
        v = self.scales.movable(v)
        product, out = self.scales.prefilled(v)
        if self.trunk.empty:
            direction = self._head(v, self.scales.features(v), direction=True)
            with self.watch("head"):
                self.backend.head_hvp(self.head_input(x), direction, out)
        else:
            product = self._through_layers(x, v, product, out)
        self.scales.to_variables(product)
        return (
            self.geometry.hessian(x, v, self._pass(x).normal, product)
            if self.geometry.curved
            else product
        )

    def _through_layers(self, x: Point, v: Point, product: Point, out: Gradients) -> Point:
        """The Hessian product of the data term behind a trunk, added onto ``product``."""
        at, moves = self._pass(x), (self.scales.features(v), v.hidden)
        assert at.pulled is not None
        change = torch.zeros_like(at.pulled)
        direction = self._head(v, at.tape.push(*moves), direction=True)
        with self.watch("head"):
            self.backend.head_hvp(self._head(x, at.tape.features), direction, _into(out, change))
        return _with(product, *self._of_all_rows(*at.tape.curve(at.pulled, change, *moves)))

    def _of_all_rows(self, H: Tensor, hidden: tuple[Tensor, ...]) -> TrunkGradients:
        """Gradients of H and of the hidden layers, which are sums over the rows of all ranks."""
        if self.layout is not None:
            for part in hidden:
                self.layout.mesh.world.sum_(part, "layers")
        return H, hidden

    def rounded(self, e: float) -> Objective:
        """The same objective with the kinks of its ReLU rounded by e, in the solver's units
        (`trunks.ReLU`), or those of its angular margins (`angular_margins`).
        """
        if self.angular is None:
            return self._changed(trunk=replace(self.trunk, activation=ReLU(e)))
        return self._changed(angular=replace(self.angular, rounding=e), geometry=Spheres())

    def resting(self, part: float) -> Objective:
        """The same objective, with derivatives of the piece on which inputs of its ReLU up to that
        part of the largest rest.
        """
        return self._changed(trunk=replace(self.trunk, activation=ReLU(rest=part)))

    def tempered(self, temperature: float) -> Objective:
        """The same objective on spheres at another temperature."""
        problem, angular = replace(self.problem, temperature=temperature), self.angular
        return self._changed(
            problem=problem,
            scales=self.scales.tempered(problem),
            angular=None if angular is None else replace(angular, temperature=temperature),
        )

    def _changed(self, **parts: Any) -> Objective:
        other = copy.copy(self)
        vars(other).update(parts, _last=None)
        return other

    def _pass(self, x: Point) -> _Pass:
        """What the last evaluation left, if it was at x; else x is evaluated, which is not
        counted.
        """
        if self._last is None or self._last.x is not x:
            self.value_and_grad(x)
            self.evaluations -= 1
        assert self._last is not None
        return self._last

    def move(self, x: Point, direction: Point, t: float = 1.0) -> Point:
        """The point at t on the geodesic that leaves x in a tangent direction: x + t direction, but
        on spheres.
        """
        return self.geometry.move(x, direction, t)

    def carry(self, x: Point, direction: Point, t: float, v: Point) -> Point:
        """A tangent v at x, transported along that move."""
        return self.geometry.carry(x, direction, t, v)

    @_exact
    def penalty(self, x: Point) -> float:
        """lambda terms of f, in float64."""
        return self.scales.penalties.value(x)

    @cached_property
    def value_floor(self) -> float:
        """Absolute rounding error of the value beside its relative one: squared error's where it is
        a difference of Grams.
        """
        problem = self.problem
        if isinstance(problem.loss, SquaredError):
            exact = by_residuals(
                self.rows.targets,
                problem.num_classes,
                problem.head_dim,
                bias=problem.bias != "none",
            )
            return 0.0 if exact else 1e-15
        return 0.0

    # ---- what stopping rules compare with

    def gradient_scale(self, x: Point) -> float:
        """What a gradient norm is small against: max(sum of lambda |part| over the factors, mu) in
        the solver's variables; on spheres the gradient's normal part, which is what holds the rows
        at their length.
        """
        if self.geometry.curved:
            normal = self._pass(x).normal
            assert normal is not None
            return max(normal.norm(), 1e-300)
        return max(self.scales.penalties.size(x), self.problem.mu, 1e-300)


@dataclass(frozen=True)
class _Pass:
    """What an evaluation at x leaves for Hessian products there: the trunk's tape, the data term's
    gradient in the features (None without layers), and the gradient's normal part (None in flat
    space).
    """

    x: Point
    tape: Tape
    pulled: Tensor | None
    normal: Point | None


def _into(out: Gradients, features: Tensor | None) -> Gradients:
    """The buffers of the head: of the features behind a trunk, if there is one."""
    return out if features is None else replace(out, features=features)


def _with(total: Point, H: Tensor, hidden: tuple[Tensor, ...]) -> Point:
    return Point(
        total.W,
        total.H.add_(H),
        total.b,
        tuple(a.add_(b) for a, b in zip(total.hidden, hidden, strict=True)),
        total.layout,
    )
