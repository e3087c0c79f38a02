r"""Deep ensembles: several networks, of which every draw asks one.

Lakshminarayanan et al., 2017, [Simple and Scalable Predictive Uncertainty Estimation using Deep
Ensembles](https://arxiv.org/abs/1612.01474). As a posterior it is $\frac1K \sum_k \delta_{\theta_k}$: a
discrete uniform site chooses the member, and the sample axis holds members.
"""

from collections.abc import Iterable

import pyro.distributions as dist
import torch
from torch import nn

from probdefense.core.defense import Defense, deterministic
from probdefense.core.families import Fixed
from probdefense.core.registry import builder
from probdefense.core.sites import MemberSite
from probdefense.defenses.host import copied, device_and_dtype, refuse_replicas
from probdefense.nn.members import Members


@builder
def ensemble(nets: Iterable[nn.Module], *, num_data: int | None = None) -> Defense:
    r"""Makes several networks one defense; every draw asks one of them, $k \sim \mathrm{Uniform}\{1..K\}$.

    Draws go round the members in random order, so ``num_samples=K`` asks each exactly once and the
    mean is the ensemble's own; one draw is a randomized classifier. ``mean()`` is the whole ensemble.
    One training step trains every member; Pyro's own SVI, the one that was drawn. Add noise or random
    weights outside: ``rse(ensemble(nets))``.

    Args:
        nets: Networks with the same classes; they are copied, and may differ in everything else.
        num_data: Size of the training set; not needed, as the choice has no KL.

    Returns:
        A `Defense` with one site, ``"member"``; a single network gives one without randomness.

    Raises:
        ValueError: no networks; in the first call, members with different classes.
        TypeError: a member that is a `Defense`.

    References:
        Lakshminarayanan et al., 2017, [Simple and Scalable Predictive Uncertainty Estimation using Deep
        Ensembles](https://arxiv.org/abs/1612.01474)

    Examples:
        >>> defense = ensemble([torch.nn.Linear(4, 3) for _ in range(5)])
        >>> defense(torch.rand(2, 4), num_samples=5).shape
        torch.Size([5, 2, 3])
    """
    if (
        not isinstance(nets, Iterable)
        or hasattr(nets, "__array__")
        or (isinstance(nets, nn.Module) and not isinstance(nets, nn.ModuleList))
    ):
        raise TypeError(f"expected a list of networks, got {type(nets).__name__}; give [net, ...]")
    members = list(nets)
    if not members:
        raise ValueError("expected at least one network to make an ensemble of, got none; give [net, ...]")
    for net in members:
        if isinstance(net, Defense) or not isinstance(net, nn.Module):
            raise TypeError(
                f"expected plain networks, got {type(net).__name__}; make the ensemble first and add "
                "randomness to it, as in rse(ensemble(nets))"
            )
        refuse_replicas(net)
    members = [copied(net) for net in members]
    if len(members) == 1:
        return deterministic(members[0], num_data=num_data)
    whole = Members(members)
    uniform = Fixed(dist.Categorical(torch.ones(len(members)))).to(device_and_dtype(whole))
    site = MemberSite("member", uniform, None, path="member", count=len(members))
    return Defense.from_sites(whole, [site], num_data)
