"""What a certificate may count on: noise on the raw pixels, and draws that are independent."""

from typing import Any

from probdefense.evaluation.radii import SHAPES


def smoothing_noise(defense: Any) -> tuple[str, float]:
    """Family and scale of the noise that a certificate may count on, in pixels; the smallest of several.

    Raises:
        TypeError: not a `Defense`.
        ValueError: nothing to count on.
    """
    if not hasattr(defense, "input_noise"):
        raise TypeError(
            f"expected a Defense, which knows its input noise, got {type(defense).__name__}; make one with "
            "probdefense.defenses.rse(net, sigma_init=0.25)"
        )
    noise = None if hasattr(defense, "respond") else defense.input_noise
    if noise is None:
        raise ValueError(
            "no certificate: the defense has no additive noise on its raw pixels, normal, Laplace or uniform "
            "and around zero, that everything else sees them through. Noise of another family or behind a "
            "layer does not count (behind a normalization its scale is not in pixels), nor does noise in "
            "training only or of a scale that is random or depends on the input, and a defense that adapts "
            "to its inputs has none; put it first, as in probdefense.defenses.rse(net, sigma_init=0.25)"
        )
    family, scale = noise
    if family not in SHAPES:
        raise ValueError(
            f"no certificate: the input noise is {family}, bounds are known for {', '.join(SHAPES)} noise; "
            "leave family out"
        )
    smallest = float(scale.min())
    if smallest <= 0:
        raise ValueError("no certificate: the input noise has scale 0 on some pixels; give it a floor")
    return family, smallest


def smoothing_scale(defense: Any) -> float:
    """The scale of the noise that a certificate may count on, see `smoothing_noise`."""
    return smoothing_noise(defense)[1]


def refuse_dependent(defense: Any, rule: str, target_radius: float | None) -> None:
    """Refuses draws whose bounds would count them as independent when they are not.

    Raises:
        ValueError: antithetic pairs; rounds through members where votes are looked at as they come, or where
            probabilities are averaged.
    """
    if _in_pairs(defense):
        raise ValueError(
            "no certificate: expected independent draws, got antithetic pairs, whose votes depend on each "
            "other; give the Defense itself"
        )
    sites = getattr(defense, "sites", {}).values()
    members = max((getattr(site, "count", 1) for site in sites), default=1)
    if members > 1 and (target_radius is not None or rule != "vote"):
        raise ValueError(
            "no certificate: draws of an ensemble go in rounds through its members, so they are not "
            "independent, and only a fixed number of votes has a bound; leave target_radius and rule out"
        )


def _in_pairs(function: Any) -> bool:
    """Whether a function, or one that it wraps, draws in antithetic pairs."""
    own = vars(function)
    if own.get("draw_options", {}).get("draws", "independent") != "independent":
        return True
    return "logits_fn" in own and _in_pairs(own["logits_fn"])
