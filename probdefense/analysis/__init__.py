"""Looking at defenses: ArviZ containers, robustness curves, plots and the HTML report."""

from probdefense.analysis.arviz import to_arviz
from probdefense.analysis.curves import RobustnessCurve, robustness_curve
from probdefense.analysis.html import write_html
from probdefense.analysis.loo import Loo, guide_k_hat, loo
from probdefense.analysis.pictures import (
    entropy_clean_attacked,
    image_grid,
    loss_traces,
    noise_scales,
    reliability,
)
from probdefense.analysis.plots import (
    accuracy_against_queries,
    accuracy_chart,
    certified_vs_empirical,
    eot_convergence,
    robustness_curves,
)

__all__ = [
    "Loo",
    "RobustnessCurve",
    "accuracy_against_queries",
    "accuracy_chart",
    "certified_vs_empirical",
    "entropy_clean_attacked",
    "eot_convergence",
    "guide_k_hat",
    "image_grid",
    "loo",
    "loss_traces",
    "noise_scales",
    "reliability",
    "robustness_curve",
    "robustness_curves",
    "to_arviz",
    "write_html",
]
