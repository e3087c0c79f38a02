r"""Random filters: part of every convolution is drawn anew for each forward pass.

Dong and Xu, 2023, [Adversarial Robustness via Random Projection
Filters](https://openaccess.thecvf.com/content/CVPR2023/html/Dong_Adversarial_Robustness_via_Random_Projection_Filters_CVPR_2023_paper.html)
(RPF); Ma et al., 2023, [Adversarial Robustness through Random Weight
Sampling](https://papers.nips.cc/paper_files/paper/2023/hash/766f407b7b4a82135da23b32f0cbaff3-Abstract-Conference.html)
(CTRW). A share of the filters has random weights; as in CTRW, their means and scales are trained and the
scales are held between two bounds, without which training would take them to zero:

$$ w_c = \mu_c + \sigma_c \odot \eta_c, \quad \eta \sim N(0, I), \quad
   \sigma \in \tfrac{1}{\sqrt{\text{fan-in}}} [a, b] \text{ for random } c, \qquad w_c = \mu_c \text{ else} $$

RPF is the case of fixed zero means and one fixed scale. The papers leave open which filters are random (here
the first of each layer, as in RPF's code) and how bounds follow the size of a layer (here with its fan-in).
Both evaluate by attacking *one* drawn network through all steps and drawing anew for the verdict, which is a
transfer attack; an attack that draws afresh at every step, as all of ours, sees the defense itself.
"""

import math

import pyro.distributions as dist
from torch import Tensor, nn

from probdefense.core.defense import Defense
from probdefense.core.families import Fixed
from probdefense.core.registry import builder
from probdefense.core.sites import Site, WeightNoiseSite, WeightSite, Where, tied_names, unused
from probdefense.defenses.host import CONVOLUTIONS, device_and_dtype, host
from probdefense.nn.filter_noise import FilterNoise
from probdefense.nn.surgery import matching
from probdefense.validation import check_function, check_positive, check_share


@builder
def random_filters(
    net: nn.Module,
    share: float = 0.5,
    where: Where | None = None,
    *,
    num_data: int | None = None,
    init_scale: float = 0.3,
    floor: float = 0.1,
    ceiling: float = 1.0,
) -> Defense:
    r"""Makes part of the filters of convolutions random, $w_c = \mu_c + \sigma_c \odot \eta_c$.

    The means are the weights of the network, which stay trained parameters; one draw of all filters serves
    the whole batch. Scales are in units of $1/\sqrt{\text{fan-in}}$, so that noise of size 1 on inputs of
    size 1 gives activations of size 1.

    Args:
        net: A network or a `Defense`; it is copied, parameters keep their names.
        share: Of each layer's filters, in (0, 1]; one filter at least.
        where: ``(name, tensor) -> bool``, which weights of convolutions; all that are trained by default.
        num_data: Size of the training set; not needed, as the noise has no KL.
        init_scale: Where every $\sigma$ starts.
        floor: The smallest $\sigma$.
        ceiling: The largest $\sigma$.

    Returns:
        A `Defense` with one site, ``"random_filters"``; the scales are parameters beside each weight.

    Raises:
        ValueError: a share outside (0, 1], `init_scale` not between floor and ceiling, or no convolution.

    References:
        Dong and Xu, 2023, [Adversarial Robustness via Random Projection
        Filters](https://openaccess.thecvf.com/content/CVPR2023/html/Dong_Adversarial_Robustness_via_Random_Projection_Filters_CVPR_2023_paper.html);
        Ma et al., 2023, [Adversarial Robustness through Random Weight
        Sampling](https://papers.nips.cc/paper_files/paper/2023/hash/766f407b7b4a82135da23b32f0cbaff3-Abstract-Conference.html)

    Examples:
        >>> import probdefense as pd
        >>> defense = random_filters(pd.models.small_cnn())
        >>> list(defense.sites), defense(torch.rand(2, 1, 8, 8), num_samples=3).shape
        (['random_filters'], torch.Size([3, 2, 10]))
    """
    check_share("share", share, ends="(]")
    floor, ceiling = check_positive("floor", floor, zero=True), check_positive("ceiling", ceiling)
    if not floor < check_positive("init_scale", init_scale) < ceiling:
        raise ValueError(
            f"expected init_scale between floor {floor} and ceiling {ceiling}, got {init_scale}; choose one "
            "inside"
        )
    if where is not None:
        check_function("where", where, "name", "tensor")
    net, sites, num_data = host(net, num_data)
    chosen = _chosen(net, sites, where)
    name, like = unused("random_filters", {site.name for site in sites}), device_and_dtype(net, sites)
    shapes = []
    for names, weight in chosen:
        unit, count = 1 / math.sqrt(math.prod(weight.shape[1:])), max(1, round(share * len(weight)))
        bounds = (scale * unit for scale in (init_scale, floor, ceiling))
        layer = FilterNoise(range(count), tuple(weight.shape[1:]), *bounds).to(like)
        net.get_submodule(names[0].rpartition(".")[0]).add_module(name, layer)
        shapes.append(layer.log_scale.shape)
    standard = Fixed(dist.Normal(0.0, 1.0)).to(like)
    names_of = tuple(names for names, _ in chosen)
    noise = WeightNoiseSite(name, standard, None, names=names_of, shapes=tuple(shapes), layer=name)
    return Defense.from_sites(net, [*sites, noise], num_data)


def _chosen(net: nn.Module, sites: list[Site], where: Where | None) -> list[tuple[tuple[str, ...], Tensor]]:
    """Weights of convolutions with all their names, trained ones or those that are random already."""
    owners = {layer for _, layer in matching(net, CONVOLUTIONS)}
    known: dict[tuple[str, ...], Tensor] = {
        names: weight for weight, names in tied_names(net).items() if weight.requires_grad
    }
    for site in sites:
        if isinstance(site, WeightSite) and not site.perturbs:
            filled = site.fill(site.center().detach(), net)
            known |= {names: filled[names[0]] for names in site.names}
    found = [
        (names, weight)
        for names, weight in known.items()
        if names[0].endswith("weight")
        and net.get_submodule(names[0].rpartition(".")[0]) in owners
        and (where is None or where(names[0], weight))
    ]
    if not found:
        raise ValueError(
            f"expected convolutions, found none with trained weights in {type(net).__name__} that where= "
            "accepts; take a network with one, or unfreeze it"
        )
    return found
