"""Peak memory of whole processes: many draws beside one."""

from typing import Any

import torch

from benchmarks.measure import benchmark, peak

PREDICT = """
import probdefense as pd
defense, x = pd.defenses.bayesian(pd.models.resnet18(), num_data=10).eval(), torch.rand(1, 3, 32, 32)
pd.predict(defense, x, {draws})
"""

GRADIENT = """
import probdefense as pd
defense = pd.defenses.rse(pd.models.resnet20()).eval()
x, y = torch.rand(32, 3, 32, 32, requires_grad=True), torch.zeros(32, dtype=torch.int64)
logits = defense.samples({draws}, recompute={recompute})(x)
torch.autograd.grad(pd.losses.predictive_cross_entropy(logits, y).sum(), x)
"""


@benchmark("memory-predict", "peak memory, predictive S=50 / S=1, ResNet-18 weights", 1.1)
def predict(device: torch.device) -> dict[str, Any]:
    one, many = (peak(PREDICT.format(draws=draws)) for draws in (1, 50))
    return {"value": many / one, "about": {"S=1, MB": round(one), "S=50, MB": round(many)}}


@benchmark("memory-gradient", "peak memory, EOT gradient S=16 / S=1, recomputed, RSE ResNet-20, B=32", 1.5)
def gradient(device: torch.device) -> dict[str, Any]:
    one, many = (peak(GRADIENT.format(draws=draws, recompute=True)) for draws in (1, 16))
    whole = peak(GRADIENT.format(draws=16, recompute=False))
    sizes = {"S=1, MB": round(one), "S=16, MB": round(many), "S=16, remembered, MB": round(whole)}
    return {"value": many / one, "about": sizes}
