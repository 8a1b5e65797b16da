"""The papers' claims, measured: ``ufm-fast reproduce NAME`` or `reproduce` here; `CLAIMS` has a row
for each.
"""

from ufm_fast.reproduce.claim import FAIL, PASS, REPORT, Claim, Evidence, Judgement, Quantity
from ufm_fast.reproduce.runner import Verdict, chosen, reproduce
from ufm_fast.reproduce.table import CLAIMS

__all__ = [
    "CLAIMS",
    "FAIL",
    "PASS",
    "REPORT",
    "Claim",
    "Evidence",
    "Judgement",
    "Quantity",
    "Verdict",
    "chosen",
    "reproduce",
]
