r"""NUTS, the gold standard beside SVI: the last layer with NumPyro, small whole networks with Pyro.

Hoffman and Gelman, 2014, [The No-U-Turn Sampler](https://arxiv.org/abs/1111.4246). The draws come back
as a `Defense` like any other. Weights are not identifiable, so convergence is judged in function
space: by R-hat of the log-probabilities on training examples.
"""

import copy
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.ops.stats import split_gelman_rubin
from torch import Tensor, nn

from probdefense.core.defense import Defense
from probdefense.core.replayed import own_params
from probdefense.core.sites import ScaleSite, WeightSite, join
from probdefense.defenses.bayesian import bayesian
from probdefense.defenses.host import host
from probdefense.evaluation.examples import gather
from probdefense.evaluation.protocol import evaluate
from probdefense.evaluation.report import Report
from probdefense.numpyro.chains import run_chains
from probdefense.numpyro.kept import with_kept
from probdefense.prediction.predictive import predict
from probdefense.rng import derive, forked
from probdefense.types import Attack, Inputs, Labels
from probdefense.validation import check_count, check_examples, check_kind, check_seed

Data = tuple[Inputs, Labels] | Iterable[tuple[Inputs, Labels]]

MAX_R_HAT = 1.1
"""Above this R-hat of any log-probability the chains have not met."""

JUDGED = 256
"""On how many training examples R-hat is computed."""


class Gap(NamedTuple):
    """How far one posterior predictive is from another.

    ``agreement`` share of examples with the same label; ``total_variation`` mean distance of the
    predictives, in [0, 1], inflated by the finite number of draws; ``entropy`` and ``gold_entropy``
    mean predictive entropy in nats; ``report`` accuracies of both, clean and attacked.
    """

    agreement: float
    total_variation: float
    entropy: float
    gold_entropy: float
    report: Report


def last_layer_nuts(
    defense: Defense,
    loader: Data,
    *,
    num_samples: int = 200,
    num_warmup: int = 200,
    num_chains: int = 2,
    seed: int = 0,
) -> Defense:
    r"""The posterior of the last linear layer, sampled by NumPyro, given the mean network's features.

    $$ p(W, b \mid D) \propto p(W, b) \prod_i \mathrm{Cat}(y_i \mid W \phi(x_i) + b) $$

    Other random weights stay at their means; noise stays as it is, though the features were computed
    without it. The prior is the defense's own for this layer, or N(0, 1).

    Args:
        defense: Made by a builder; ends in an ``nn.Linear`` that gives the logits.
        loader: All the training data, ``(x, y)`` or batches.
        num_samples: Draws kept per chain.
        num_warmup: Steps of adaptation per chain.
        num_chains: Independent chains, one after the other.
        seed: Of the chains.

    Returns:
        A `Defense` whose last layer takes its values from the kept draws.

    Raises:
        TypeError: a defense of a user's own model and guide.
        ValueError: no linear layer at the end, or a prior that is not Normal.

    References:
        Hoffman and Gelman, 2014, [The No-U-Turn Sampler](https://arxiv.org/abs/1111.4246)

    Examples:
        >>> import probdefense as pd
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh())
        >>> last_layer_nuts(pd.deterministic(net), (torch.rand(5, 4), torch.zeros(5).long()))
        Traceback (most recent call last):
        ValueError: expected a network that ends in nn.Linear, got Sequential; ...
    """
    seed, num_samples = check_seed(seed), check_count("num_samples", num_samples)
    num_warmup, num_chains = check_count("num_warmup", num_warmup, 0), check_count("num_chains", num_chains)
    check_kind("defense", defense, Defense, "wrap a network with probdefense.deterministic(net)")
    x, y = check_examples(gather(loader))
    _warn_of_part(defense, len(y))
    base = _at_means(defense)
    path, features = _features(base, x)
    known = dict(base.net.named_parameters(remove_duplicate=False))
    names = [name for name in (join(path, "weight"), join(path, "bias")) if name in known]
    start = torch.cat([base.net.get_parameter(name).detach().flatten() for name in names])
    prior = _normal_prior(defense, names, start)
    classes = len(base.net.get_parameter(names[0]))
    found = run_chains(
        partial(_softmax_regression, classes),
        tuple(value.numpy() for value in (features, y.cpu(), *prior)),
        {"theta": start.cpu().numpy()},
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        seed=derive(seed) % 2**31,
    )
    rows = torch.from_numpy(np.array(found["theta"])).flatten(0, 1)
    _warn_of_r_hat(_linear(rows, features[:JUDGED], classes), num_chains)
    random = bayesian(base, prior=None, where=lambda name, _: name in names)
    (site,) = set(random.sites) - set(base.sites)
    return with_kept(random, {site: rows.to(start)})


