"""Are the samples of a chain a defense, and do chains agree?

Stochastic gradient Langevin dynamics walks through the posterior of a trained network from two sides. What it
leaves behind becomes random weights, is attacked, and goes to ArviZ by chain. The steps are those of the
package ``posteriors`` where it is installed, and two lines of our own where it is not.

    python examples/samples_as_posterior.py --quick
"""

import argparse
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

import probdefense as pd

Weights = dict[str, Tensor]


def log_posterior(
    weights: Weights, batch: tuple[Tensor, Tensor], *, net: nn.Module, size: int
) -> tuple[Tensor, Tensor]:
    """Per example, with a prior N(0, 1); the second is what ``posteriors`` asks for besides."""
    x, y = batch
    fit = -nn.functional.cross_entropy(functional_call(net, weights, (x,)), y)
    prior = -sum((value.square().sum() for value in weights.values()), torch.zeros(())) / (2 * size)
    return fit + prior, torch.zeros(())


def langevin(target: Any, rate: float, temperature: float) -> Callable[[Weights, Any], Weights]:
    """One step of SGLD as a function of weights and batch."""
    if find_spec("posteriors") is not None:
        import posteriors

        sampler = posteriors.sgmcmc.sgld.build(target, rate, temperature=temperature)
        return lambda weights, batch: sampler.update(sampler.init(weights), batch)[0].params

    def step(weights: Weights, batch: Any) -> Weights:
        slopes = grad(lambda at: target(at, batch)[0])(weights)
        noise = (2 * rate * temperature) ** 0.5
        return {n: w + rate * slopes[n] + noise * torch.randn_like(w) for n, w in weights.items()}

    return step


def chain(net: nn.Module, train: tuple[Tensor, Tensor], steps: int, keep: int) -> list[Weights]:
    """States of one chain, the last `keep` of them evenly spaced over its second half."""
    x, y = train
    step = langevin(partial(log_posterior, net=net, size=len(x)), rate=1e-2, temperature=1 / len(x))
    weights = {name: value.detach().clone() for name, value in net.named_parameters()}
    states = []
    for number in range(steps):
        rows = torch.randint(len(x), (64,))
        weights = step(weights, (x[rows], y[rows]))
        if number >= steps // 2 and (number - steps // 2) % (steps // 2 // keep) == 0:
            states.append(weights)
    return states[:keep]


def main(quick: bool = False) -> Any:
    """Trains, walks, attacks, and prints a table."""
    torch.manual_seed(0)
    train, test = (part.tensors for part in pd.data.digits())
    net = pd.models.small_cnn()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*train), batch_size=64, shuffle=True)
    pd.fit(pd.deterministic(net), loader, epochs=4 if quick else 20, progress=False)
    net.eval()

    steps, keep = (200, 10) if quick else (4000, 50)
    samples = [chain(net, train, steps, keep) for _ in range(2)]
    defense = pd.defenses.from_samples(net, samples, num_data=len(train[0])).eval()

    data = tuple(part[: 60 if quick else 360] for part in test)
    pgd = partial(pd.attacks.pgd, num_steps=5 if quick else 40)
    report = pd.evaluate(pd.deterministic(net), data, {"pgd": pgd}, eps=0.1, name="trained", num_samples=20)
    report += pd.evaluate(defense, data, {"pgd": pgd}, eps=0.1, name="samples", num_samples=20)
    print(report.table(("defense", "attack", "eps", "rule", "accuracy", "low", "high")))
    tree = pd.to_arviz(defense, data)
    lengths = dict(tree["posterior"].sizes)
    print(f"ArviZ sees {lengths['chain']} chains of {lengths['draw']} draws")
    print(f"mean log-likelihood {float(tree['log_likelihood']['y'].mean()):.3f} nats")
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer images, epochs and draws")
    main(parser.parse_args().quick)
