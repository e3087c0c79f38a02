"""Attacks: functions of anything that gives logits with a sample axis. One family, one file."""

from probdefense.attacks.adaptive import fpa, gmsa
from probdefense.attacks.apgd import apgd
from probdefense.attacks.arc import arc
from probdefense.attacks.bpda import bpda
from probdefense.attacks.cw import cw, cw_fixed
from probdefense.attacks.ddn import ddn
from probdefense.attacks.deepfool import deepfool
from probdefense.attacks.ead import ead
from probdefense.attacks.fgsm import fgsm, r_fgsm
from probdefense.attacks.fmn import fmn
from probdefense.attacks.hop_skip_jump import hop_skip_jump
from probdefense.attacks.nes import nes
from probdefense.attacks.pgd import bim, mim, pgd
from probdefense.attacks.spsa import spsa
from probdefense.attacks.square import square
from probdefense.attacks.substitute import substitute
from probdefense.attacks.suite import least_budget as least_budget
from probdefense.attacks.suite import suite
from probdefense.attacks.tools import diagnostics as diagnostics
from probdefense.attacks.transfer import transfer
from probdefense.attacks.worst_of import worst_of
from probdefense.attacks.zoo import zoo

# In reading order: one step, iterated, minimum norm, gradient-free, transfer, adaptive.
__all__ = [  # noqa: RUF022
    "fgsm",
    "r_fgsm",
    "bim",
    "mim",
    "pgd",
    "apgd",
    "cw",
    "cw_fixed",
    "ead",
    "ddn",
    "fmn",
    "deepfool",
    "square",
    "zoo",
    "nes",
    "spsa",
    "hop_skip_jump",
    "substitute",
    "transfer",
    "bpda",
    "arc",
    "suite",
    "worst_of",
    "fpa",
    "gmsa",
]
