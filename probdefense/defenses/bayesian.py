r"""Mean-field weights: every parameter a distribution with learnable parameters.

Blundell et al., 2015, [Weight Uncertainty in Neural Networks](https://arxiv.org/abs/1505.05424);
Khan et al., 2019, [Non-Determinism in Neural Networks for Adversarial Robustness](https://arxiv.org/abs/1905.10906);
Liu et al., 2019, [Adv-BNN](https://arxiv.org/abs/1810.01279). One flat vector per prior family holds
the weights, so a step costs about as much as a deterministic one, and the KL covers every element:

$$ q(\theta) = \prod_i N(\mu_i, \sigma_i^2), \qquad
   \mathrm{KL} = \sum_i \log\frac{\sigma_0}{\sigma_i} + \frac{\sigma_i^2 + \mu_i^2}{2\sigma_0^2} - \tfrac12 $$

Of Khan et al. only the abstract is public: "each parameter of the network as a statistical
distribution with learnable parameters". What is chosen here: Normal elements, reparameterized, one
fresh draw of all of them per forward pass in training and at test, trained by expected cross-entropy
without a prior (KL weight 0). Under that loss alone the scales shrink, and with them the
non-determinism: `signal_to_noise` shows it; a floor, a prior or an adversarial objective holds it.
"""

from dataclasses import replace

import pyro.distributions as dist
from torch import nn

from probdefense.core.defense import Defense
from probdefense.core.local import check_local
from probdefense.core.registry import builder
from probdefense.core.sites import Family, Prior, WeightSite, Where, flat_weights
from probdefense.defenses.host import host
from probdefense.validation import check_count, check_kind, check_member, check_positive, kind_of


