"""What a user can get wrong, as exceptions that the command line turns into one readable line."""

from __future__ import annotations


class InputError(ValueError):
    """A value that the user gave is not usable; the message names the argument, the value and what
    is allowed.
    """


class Contradiction(RuntimeWarning):
    """Theory and a value contradict one another, so one of them is wrong. Please report the problem
    that shows it.
    """


class InputTypeError(InputError, TypeError):
    """An argument has the wrong type or dtype; the message names the argument and what is
    allowed.
    """
