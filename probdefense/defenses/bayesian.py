r"""Mean-field weights: every parameter a distribution with learnable parameters.

Blundell et al., 2015, [Weight Uncertainty in Neural Networks](https://arxiv.org/abs/1505.05424);
Khan et al., 2019, [Non-Determinism in Neural Networks for Adversarial Robustness](https://arxiv.org/abs/1905.10906);
Liu et al., 2019, [Adv-BNN](https://arxiv.org/abs/1810.01279). One flat vector per prior family holds
the weights, so a step costs about as much as a deterministic one, and the KL covers every element:

$$ q(\theta) = \prod_i N(\mu_i, \sigma_i^2), \qquad
   \mathrm{KL} = \sum_i \log\frac{\sigma_0}{\sigma_i} + \frac{\sigma_i^2 + \mu_i^2}{2\sigma_0^2} - \tfrac12 $$
"""

import pyro.distributions as dist
from torch import nn

from probdefense.defense import Defense
from probdefense.defenses.host import host
from probdefense.sites import Prior, Where, flat_weights
from probdefense.validation import check_positive


def bayesian(
    net: nn.Module,
    *,
    num_data: int | None = None,
    prior: Prior = dist.Normal(0.0, 1.0),
    init_scale: float = 0.02,
    where: Where | None = None,
    layout: str = "flat",
) -> Defense:
    r"""Makes the parameters of a network random, with a trained location and scale each.

    Trained weights become the posterior means. With ``elbo(kl_weight=1)`` this is Bayes by backprop,
    under ``adversarial(elbo, pgd)`` Adv-BNN, and with ``prior=None`` the learnable distributions of
    Khan et al., which have no prior.

    Args:
        net: A network or a `Defense`; it is copied.
        num_data: Size of the training set, which weighs the KL term.
        prior: A distribution for every element, a function ``(name, tensor) -> distribution or None``,
            or None. None masks the site: no KL.
        init_scale: $\sigma$ of every element before training, in units of the weights.
        where: ``(name, tensor) -> bool``, which parameters; all but normalization layers' by default.
        layout: ``"flat"``, one site per prior family, or ``"per_tensor"``, one site per parameter.

    Returns:
        A `Defense`; the state dict holds ``guide.posteriors.weights.loc`` and ``.log_scale``.

    Raises:
        ValueError: no parameter was chosen, or `init_scale` is not positive.

    Example:
        >>> import probdefense as pd
        >>> defense = bayesian(torch.nn.Linear(4, 3), num_data=100)
        >>> list(defense.sites), defense(torch.rand(2, 4), num_samples=5).shape
        (['weights'], torch.Size([5, 2, 3]))
    """
    check_positive("init_scale", init_scale)
    net, sites, num_data = host(net, num_data)
    weights = flat_weights(
        net,
        prior=prior,
        init_scale=init_scale,
        where=where,
        layout=layout,
        taken=[site.name for site in sites],
    )
    return Defense.from_sites(net, [*sites, *weights], num_data)
