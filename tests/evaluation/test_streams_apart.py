"""The draws of attack, selection and verdict never meet, and no two of one kind are one."""

import pytest
import torch

import probdefense as pd
from probdefense.evaluation.verdicts import SELECTION_SAMPLES, Judge
from probdefense.prediction.drawing import BLOCK, draw_keyed
from probdefense.rng import derive
from tests.contract import defended
from tests.worlds import FAILURE_RATE, LinearWorld, tiny_batch

RANDOM = ["rse", "bayesian", "bayesian on rse", "pni"]


def rows(logits):
    """Every draw of every example, as something to compare."""
    return {tuple(draw.tolist()) for draw in logits.flatten(0, 1).detach().float()}


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("frozen", [False, True])
def test_an_attack_never_sees_the_draws_of_selection_or_verdict(name, frozen):
    defense, (x, y), seen = defended(name), tiny_batch(3), []

    def listening(f, x, y, *, eps):
        seen.append((f.freeze(40) if frozen else f)(x, 40))
        return x

    pd.evaluate(defense, (x, y), {"a": listening, "b": listening}, num_samples=40, seed=5)
    attacked = set.union(*map(rows, seen))
    verdict = rows(draw_keyed(defense, x, 40, derive(5, "verdict")))
    selection = rows(draw_keyed(defense, x, SELECTION_SAMPLES, derive(5, "selection")))
    assert len(attacked) >= 2 * 3 * (16 if not frozen else 40) * 0.99
    assert not attacked & verdict and not attacked & selection and not verdict & selection


def test_the_verdict_is_drawn_where_the_test_above_looks():
    defense, (x, y) = defended("rse"), tiny_batch(3)
    judge = Judge(defense, (pd.rules.mean_prob,), 40, 5, selects=True)
    seen = judge.see(x, y, 0)
    verdict = pd.rules.mean_prob(draw_keyed(defense, x, 40, derive(5, "verdict")))
    assert torch.equal(seen.log_probs, verdict)
    selection = pd.rules.mean_prob(draw_keyed(defense, x, SELECTION_SAMPLES, derive(5, "selection")))
    left = pd.losses.predictive_margin(draw_keyed(defense, x, SELECTION_SAMPLES, derive(5, "selection")), y)
    assert selection.shape == (3, 3) and torch.equal(seen.margins["mean_prob"] > 0, left < 0)


@pytest.mark.parametrize("name", RANDOM)
def test_every_verdict_draw_is_another(name):
    """Also across the blocks in which they are made."""
    defense, (x, _) = defended(name), tiny_batch(2)
    draws = draw_keyed(defense, x, 3 * BLOCK, 0)
    for example in range(2):
        assert len(rows(draws[:, example : example + 1])) == 3 * BLOCK
    ids = {
        tuple(draw.tolist()) for draw in defended("rse")(x.expand(2, -1, -1, -1), 5).flatten(0, 1).detach()
    }
    assert len(ids) == 10


def test_two_attacks_have_seeds_of_their_own():
    """And every chunk has, and every radius: the same images twice are drawn for anew."""
    defense, (x, y), seeds, draws = defended("rse"), tiny_batch(2), [], []
    x, y = x.repeat(2, 1, 1, 1), y.repeat(2)

    def listening(f, x, y, *, eps, seed):
        seeds.append(tuple(seed.tolist()))
        draws.append(rows(f(x, 16)))
        return x

    pd.evaluate(defense, (x, y), {"a": listening, "b": listening}, eps=[0.1, 0.2], chunk_size=2)
    assert len(seeds) == len(set(seeds)) == 8 and all(len(set(each)) == 2 for each in seeds)
    assert len(set.union(*draws)) == 8 * 2 * 16


def test_a_certificate_does_not_bound_the_votes_that_chose_the_class():
    """On the plane every class has a share of one half: a bound above it is false, alpha times at most."""
    world = LinearWorld(sigma=0.3)
    x, _ = world.points(1)
    on_plane = (x - (world.score(x) / world.w.norm() ** 2).unsqueeze(1) * world.w).expand(3000, -1)
    alpha, count = 0.25, 64
    false = 0
    for chunk_size in (3000,):
        found = pd.certify(
            world.noisy(), on_plane, n0=count, n=count, alpha=alpha, seed=1, chunk_size=chunk_size
        )
        false += int((found.label >= 0).sum())
    deviation = (alpha * (1 - alpha) / 3000) ** 0.5
    quantile = float(torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - FAILURE_RATE)))
    assert 0.1 < false / 3000 < alpha + quantile * deviation


def test_the_gradient_of_a_call_is_that_of_all_its_draws():
    defense, (x, y) = defended("bayesian on rse"), tiny_batch(3)
    seen = []

    def listening(f, x, y, *, eps):
        point = x.clone().requires_grad_()
        logits = f(point, 8)
        (whole,) = torch.autograd.grad(
            pd.losses.expected_cross_entropy(logits, y).sum(), point, retain_graph=True
        )
        parts = [
            torch.autograd.grad(
                pd.losses.expected_cross_entropy(draw[None], y).sum(), point, retain_graph=True
            )[0]
            for draw in logits
        ]
        seen.append((whole, torch.stack(parts)))
        return x

    pd.evaluate(defense, (x, y), {"a": pd.with_draws(listening, 8)})
    whole, parts = seen[0]
    torch.testing.assert_close(whole, parts.mean(0))
    assert float((parts - parts[0]).abs().amax(dim=(1, 2, 3, 4))[1:].min()) > 0


def test_pgd_steps_along_the_mean_gradient_of_its_draws():
    world = LinearWorld(sigma=0.5)
    x, y = world.points(20)

    class TwoOpinions:
        """Two draws whose gradients differ: one strong, one weak and opposite."""

        stochastic = True

        def __call__(self, x, num_samples=None):
            strong, weak = 3 * world.score(x), -world.score(x)
            logits = torch.stack([strong, weak])
            return torch.stack([torch.zeros_like(logits), logits], dim=-1)

    points = pd.attacks.fgsm(TwoOpinions(), x, y, eps=0.1, loss=pd.losses.margin)
    expected = x - 0.1 * torch.where(y.bool(), 1.0, -1.0).unsqueeze(1) * world.w.sign()
    torch.testing.assert_close(points, expected.clamp(0, 1))


def test_the_kl_of_local_sites_counts_the_data_set_and_not_the_batch():
    """Away from the start, where it is zero and says nothing."""
    from pyro.infer import TraceMeanField_ELBO

    defense = pd.defenses.rse(pd.models.small_cnn(width=2), scale="variational", num_data=40)
    with torch.no_grad():
        for posterior in defense.guide.posteriors.values():
            posterior.log_scale.sub_(0.7)
    x, y = torch.rand(8, 1, 8, 8), torch.randint(10, (8,))
    q, p = torch.distributions.Normal(0, torch.tensor(-0.7).exp()), torch.distributions.Normal(0.0, 1.0)
    each = float(torch.distributions.kl_divergence(q, p))
    step = defense.step(x, y)
    elements = {name: draw[0].numel() for name, draw in step.draws.items()}
    for name, kl in step.kl.items():
        assert float(kl.detach()) == pytest.approx(40 * elements[name] * each, rel=1e-4)
    torch.manual_seed(0)
    ours = 40 * float(pd.objectives.elbo(defense, x, y).detach())
    torch.manual_seed(0)
    theirs = TraceMeanField_ELBO().loss(defense.model, defense.guide, x, y)
    assert ours == pytest.approx(theirs, rel=1e-5)
