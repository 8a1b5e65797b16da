"""Closed forms: minima that are known, with their source and a minimiser."""

from ufm_fast.theory.forms.base import ClosedForm
from ufm_fast.theory.forms.table import FORMS, closed_form

__all__ = ["FORMS", "ClosedForm", "closed_form"]
