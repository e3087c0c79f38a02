"""The suite beside pyautoattack's ``rand``, on random defenses of digits, judged on the same fresh draws.

    python benchmarks/suite.py [images]

What pyautoattack reports is shown too: it takes an example out as soon as one draw is wrong.
"""

import sys
import time
from collections.abc import Callable

import pyautoattack
import torch
from nets import digits_nets

import probdefense as pd
from probdefense.attacks import suite
from probdefense.logits.rules import mean_prob
from probdefense.prediction.drawing import draw_keyed

EPS = 0.1


def judged(defense: pd.Defense, x: torch.Tensor, y: torch.Tensor) -> str:
    """Accuracy on 200 fresh draws, by the mean probability of 50 of them and by single ones."""
    logits = torch.stack([draw_keyed(defense, x, 50, seed) for seed in range(4)])
    mean = sum(float((mean_prob(one).argmax(-1) == y).double().mean()) for one in logits) / 4
    single = float((logits.argmax(-1) == y).double().mean())
    return f"{mean:9.3f} {single:7.3f}"


def main() -> None:
    torch.set_num_threads(1)
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    x, y = (part[:count] for part in pd.data.digits()[1].tensors)
    print(f"{count} digits, l-inf, eps {EPS}              mean_prob  single   reported   seconds")
    for name, defense in digits_nets(("rse", "bayesian")).items():
        print(f"  {name:8s} {'clean':26s}{judged(defense, x, y)}")

        def theirs(cost: pd.Defense) -> torch.Tensor:
            module = cost.as_module()
            peer = pyautoattack.AutoAttack(module, norm="Linf", eps=EPS, version="rand", seed=0)
            points, labels = peer.run_standard_evaluation(x, y)
            theirs.reported = float((labels == y).double().mean())  # type: ignore[attr-defined]
            return points

        def ours(cost: pd.Defense) -> torch.Tensor:
            return suite(cost, x, y, eps=EPS, seed=0)

        runs: dict[str, Callable[[pd.Defense], torch.Tensor]] = {"pyautoattack rand": theirs, "suite": ours}
        for label, run in runs.items():
            start = time.perf_counter()
            points = run(defense)
            seconds = time.perf_counter() - start
            reported = f"{theirs.reported:8.3f}" if run is theirs else " " * 8  # type: ignore[attr-defined]
            print(
                f"  {name:8s} {label:26s}{judged(defense, points, y)}   {reported}  {seconds:9.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
