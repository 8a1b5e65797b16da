"""Certificates: lower bounds on the global minimum, and how close a point's value lies to them."""

from ufm_fast.theory.certificates.base import EXACT_CLASSES, TOLERANCE, Certificate
from ufm_fast.theory.certificates.softmax import held_bytes
from ufm_fast.theory.certificates.table import CERTIFIERS, certify

__all__ = ["CERTIFIERS", "EXACT_CLASSES", "TOLERANCE", "Certificate", "certify", "held_bytes"]
