"""Numbers that can be trusted: the protocol of a verdict, reports, intervals, comparisons, certificates."""

from probdefense.evaluation import calibration
from probdefense.evaluation.certification import Certificate, certify
from probdefense.evaluation.comparison import Comparison, compare, compare_all
from probdefense.evaluation.norms import worst_over_norms
from probdefense.evaluation.points import with_draws
from probdefense.evaluation.posterior import PosteriorCertificate, certify_posterior
from probdefense.evaluation.protocol import evaluate
from probdefense.evaluation.report import Report

__all__ = [
    "Certificate",
    "Comparison",
    "PosteriorCertificate",
    "Report",
    "calibration",
    "certify",
    "certify_posterior",
    "compare",
    "compare_all",
    "evaluate",
    "with_draws",
    "worst_over_norms",
]
