r"""Bounded ReLUs, to be trained with Gaussian data augmentation.

Zantedeschi et al., 2017, [Efficient Defenses Against Adversarial
Attacks](https://arxiv.org/abs/1707.06728). Every ReLU becomes $\min(\max(z, 0), t)$, and training minimizes
the loss at $x + \Delta$, $\Delta \sim N(0, \sigma^2 I)$: ``gaussian_augmented(elbo, sigma)``.
"""

from torch import nn

from probdefense.core.defense import Defense
from probdefense.core.registry import builder
from probdefense.defenses.host import host, running_relus
from probdefense.nn.brelu import BReLU
from probdefense.nn.relus import after_relus
from probdefense.types import Inputs


@builder
def brelu(
    net: nn.Module, *, ceiling: float = 1.0, num_data: int | None = None, example: Inputs | None = None
) -> Defense:
    r"""Bounds every ReLU of a network from above, $f_t(z) = \min(\max(z, 0), t)$.

    Nothing becomes random. A trained network loses accuracy by the bound: train it again.

    Args:
        net: A network or a `Defense`; it is copied, parameters keep their names.
        ceiling: $t$, in units of the activations.
        num_data: Size of the training set; not needed, as there is no KL.
        example: A batch of inputs, to see which ReLUs run; needed where that cannot be guessed.

    Returns:
        A `Defense`.

    Raises:
        ValueError: a network without ReLU, or a ceiling that is not positive.

    References:
        Zantedeschi et al., 2017, [Efficient Defenses Against Adversarial
        Attacks](https://arxiv.org/abs/1707.06728)

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.ReLU())
        >>> brelu(net, ceiling=2.0)(torch.tensor([[-1.0, 1.0, 3.0]]))
        tensor([[[0., 1., 2.]]])
    """
    net, sites, num_data = host(net, num_data)
    after_relus(net, "bound", lambda path: BReLU(ceiling), running_relus(net, sites, example))
    return Defense.from_sites(net, sites, num_data)
