"""The attack made for each kind of defense, and attacks by name, all at one budget.

An opponent is ``opponent(defense, gradients) -> Attack``: it may look into the defense (its surrogates,
its members, its adaptation) and spends about `gradients` per image, every draw counting as one.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from probdefense import attacks
from probdefense.attacks.bpda import Surrogate
from probdefense.attacks.tools.border import check_option
from probdefense.core.defense import Defense
from probdefense.defenses.jump_relu import surrogates
from probdefense.evaluation.points import WithDraws, with_draws
from probdefense.logits.adapters import as_logits_fn
from probdefense.logits.losses import dlr, predictive_cross_entropy
from probdefense.nn import BReLU, JumpReLU
from probdefense.prediction.drawing import is_adaptive
from probdefense.rng import forked
from probdefense.study.keys import check_keys, check_values
from probdefense.study.targets import looked_up
from probdefense.types import Attack, Inputs, Labels, LogitsFn, Norm, Seed
from probdefense.validation import check_attack, check_member

Opponent = Callable[[Any, int], Attack]

EOT_SAMPLES = 16
PAIRS = 4
APGD_SAMPLES = 4
FROZEN_SAMPLES = 4
"""Draws on which minimum-norm attacks solve; the verdict is taken on fresh ones."""

OTHER_NORMS = {"cw": 2, "cw_fixed": 2, "ddn": 2, "zoo": 2, "ead": 1}
"""Attacks that minimize another norm than the l-inf of the command: their points count if they lie within."""

FOR_NORM = ("fmn", "deepfool", "hop_skip_jump")
"""Minimum-norm attacks that take the norm to minimize."""

ROUNDS = 2
"""Simulations of an adaptive defense."""

QUERIES = 10
"""Queries that a gradient-free attack gets for each gradient of the others."""


def matched_loss(defense: LogitsFn, gradients: int) -> Attack:
    """EOT-PGD on the cross-entropy of the mean probability, which is what the verdict is taken on."""
    return _eot(partial(attacks.pgd, loss=predictive_cross_entropy), defense, gradients, EOT_SAMPLES)


def with_momentum(defense: LogitsFn, gradients: int) -> Attack:
    """Momentum along the signs of four antithetic pairs of draws: made for random transforms of the input.

    Sitawarin et al., 2022, [Demystifying the Adversarial Robustness of Random Transformation
    Defenses](https://arxiv.org/abs/2207.03574).
    """
    draws, pairs = (2, PAIRS) if defense.stochastic else (1, 1)
    num_steps = max(1, gradients // (draws * pairs))
    along = partial(
        attacks.mim, num_steps=num_steps, repeats=pairs, signs=True, loss=predictive_cross_entropy
    )
    smooth = _declared(defense)  # of transforms that round

    def momentum(
        logits_fn: LogitsFn, x: Inputs, y: Labels, *, eps: float, norm: Norm = math.inf, seed: Seed = None
    ) -> Inputs:
        size = min(eps, 2.5 * eps / num_steps)
        with attacks.bpda(defense, smooth) if isinstance(defense, Defense) else nullcontext():
            return along(logits_fn, x, y, eps=eps, norm=norm, step_size=size, seed=seed)

    return with_draws(
        momentum, draws, "antithetic" if getattr(defense, "pairs_draws", False) else "independent"
    )


def step_control(defense: LogitsFn, gradients: int) -> Attack:
    """APGD on DLR: step sizes that adapt, and a loss that does not saturate."""
    return _eot(partial(attacks.apgd, loss=dlr), defense, gradients, APGD_SAMPLES)


def scale_free(defense: LogitsFn, gradients: int) -> Attack:
    """PGD on DLR, which large logits do not saturate."""
    return _eot(partial(attacks.pgd, loss=dlr), defense, gradients, 1)


def through_jumps(defense: Defense, gradients: int) -> Attack:
    """PGD by BPDA: the true forward pass, the gradient of smoothed jumps."""
    return _bpda_pgd(defense, surrogates(defense), gradients)


def past_ceilings(defense: Defense, gradients: int) -> Attack:
    """PGD by BPDA: the gradient of ReLUs without the ceiling, beyond which BReLU passes none."""
    return _bpda_pgd(defense, {BReLU: torch.relu}, gradients)


def _bpda_pgd(defense: Defense, smooth: Mapping[Any, Surrogate], gradients: int) -> Attack:
    def bpda_pgd(
        logits_fn: LogitsFn, x: Inputs, y: Labels, *, eps: float, norm: Norm = math.inf, seed: Seed = None
    ) -> Inputs:
        with attacks.bpda(defense, smooth):
            return attacks.pgd(logits_fn, x, y, eps=eps, norm=norm, num_steps=gradients, seed=seed)

    return with_draws(bpda_pgd, 1)


def member_by_member(defense: LogitsFn, gradients: int) -> Attack:
    """ARC: steps that keep the members fooled so far and fool one more."""
    return partial(attacks.arc, num_steps=max(1, gradients // 8))


def greedy_models(defense: LogitsFn, gradients: int) -> Attack:
    """GMSA: attacks all models that the adaptation has made of its points so far."""
    return _adapted(attacks.gmsa, gradients)


def _adapted(attack: Callable[..., Inputs], gradients: int) -> Attack:
    """FPA or GMSA whose inner PGD fits the budget; the models multiply what a step costs."""
    inner = partial(attacks.pgd, num_steps=max(1, gradients // (2 * ROUNDS)))

    def adapted(
        logits_fn: LogitsFn, x: Inputs, y: Labels, *, eps: float, norm: Norm = math.inf, seed: Seed = None
    ) -> Inputs:
        radius = partial(inner, eps=eps, norm=norm)
        return attack(logits_fn, x, y, attack=radius, num_rounds=ROUNDS, seed=seed)

    return adapted


def named_attack(name: str, defense: Any, gradients: int) -> Attack:
    """An attack by the name that the command knows.

    ``pgd`` and ``eot_pgd`` spend the same number of gradients per image: one draw per step and many
    steps, or 16 draws and fewer steps. Attacks made for one kind of defense (``bpda``, ``fpa``, ``gmsa``)
    are plain PGD on any other, which is what they come to there. What is not in `NAMED` runs with its
    defaults.

    Raises:
        ValueError: unknown name.
    """
    check_member("attack", name, attack_names())
    opponent = NAMED.get(name)
    return getattr(attacks, name) if opponent is None else opponent(defense, gradients)


def own_attack(where: str, settings: Mapping[str, Any], defense: Any, gradients: int, norm: Norm) -> Attack:
    """An attack with settings of one's own: by a name that the command knows, or ``FILE.py:NAME``.

    Raises:
        ValueError: an unknown name, or a file that fails.
    """
    if ".py:" in where:
        return _changed(looked_up(where), settings)
    fixed = {} if norm == math.inf or where not in FOR_NORM else {"norm": norm}
    return _changed(named_attack(where, defense, gradients), {**fixed, **settings})


def _changed(attack: Attack, settings: Mapping[str, Any]) -> Attack:
    """An attack with other settings, of which ``num_samples`` is the draws per call."""
    rest = {name: value for name, value in settings.items() if name != "num_samples"}
    draws = settings.get("num_samples")
    if isinstance(attack, WithDraws):
        return replace(attack, attack=partial(attack.attack, **rest), num_samples=draws or attack.num_samples)
    attack = partial(attack, **rest) if rest else attack
    return attack if draws is None else with_draws(attack, draws)


def check_settings(where: str, settings: Mapping[str, Any]) -> None:
    """Refuses an attack that is not there, and settings that it does not take.

    Raises:
        ValueError: see above; an unknown setting with the nearest known one.
    """
    if ".py:" in where:
        function = looked_up(where)
        check_attack(function, where)
    else:
        check_member("attack", where, ["clean", "adaptive", *attack_names(), "FILE.py:NAME"])
        name = "pgd" if where == "eot_pgd" else where
        function = getattr(attacks, name) if name in attacks.__all__ else None
    taken = inspect.signature(function).parameters if function is not None else {}
    known = {
        name: each.default
        for name, each in taken.items()
        if name not in ("logits_fn", "x", "y", "eps", "norm", "seed") and each.kind is not each.VAR_KEYWORD
    }
    if function is not None:
        known["num_samples"] = 1
    check_keys(f"the attack {where}", settings, known)
    check_values(f"the attack {where}", settings, known)
    for name, value in settings.items() if hasattr(function, "is_attack") else ():
        check_option(name, value)


def check_budget(
    of: str, settings: Mapping[str, Any], name: str, defense: Any, x: Inputs, *, gradients: int, norm: Norm
) -> None:
    """Refuses a budget that the suite could not start with on a defense, which need not be trained.

    Args:
        of: The attack by name; only the suite has a smallest budget.
        settings: Its own settings.
        name: Of the defense.
        defense: What will be attacked.
        x: One image, ``(1, *event)``; how many draws an answer has shows on it.
        gradients: Per image and attack.
        norm: Of the threat model.

    Raises:
        ValueError: too little; says how much is needed.
    """
    if of != "suite":
        return
    function = as_logits_fn(defense)
    with torch.no_grad(), forked(0, x.device):
        width = len(function(x, 1))
    least = attacks.least_budget(function, norm=norm, width=width, target=settings.get("target") is not None)
    budget = settings.get("budget", suite_budget(gradients))
    if budget < least:
        raise ValueError(
            f"expected a budget of at least {least} evaluations per image for the suite on {name}, got "
            f"{budget}, which does not pay for ten steps of every attack; give more in a study file (budget "
            "of the [[attack]], or gradients, a third of it) or in Python"
        )


def attack_names() -> list[str]:
    """The names that `named_attack` knows."""
    return [*(name for name in attacks.__all__ if callable(getattr(attacks, name))), "eot_pgd"]


def _eot(attack: Attack, defense: LogitsFn, gradients: int, num_samples: int) -> Attack:
    draws = num_samples if defense.stochastic else 1
    return with_draws(partial(attack, num_steps=max(1, gradients // draws)), draws)


def _iterated(attack: Attack, num_samples: int) -> Opponent:
    return lambda defense, gradients: _eot(attack, defense, gradients, num_samples)


def _in_one_step(attack: Attack) -> Opponent:
    return lambda defense, gradients: with_draws(attack, EOT_SAMPLES)


def _by_queries(attack: Attack) -> Opponent:
    return lambda defense, gradients: with_draws(
        partial(attack, max_queries=max(1000, QUERIES * gradients)), 1
    )


def _on_frozen(attack: Attack, **settings: Any) -> Opponent:
    """On few frozen draws: every step runs all of them."""
    return lambda defense, gradients: with_draws(partial(attack, **settings), FROZEN_SAMPLES)


def _suite(defense: LogitsFn, gradients: int) -> Attack:
    return partial(attacks.suite, budget=suite_budget(gradients))


def suite_budget(gradients: int) -> int:
    """Forward passes per image, about three for a gradient; below a thousand the suite misses points."""
    return max(1000, 3 * gradients)


def _transferred(defense: Any, gradients: int) -> Attack:
    """PGD on the network without noise, at posterior means; on a plain network that is PGD itself."""
    source = defense.mean() if hasattr(defense, "mean") else defense
    return attacks.transfer(partial(attacks.pgd, num_steps=gradients), source)


def _bpda(defense: Any, gradients: int) -> Attack:
    return (through_jumps if _declared(defense) else _pgd)(defense, gradients)


def _declared(defense: Any) -> dict[str, Surrogate]:
    """The surrogates of jumps and roundings, none where there are neither."""
    known = isinstance(defense, Defense) and any(
        isinstance(m, JumpReLU) or hasattr(m, "surrogate") for m in defense.modules()
    )
    return surrogates(defense) if known else {}


def _worst_of(defense: LogitsFn, gradients: int) -> Attack:
    return attacks.worst_of([each(defense, gradients // 2) for each in (_pgd, step_control)])


def _on_models(attack: Callable[..., Inputs]) -> Opponent:
    return lambda defense, gradients: (
        _adapted(attack, gradients) if is_adaptive(defense) else _pgd(defense, gradients)
    )


_pgd = _iterated(attacks.pgd, 1)

NAMED: dict[str, Opponent] = {
    "fgsm": _in_one_step(attacks.fgsm),
    "r_fgsm": _in_one_step(attacks.r_fgsm),
    "bim": _iterated(attacks.bim, 1),
    "mim": _iterated(attacks.mim, 1),
    "pgd": _pgd,
    "eot_pgd": _iterated(attacks.pgd, EOT_SAMPLES),
    "apgd": _iterated(attacks.apgd, APGD_SAMPLES),
    "cw": _on_frozen(attacks.cw, num_searches=5, init_c=0.1),
    "cw_fixed": _on_frozen(attacks.cw_fixed, c=1.0),
    "ead": _on_frozen(attacks.ead, num_searches=5, init_c=0.1),
    "ddn": _on_frozen(attacks.ddn),
    "fmn": _on_frozen(attacks.fmn, norm=math.inf),
    "deepfool": _on_frozen(attacks.deepfool, norm=math.inf),
    "suite": _suite,
    "arc": member_by_member,
    "bpda": _bpda,
    "transfer": _transferred,
    "worst_of": _worst_of,
    "fpa": _on_models(attacks.fpa),
    "gmsa": _on_models(attacks.gmsa),
    **{name: _by_queries(getattr(attacks, name)) for name in ("square", "zoo", "nes", "spsa")},
    "hop_skip_jump": _by_queries(partial(attacks.hop_skip_jump, norm=math.inf)),
}
