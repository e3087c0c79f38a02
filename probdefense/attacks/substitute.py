r"""Substitute: a network trained on the answers of the defense, attacked in its place.

Papernot et al., 2017, [Practical Black-Box Attacks against Machine
Learning](https://arxiv.org/abs/1602.02697). The attacker knows a few inputs and asks for decisions. Each
round adds the points that the substitute finds most telling, so that it learns where the boundaries of
the defense lie:

$$ X \leftarrow X \cup \{ x + \lambda\, \mathrm{sign}\, \nabla_x z_{\tilde y(x)}(x) : x \in X \} $$
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from probdefense.attacks.pgd import pgd
from probdefense.attacks.tools.border import attack
from probdefense.attacks.tools.gradient import ask, input_gradient
from probdefense.logits.adapters import Static
from probdefense.logits.rules import vote
from probdefense.progress import track
from probdefense.rng import Stream
from probdefense.types import Attack, Inputs, Labels, Logits, LogitsFn, Norm, Rule, Seed
from probdefense.validation import check_like

BATCH, LEARNING_RATE = 64, 3e-3
"""Of the training of the substitute, by Adam."""


@attack
def substitute(
    logits_fn: LogitsFn,
    x: Inputs,
    y: Labels,
    *,
    eps: float,
    norm: Norm = math.inf,
    inner: Attack = pgd,
    known: Inputs | None = None,
    net: Callable[[], nn.Module] | None = None,
    num_rounds: int = 6,
    num_epochs: int = 10,
    step_size: float = 0.1,
    rule: Rule = vote,
    seed: Seed = None,
    max_batch: int | None = None,
) -> Inputs:
    r"""Trains a substitute on the decisions of the defense by Jacobian augmentation, and attacks that.

    The defense answers $n\,2^{r}$ queries per draw for $n$ known inputs and $r$ rounds, and is never
    asked for a gradient. Examples share the substitute, so a result depends on the whole batch.

    Args:
        logits_fn: What is attacked; ``samples(n)`` sets how many draws make a decision.
        x: ``(batch, *event)`` in [0, 1].
        y: True classes, ``(batch,)``.
        eps: Radius in pixels.
        norm: 1, 2 or ``inf``.
        inner: The attack on the substitute; it takes ``eps`` and ``norm``.
        known: Inputs that the attacker has to begin with, ``(n, *event)``; `x` by default.
        net: Makes the network of the substitute; two hidden layers of 200 units by default.
        num_rounds: $r$, augmentations; each doubles the training set.
        num_epochs: Passes over the training set per round.
        step_size: $\lambda$ in pixels.
        rule: How the draws of an answer decide.
        seed: An int, one per example, or a generator; fixes every random number of the attack.
        max_batch: Examples at once; every such batch trains a substitute of its own.

    Returns:
        Points of the ball, ``(batch, *event)``.

    Raises:
        ValueError: bad inputs or settings.

    References:
        Papernot et al., 2017, [Practical Black-Box Attacks against Machine
        Learning](https://arxiv.org/abs/1602.02697)

    Examples:
        >>> import probdefense as pd
        >>> net = pd.deterministic(torch.nn.Linear(4, 3))
        >>> x, y = torch.rand(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
        >>> x_adv = substitute(net, x, y, eps=0.1, num_rounds=1, num_epochs=1)
    """
    rng = Stream.of(seed, x)
    inputs = x if known is None else check_like(known, x, "known")
    scores = _answers(logits_fn, inputs, rule)
    model = (net() if net is not None else _perceptron(x[0].numel(), scores.shape[1])).to(x)
    copy, labels = Static(lambda points: model(points).unsqueeze(0)), scores.argmax(-1)
    _train(model, inputs, labels, num_epochs)
    for number in track(range(num_rounds), "substitute"):
        told = labels

        def own_score(logits: Logits, told: Labels = told) -> Tensor:
            return logits[0].gather(1, told.unsqueeze(1)).squeeze(1)

        slope = input_gradient(copy, inputs, own_score, where=f"substitute, round {number}")
        new = (inputs + step_size * slope.gradient.sign()).clamp(0.0, 1.0)
        inputs = torch.cat([inputs, new])
        labels = torch.cat([labels, _answers(logits_fn, new, rule).argmax(-1)])
        _train(model, inputs, labels, num_epochs)
    return inner(copy, x, y, eps=eps, norm=norm, seed=rng)


def _answers(logits_fn: LogitsFn, points: Inputs, rule: Rule) -> Tensor:
    return rule(ask(logits_fn, points))


def _perceptron(size: int, num_classes: int) -> nn.Module:
    layers = [nn.Linear(size, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, num_classes)]
    return nn.Sequential(nn.Flatten(), *layers)


def _train(model: nn.Module, inputs: Inputs, labels: Labels, num_epochs: int) -> None:
    """Cross-entropy on the labels that the defense gave."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    for _ in range(num_epochs):
        for rows in torch.randperm(len(inputs), device=inputs.device).split(BATCH):
            optimizer.zero_grad()
            with torch.enable_grad():
                loss = nn.functional.cross_entropy(model(inputs[rows]), labels[rows])
                loss.backward()
            optimizer.step()