def nuts(
    defense: Defense,
    loader: Data,
    *,
    num_samples: int = 200,
    num_warmup: int = 200,
    num_chains: int = 2,
    seed: int = 0,
) -> Defense:
    r"""The posterior of all random weights of a small network, sampled by Pyro on ``defense.model``.

    For some hundreds of weights; the time of a step grows with the data and the depth of the tree.

    Args:
        defense: Random weights with a prior and nothing else, or a user's own model and guide.
        loader: All the training data, ``(x, y)`` or batches.
        num_samples: Draws kept per chain.
        num_warmup: Steps of adaptation per chain.
        num_chains: Independent chains, one after the other.
        seed: Of the chains.

    Returns:
        A `Defense` whose weights take their values from the kept draws.

    Raises:
        ValueError: noise sites (their posterior given the labels is not the defense), or weights
            without a prior.

    References:
        Hoffman and Gelman, 2014, [The No-U-Turn Sampler](https://arxiv.org/abs/1111.4246)

    Examples:
        >>> import probdefense as pd
        >>> data = torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 2])
        >>> nuts(pd.defenses.rse(pd.models.small_cnn()), data)
        Traceback (most recent call last):
        ValueError: expected random weights alone, got another: site 'input_noise' ...; sample weights alone
    """
    seed, num_samples = check_seed(seed), check_count("num_samples", num_samples)
    num_warmup, num_chains = check_count("num_warmup", num_warmup, 0), check_count("num_chains", num_chains)
    check_kind("defense", defense, Defense, "wrap a network with probdefense.deterministic(net)")
    x, y = check_examples(gather(loader))
    _warn_of_part(defense, len(y))
    model: Any = copy.deepcopy(defense.model).eval().requires_grad_(False)
    _refuse_unfit_sites(model, x, y)
    chains = []
    for chain in range(num_chains):
        with forked(derive(seed, chain)), own_params():
            sampler = MCMC(NUTS(model), num_samples, num_warmup, disable_progbar=True)
            sampler.run(x, y)
            chains.append(sampler.get_samples())
    draws = {name: torch.cat([chain[name].detach() for chain in chains]) for name in chains[0]}
    with torch.no_grad():
        rows = range(num_chains * num_samples)
        logits = [defense.at({n: v[k] for n, v in draws.items()})(x[:JUDGED]) for k in rows]
    _warn_of_r_hat(torch.cat(logits), num_chains)
    return with_kept(defense, draws)


def compare_to_gold(
    defense: Defense,
    gold: Defense,
    data: tuple[Inputs, Labels],
    attacks: Mapping[str, Attack] | None = None,
    *,
    eps: float = 0.1,
    num_samples: int = 200,
    seed: int = 0,
) -> Gap:
    """How far a defense is from its gold standard, in what they predict and in what attacks do to them.

    Args:
        defense: For example one trained by `fit`.
        gold: From `nuts` or `last_layer_nuts`.
        data: ``(x, y)``, test inputs and labels.
        attacks: By name, as for `evaluate`.
        eps: Radius in pixels, l-inf.
        num_samples: Draws of each, for the predictives and the verdicts.
        seed: Of draws and attacks.

    Returns:
        A `Gap`.

    Examples:
        >>> import probdefense as pd
        >>> defense, data = pd.deterministic(torch.nn.Linear(4, 3)), (torch.rand(5, 4), torch.zeros(5).long())
        >>> compare_to_gold(defense, defense, data).agreement
        1.0
    """
    seed, (x, _) = check_seed(seed), check_examples(data)
    ours, theirs = (predict(d, x, num_samples, seed=derive(seed, k)) for k, d in enumerate((defense, gold)))
    reports = [
        evaluate(d, data, attacks, eps=eps, num_samples=num_samples, seed=seed, name=name)
        for name, d in (("defense", defense), ("gold", gold))
    ]
    return Gap(
        agreement=float((ours.label == theirs.label).double().mean()),
        total_variation=float((ours.probs - theirs.probs).abs().sum(-1).mean() / 2),
        entropy=float(ours.predictive_entropy.mean()),
        gold_entropy=float(theirs.predictive_entropy.mean()),
        report=reports[0] + reports[1],
    )


def _softmax_regression(classes: int, phi: Any, y: Any, loc: Any, scale: Any) -> None:
    import numpyro
    import numpyro.distributions as ndist

    theta = numpyro.sample("theta", ndist.Normal(loc, scale).to_event(1))
    numpyro.sample("y", ndist.Categorical(logits=_linear(theta[None], phi, classes)[0]), obs=y)


