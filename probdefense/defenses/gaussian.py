r"""A normal posterior with given numbers: what SWAG collects and what a Laplace approximation computes.

$$ q(\theta) = N(\mu,\; W W^\top + \mathrm{diag}(d^2)) $$

There is no prior and so no KL term: the numbers come from elsewhere, `training.Swag` or `laplace`.
"""

from collections.abc import Sequence

from torch import nn

from probdefense.core.defense import Defense
from probdefense.core.registry import builder
from probdefense.core.sites import flat_weights
from probdefense.defenses.host import host


@builder
def gaussian(net: nn.Module, *, names: Sequence[str], rank: int = 0, num_data: int | None = None) -> Defense:
    """A flat normal site over named parameters, whose location, scale and factor are to be filled in.

    Args:
        net: A network or a `Defense`; it is copied.
        names: Of the parameters that become random.
        rank: Columns of the factor; 0 for none.
        num_data: Size of the training set; not needed, as there is no KL.

    Returns:
        A `Defense`; the numbers are ``guide.posteriors.weights.loc``, ``.log_scale`` and ``.factor``.
    """
    net, sites, num_data = host(net, num_data)
    chosen = set(names)
    weights = flat_weights(
        net,
        prior=None,
        init_scale=1.0,
        where=lambda name, _: name in chosen,
        rank=rank,
        taken=[site.name for site in sites],
    )
    return Defense.from_sites(net, [*sites, *weights], num_data)
