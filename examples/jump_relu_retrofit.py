"""What is a retrofitted JumpReLU worth against attacks that know of it?

    python examples/jump_relu_retrofit.py [--quick]

Erichson et al., 2020, JumpReLU. Units below the threshold pass no gradient, so plain PGD flatters it; BPDA
differentiates a smooth jump, transfer uses the network without jumps, and Square needs no gradient.
"""

import sys
from functools import partial

import torch
from torch.utils.data import DataLoader

import probdefense as pd
from probdefense.types import Attack, Inputs, Labels, LogitsFn, Seed


def main(quick: bool = False) -> None:
    """Retrofits a trained network and prints it under weak and strong attacks, beside the plain one."""
    torch.manual_seed(0)
    train, test = pd.data.digits()
    plain = pd.deterministic(pd.models.small_cnn())
    pd.fit(plain, DataLoader(train, 64, shuffle=True), epochs=4 if quick else 20, progress=not quick)
    plain.eval()
    kappa = pd.defenses.quantiles(plain, train.tensors[0], share=0.3)
    jumps = pd.defenses.jump_relu(plain, kappa=kappa).eval()
    num_steps = 10 if quick else 40
    pgd = partial(pd.attacks.pgd, num_steps=num_steps)

    def bpda(logits_fn: LogitsFn, x: Inputs, y: Labels, *, eps: float, seed: Seed = None) -> Inputs:
        with pd.attacks.bpda(jumps, pd.defenses.surrogates(jumps, width=0.1)):
            return pgd(logits_fn, x, y, eps=eps, seed=seed)

    made_for_it: dict[str, Attack] = {
        "bpda": bpda,
        "transfer": pd.attacks.transfer(pgd, plain),
        "square": partial(pd.attacks.square, max_queries=10 * num_steps),
    }
    columns = ("defense", "attack", "accuracy", "low", "high", "gradients", "queries")
    data = test[: 40 if quick else 360]
    evaluate = partial(pd.evaluate, data=data, eps=0.15, rules=[pd.rules.mean_prob])
    report = evaluate(plain, attacks={"pgd": pgd}, name="plain")
    report += evaluate(jumps, attacks={"pgd": pgd, **made_for_it}, name="jump_relu")
    print(report.table(columns))


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