def _linear(theta: Any, phi: Any, classes: int) -> Any:
    """Logits ``(draws, batch, classes)`` of flat last layers, weights first, in torch and JAX alike."""
    size = classes * phi.shape[1]
    logits = phi @ theta[:, :size].reshape(len(theta), classes, -1).swapaxes(1, 2)
    return logits + theta[:, None, size:] if theta.shape[1] > size else logits


def _at_means(defense: Defense) -> Defense:
    """A copy in which random weights are ordinary parameters again, at their means."""
    net, sites, num_data = host(defense, None)
    weights = [site for site in sites if isinstance(site, WeightSite) and not site.perturbs]
    for site in weights:
        filled = site.fill(site.center(), net)
        for names in site.names:
            parameter = nn.Parameter(filled[names[0]].detach().clone())
            for name in names:
                owner, _, attribute = name.rpartition(".")
                delattr(net.get_submodule(owner), attribute)
                net.get_submodule(owner).register_parameter(attribute, parameter)
    return Defense.from_sites(net, [site for site in sites if site not in weights], num_data)


def _features(defense: Defense, x: Inputs) -> tuple[str, Tensor]:
    """The path of the linear layer that gives the logits, and what it receives, ``(batch, features)``."""
    seen: dict[str, Any] = {}

    def note(path: str, layer: nn.Module, args: Any, output: Tensor) -> None:
        seen.update(path=path, given=args[0], output=output)

    layers = [(path, m) for path, m in defense.net.named_modules() if isinstance(m, nn.Linear)]
    handles = [layer.register_forward_hook(partial(note, path)) for path, layer in layers]
    parts = []
    try:
        with torch.no_grad():
            for part in x.split(JUDGED):
                logits = defense.mean()(part)[0]
                if seen.get("output") is None or not torch.equal(seen["output"], logits):
                    raise ValueError(
                        f"expected a network that ends in nn.Linear, got {type(defense.net).__name__}; the "
                        "logits are not what a linear layer gives"
                    )
                parts.append(seen["given"].cpu())
    finally:
        for handle in handles:
            handle.remove()
    return seen["path"], torch.cat(parts)


def _normal_prior(defense: Defense, names: list[str], like: Tensor) -> tuple[Tensor, Tensor]:
    """Location and scale of the prior of some parameters, flat; N(0, 1) where they have none."""
    loc: dict[str, Tensor] = {}
    scale: dict[str, Tensor] = {}
    scales = {site.name: site.center() for site in defense.sites.values() if isinstance(site, ScaleSite)}
    for site in defense.sites.values():
        if isinstance(site, WeightSite) and not site.perturbs and site.prior is not None:
            prior = site.distribution("prior", scales).expand((site.size,))
            loc |= site.views(prior.mean)
            scale |= site.views(prior.stddev)
            if set(names) & set(site.views(prior.mean)) and not isinstance(prior, dist.Normal):
                raise ValueError(f"expected a Normal prior on the last layer, got {type(prior).__name__}")
    if not set(names) <= set(loc):
        return torch.zeros_like(like), torch.ones_like(like)
    flat = [torch.cat([part[name].flatten() for name in names]).cpu() for part in (loc, scale)]
    return flat[0], flat[1]


def _refuse_unfit_sites(model: Any, x: Inputs, y: Labels) -> None:
    with own_params(), torch.no_grad(), forked(0):
        trace = poutine.trace(model).get_trace(x, y)
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site["is_observed"] or type(site["fn"]).__name__ == "_Subsample":
            continue
        if any(frame.vectorized for frame in site["cond_indep_stack"]):
            raise ValueError(
                f"expected random weights alone, got another: site {name!r} is drawn for every example, and "
                "NUTS would infer its noise from the labels, which is not the defense; sample weights alone"
            )
        if site["mask"] is False:
            raise ValueError(
                f"expected a prior, found that the weights at site {name!r} have no prior, so they have no "
                "posterior to sample; build the defense with one"
            )


def _warn_of_part(defense: Defense, size: int) -> None:
    if defense.num_data is not None and defense.num_data != size:
        warnings.warn(
            f"NUTS got {size} examples of a data set of {defense.num_data}; give all of the training data",
            stacklevel=3,
        )


def _warn_of_r_hat(logits: Tensor, num_chains: int) -> None:
    values = logits.double().log_softmax(-1).unflatten(0, (num_chains, -1))
    worst = float(split_gelman_rubin(values).max())
    if worst > MAX_R_HAT:
        warnings.warn(
            f"R-hat of a log-probability is {worst:.3f}, above {MAX_R_HAT}: the chains have not met; raise "
            "num_warmup and num_samples",
            stacklevel=3,
        )
