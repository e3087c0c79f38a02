"""Transfer: points found on one function are handed to another.

Papernot et al., 2016, [Transferability in Machine Learning](https://arxiv.org/abs/1605.07277). The mean
network of a random defense, an undefended copy or a substitute is cheap to attack, and what breaks it
often breaks the defense. A defense that falls to transfer and not to its own gradients hides them.
"""

from typing import Any

from probdefense.attacks.tools.border import alike
from probdefense.attacks.worst_of import made_of, run
from probdefense.logits.adapters import as_logits_fn
from probdefense.rng import Stream
from probdefense.types import Attack, Inputs, Labels, LogitsFn, Seed
from probdefense.validation import check_attack


def transfer(attack: Attack, source: LogitsFn) -> Attack:
    r"""An attack that asks another function, whatever is attacked, $x_{adv} = A(f_{source}, x, y)$.

    The function under attack is never called.

    Args:
        attack: Any attack.
        source: What is attacked in its place, such as ``defense.mean()`` or ``deterministic(net)``.

    Returns:
        An attack with the options of `attack`.

    Raises:
        TypeError: a source that is no `LogitsFn`.

    References:
        Papernot et al., 2016, [Transferability in Machine Learning: from Phenomena to Black-Box Attacks
        using Adversarial Samples](https://arxiv.org/abs/1605.07277)

    Examples:
        >>> import probdefense as pd
        >>> defense = pd.defenses.rse(pd.models.small_cnn())
        >>> cheap = transfer(pd.attacks.fgsm, defense.mean())
        >>> x_adv = cheap(defense, torch.rand(2, 1, 8, 8), torch.tensor([0, 1]), eps=0.1)
    """
    check_attack(attack)
    source = as_logits_fn(source)

    def transferred(
        logits_fn: LogitsFn,
        x: Inputs,
        y: Labels,
        *,
        seed: Seed = None,
        max_batch: int | None = None,
        **options: Any,
    ) -> Inputs:
        return run(attack, alike(logits_fn, source), x, y, Stream.of(seed, x), options)

    return made_of(transferred, [attack])