@builder
def bayesian(
    net: nn.Module,
    *,
    num_data: int | None = None,
    prior: Prior = dist.Normal(0.0, 1.0),
    init_scale: float = 0.02,
    family: Family = dist.Normal,
    floor: float = 0.0,
    ceiling: float | None = None,
    rank: int = 0,
    where: Where | None = None,
    layout: str = "flat",
    estimator: str = "weights",
) -> Defense:
    r"""Makes the parameters of a network random, with a trained location and scale each.

    Trained weights become the posterior means. With ``elbo(kl_weight=1)`` this is Bayes by backprop,
    under ``adversarial(elbo, pgd)`` Adv-BNN, and with ``prior=None`` the learnable distributions of
    Khan et al., which have no prior (see the head of this file for what is our reading).

    Args:
        net: A network or a `Defense`; it is copied.
        num_data: Size of the training set, which weighs the KL term.
        prior: A distribution for every element, or of a parameter's shape, one of `probdefense.priors`, a
            function ``(name, tensor) -> distribution or None``, or None. None masks the site: no KL. A
            mixture, a transformed or a correlated prior has no closed KL, which is then estimated by the
            densities at the draw.
        init_scale: $\sigma$ of every element before training, in units of the weights; relative to
            the weight for `MultiplicativeLogNormal`.
        family: The posterior of an element: ``Normal``, ``Laplace``, `MultiplicativeLogNormal` (the
            sign stays, noise is in proportion), or a function ``(name, tensor) -> one of them``.
        floor: The smallest scale, below `init_scale`.
        ceiling: The largest scale, above `init_scale`; None for none. It bends the scale smoothly
            ($\sigma = a + (b - a)\, \mathrm{sigmoid}(\rho)$), so that it can come back down.
        rank: $k$ of a guide with correlations, $\Sigma = W W^\top + \mathrm{diag}(\sigma^2)$ with $W$ of
            shape ``(D, k)`` per site, trained relative to $\sigma$; 0 for independent elements. Normal
            only; floor and ceiling hold for $\sigma$. A step costs $O(Dk^2)$, and the KL to a Normal prior
            is closed.
        where: ``(name, tensor) -> bool``, which parameters; by default all but those of normalization
            layers and frozen ones (``requires_grad=False``).
        layout: ``"flat"``, one site per pair of families, or ``"per_tensor"``, one site per parameter.
        estimator: How a training step draws: ``"weights"``, or ``"local"``, the outputs of linear and
            convolution layers by themselves for every example, so that gradients vary less. For convolutions,
            and for linear layers over sequences, that is an approximation: outputs of one example are drawn
            independently. The posterior is the same, and everything but training draws weights.

    Returns:
        A `Defense`; the state dict holds ``guide.posteriors.weights.loc`` and ``.log_scale``.

    Raises:
        ValueError: no parameter was chosen, `init_scale` is not between floor and ceiling, a rank with
            another family, a prior that does not allow every real number or has another shape, or the local
            estimator with weights that are not independent normal numbers.

    References:
        Blundell et al., 2015, [Weight Uncertainty in Neural Networks](https://arxiv.org/abs/1505.05424);
        Khan et al., 2019, [Non-Determinism in Neural Networks for Adversarial
        Robustness](https://arxiv.org/abs/1905.10906)

    Examples:
        >>> import probdefense as pd
        >>> defense = bayesian(torch.nn.Linear(4, 3), num_data=100)
        >>> list(defense.sites), defense(torch.rand(2, 4), num_samples=5).shape
        (['weights'], torch.Size([5, 2, 3]))
    """
    check_member("estimator", estimator, ("weights", "local"))
    check_positive("init_scale", init_scale)
    check_positive("floor", floor, zero=True)
    if init_scale <= floor:
        raise ValueError(
            f"expected init_scale above the floor {floor}, got {init_scale}; raise it or lower the floor"
        )
    if ceiling is not None and check_positive("ceiling", ceiling) <= init_scale:
        raise ValueError(
            f"expected init_scale below the ceiling {ceiling}, got {init_scale}; lower it or raise the other"
        )
    if check_count("rank", rank, 0) and family is not dist.Normal:
        raise ValueError(
            f"expected family=Normal with rank={rank}, got {kind_of(family)}; leave out one of them"
        )
    net, sites, num_data = host(net, num_data)
    weights = flat_weights(
        net,
        prior=prior,
        init_scale=init_scale,
        family=family,
        floor=floor,
        ceiling=ceiling,
        rank=rank,
        where=where,
        layout=layout,
        taken=[site.name for site in sites],
    )
    if estimator == "local":
        weights = [replace(s, estimator=estimator) if isinstance(s, WeightSite) else s for s in weights]
        for site in weights:
            if isinstance(site, WeightSite):
                check_local(site)
    return Defense.from_sites(net, [*sites, *weights], num_data)


def signal_to_noise(defense: Defense) -> dict[str, float]:
    r"""How large each layer's weights are beside their noise, $\sqrt{\sum_i \mu_i^2 / \sum_i \sigma_i^2}$.

    Means and standard deviations are those of the posterior. Numbers that grow in training say that
    the randomness is vanishing; above a few hundred little of it reaches the logits.

    Args:
        defense: A defense with random weights.

    Returns:
        The ratio by layer, in the order of the network.

    Raises:
        ValueError: no random weights.

    Examples:
        >>> net = torch.nn.Linear(2, 1)
        >>> _ = torch.nn.init.ones_(net.weight), torch.nn.init.zeros_(net.bias)
        >>> signal_to_noise(bayesian(torch.nn.Sequential(net), where=lambda name, _: "weight" in name))
        {'0': 50.0...}
    """
    check_kind("defense", defense, Defense, "make it with bayesian(net, ...)")
    power: dict[str, list[float]] = {}
    for site in defense.sites.values():
        if not isinstance(site, WeightSite) or site.posterior is None:
            continue
        signal, noise = (site.views(moment.detach()) for moment in site.moments())
        for name in signal:
            sums = power.setdefault(name.rpartition(".")[0], [0.0, 0.0])
            sums[0] += float(signal[name].square().sum())
            sums[1] += float(noise[name].sum())
    if not power:
        raise ValueError(
            "expected a Bayesian network, found no random weights; make them with bayesian(net, ...)"
        )
    order = [path for path, _ in defense.net.named_modules() if path in power]
    return {path: (power[path][0] / power[path][1]) ** 0.5 for path in order}
