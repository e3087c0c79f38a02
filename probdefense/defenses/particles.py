r"""Particles: networks of one kind that together stand for a posterior, $\frac1K \sum_k \delta_{\theta_k}$.

Liu and Wang, 2016, [Stein Variational Gradient Descent](https://arxiv.org/abs/1608.04471); Doan et al.,
2022, [Bayesian Learning with Information Gain](https://arxiv.org/abs/2212.02003). As a random
variable they are an ensemble; what makes them particles is the objective, `objectives.svgd`, under which they
repel each other, and that they have one architecture, so that their distance is defined.

IG-BNN is ``svgd(information_gain(elbo, attack, weight=...))`` on ten particles, with the mean over them at
test. Its released code (``baogiadoan/IG-BNN``, 1976cce) does something else: the repulsion is the scalar
distance, not the direction between two particles; kernels are taken tensor by tensor; the running sum is
divided by the number of particles inside the loop, so early particles count least; 60 % of the updates are
skipped; and its EOT attack climbs the mean logits of all particles, which is a fixed ensemble.
"""

from collections.abc import Iterable

from torch import nn

from probdefense.core.defense import Defense
from probdefense.defenses.ensemble import ensemble


def particles(nets: Iterable[nn.Module], *, num_data: int | None = None) -> Defense:
    r"""Makes networks of one architecture the particles of a posterior, $\frac1K \sum_k \delta_{\theta_k}$.

    It is the `ensemble` of the networks, with the same site; train it with `objectives.svgd`. Particles that
    start at the same point stay there, as the repulsion between them is 0: give networks with weights of
    their own.

    Args:
        nets: Networks that differ in their weights alone; they are copied.
        num_data: Size of the training set, which weighs the likelihood against prior and repulsion.

    Returns:
        A `Defense` with one site, ``"member"``.

    Raises:
        ValueError: no networks, parameters of different shapes, or two networks with the same weights.
        TypeError: a member that is a `Defense`.

    References:
        Liu and Wang, 2016, [Stein Variational Gradient Descent](https://arxiv.org/abs/1608.04471); Doan et
        al., 2022, [Bayesian Learning with Information Gain Provably Bounds Risk for a Robust Adversarial
        Defense](https://arxiv.org/abs/2212.02003)

    Examples:
        >>> defense = particles([torch.nn.Linear(4, 3) for _ in range(5)], num_data=100)
        >>> defense(torch.rand(2, 4), num_samples=5).shape
        torch.Size([5, 2, 3])
    """
    made = ensemble(nets, num_data=num_data)
    members = getattr(made.net, "members", None)
    states = [dict(net.named_parameters()) for net in members] if isinstance(members, nn.ModuleList) else []
    shapes = [{name: tuple(value.shape) for name, value in state.items()} for state in states]
    if any(each != shapes[0] for each in shapes):
        raise ValueError(
            "expected networks of one architecture as particles, got parameters of different shapes; for "
            "others take ensemble(nets)"
        )
    for k, state in enumerate(states):
        for other in states[:k]:
            if all(bool((value == other[name]).all()) for name, value in state.items()):
                raise ValueError(
                    "expected particles with weights of their own, got two networks with the same, which "
                    "would stay together; initialize each anew"
                )
    return made
