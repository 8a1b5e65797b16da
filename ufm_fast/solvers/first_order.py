"""Gradient descent with a constant step, heavy-ball and Nesterov momentum, descent by signs and by
polar factors of the gradient, and Adam: the dynamics that the papers study.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ufm_fast.objective import Objective
from ufm_fast.point import Point
from ufm_fast.solvers.base import State, largest_curvature
from ufm_fast.solvers.solution import Outcome
from ufm_fast.tall import polar_factor

_OVERFLOW = "the value overflowed: lower learning_rate"


@dataclass(frozen=True)
class _Memory:
    rate: float
    velocity: Point | None = None  # None: at rest
    second: Point | None = None
    age: int = 0


class GradientDescent:
    """x <- x + v with v <- momentum v - rate grad f(x), the gradient taken at x + momentum v for
    ``nesterov``.

    ``learning_rate`` None: 1 / (1.5 times the largest curvature at the start), halved whenever the
    value rises, and the velocity dropped; a given rate is kept. Without momentum this is plain
    gradient descent.
    """

    max_steps = 20000

    def __init__(
        self, learning_rate: float | None = None, momentum: float = 0.0, nesterov: bool = False
    ) -> None:
        self.learning_rate, self.momentum, self.nesterov = learning_rate, momentum, nesterov
        self.name = "gd" if momentum == 0 else "nesterov" if nesterov else "momentum"

    def init(self, objective: Objective, point: Point) -> State:
        rate = self.learning_rate
        if rate is None:
            # At the origin the curvature is that of the coupling alone; mu keeps the step finite at
            # a flat start.
            rate = 1.0 / (
                1.5 * max(largest_curvature(objective, point), objective.problem.mu, 1e-12)
            )
        return State(point, objective.value_and_grad(point), _Memory(rate))

    def _direction(self, objective: Objective, x: Point, gradient: Point) -> Point:
        """What a step without momentum goes against."""
        return gradient

    def step(self, objective: Objective, state: State) -> State:
        memory: _Memory = state.memory
        gradient, velocity = state.evaluation.gradient, memory.velocity
        if self.nesterov and velocity is not None:
            ahead = objective.value_and_grad(
                objective.move(state.point, velocity, self.momentum)
            ).gradient
            gradient = objective.geometry.tangent(state.point, ahead)
        if self.momentum == 0.0:
            point = objective.move(
                state.point, self._direction(objective, state.point, gradient), -memory.rate
            )
        else:
            velocity = _pushed(velocity, self.momentum, gradient, memory.rate)
            point = objective.move(state.point, velocity)
            velocity = objective.carry(state.point, velocity, 1.0, velocity)
        found = objective.value_and_grad(point)
        if not math.isfinite(found.value):
            if self.learning_rate is not None:
                return State(state.point, state.evaluation, memory, Outcome.DIVERGED, _OVERFLOW)
            return State(state.point, state.evaluation, _Memory(memory.rate / 4))
        rate = memory.rate
        if self.learning_rate is None and found.value > state.evaluation.value * (1 + 1e-12):
            if rate < 1e-12:
                return State(
                    state.point,
                    state.evaluation,
                    memory,
                    Outcome.STALLED,
                    "no step lowers the value",
                )
            return State(state.point, state.evaluation, _Memory(rate / 2))
        return State(point, found, _Memory(rate, velocity, None, memory.age + 1))


class SteepestDescent(GradientDescent):
    """x <- x - rate s with s, part by part, the direction of steepest descent in a norm other than
    Frobenius':

    ``sign`` has the signs of the gradient G (the largest entry's norm, signSGD of Bernstein et al.,
    arXiv 1802.04434); ``spectral`` the polar factor U V' of G = U S V' (the spectral norm, Muon
    without momentum; Jordan et al., 2024; Bernstein and Newhouse, arXiv 2409.20325), of a bias G /
    |G|.

    A given ``learning_rate`` is that rate. Without one s is multiplied by <G, s> / |s|^2, which
    makes it the gradient's projection on s, so that the rates of gradient descent, from the largest
    curvature, hold and it converges as that does. On spheres s is projected on the tangent space.
    """

    def __init__(self, name: str, learning_rate: float | None = None) -> None:
        super().__init__(learning_rate)
        self.name = name

    def _direction(self, objective: Objective, x: Point, gradient: Point) -> Point:
        s = gradient.map(torch.sign) if self.name == "sign" else _polar(gradient)
        if objective.geometry.curved:
            s = objective.geometry.tangent(x, s)
        if self.learning_rate is not None:
            return s
        return s.zip(gradient, lambda part, g: _projected(part, g, gradient.summed))


def _polar(gradient: Point) -> Point:
    """The polar factor of each part, of which ranks have blocks but for the hidden layers."""
    mesh = None if gradient.layout is None else gradient.layout.mesh
    return replace(
        gradient,
        W=polar_factor(gradient.W, mesh),
        H=polar_factor(gradient.H, mesh),
        b=None if gradient.b is None else polar_factor(gradient.b, mesh),
        hidden=tuple(map(polar_factor, gradient.hidden)),
    )


def _projected(s: Tensor, gradient: Tensor, summed: Callable[[float], float]) -> Tensor:
    s64 = s.double()
    along, square = summed(float((s64 * gradient).sum())), summed(float(s64.square().sum()))
    return s * torch.tensor(along / max(square, 1e-300), dtype=torch.float64).to(s)


def _pushed(velocity: Point | None, momentum: float, gradient: Point, rate: float) -> Point:
    """momentum velocity - rate gradient, a new point."""
    if velocity is None:
        return gradient.scale(-rate)
    return velocity.zip(gradient, lambda v, g: v.mul(momentum).add_(g, alpha=-rate))


class Adam:
    """Adam (Kingma and Ba, arXiv 1412.6980) with beta = (0.9, 0.999), eps = 1e-12 and a constant
    rate (default 0.01).
    """

    name = "adam"
    max_steps = 20000

    def __init__(
        self,
        learning_rate: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-12,
    ) -> None:
        self.rate, self.betas, self.eps = (
            0.01 if learning_rate is None else learning_rate,
            betas,
            eps,
        )

    def init(self, objective: Objective, point: Point) -> State:
        return State(
            point, objective.value_and_grad(point), _Memory(self.rate, point.zeros(), point.zeros())
        )

    def step(self, objective: Objective, state: State) -> State:
        memory: _Memory = state.memory
        assert memory.velocity is not None
        assert memory.second is not None
        g, age, (b1, b2) = state.evaluation.gradient, memory.age + 1, self.betas
        first = memory.velocity.zip(g, lambda m, x: m.mul(b1).add_(x, alpha=1 - b1))
        second = memory.second.zip(g, lambda v, x: v.mul(b2).addcmul_(x, x, value=1 - b2))
        rate, correction = self.rate / (1 - b1**age), math.sqrt(1 - b2**age)
        move = first.zip(second, lambda m, v: m / (v.sqrt() / correction + self.eps))
        point = state.point.axpy(-rate, move)
        found = objective.value_and_grad(point)
        memory = _Memory(self.rate, first, second, age)
        if not math.isfinite(found.value):
            return State(state.point, state.evaluation, memory, Outcome.DIVERGED, _OVERFLOW)
        return State(point, found, memory)
