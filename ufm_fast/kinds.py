"""The kind of a problem: the key that every table knows it by."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ufm_fast.losses import registered_name

if TYPE_CHECKING:
    from ufm_fast.problem import Problem


class Kind(NamedTuple):
    """What a problem is: the key of every table of theory, certificates and preconditioners.

    ``loss`` is a name of LOSSES, and only an object of exactly that row's class has it: it is empty
    for every other loss. Logits with offsets or margins are known as 'NAME shifted', with scales,
    or with penalties of each class, as 'NAME scaled', with margins in the angle, whatever else, as
    'NAME angular', the squared error to target vectors as 'mse dense', and the pick-all loss of
    weighted sets as 'pick-all weighted'. A kind that no row of a table names has nothing there.
    """

    trunk: str
    geometry: str
    loss: str
    bias: str
    frozen: str | None

    @classmethod
    def of(cls, problem: Problem) -> Kind:
        trunk = "none" if problem.layers == 1 else problem.activation
        loss = registered_name(problem.loss)
        if loss and (problem.dense or problem.weighted):
            loss += " dense" if problem.dense else " weighted"
        if loss and problem.angular is not None:
            loss += " angular"
        elif loss and (problem.adjustment.scale is not None or not problem.one_penalty):
            loss += " scaled"
        elif loss and problem.adjustment:
            loss += " shifted"
        return cls(trunk, problem.constraint, loss, problem.bias, problem.freeze)
