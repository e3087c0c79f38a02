"""A step of several batches, and one in bfloat16, against torch by hand."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as rates

import probdefense as pd
from probdefense.training import PerStep
from tests.contract import BUILDERS, DISCRETE, defended
from tests.worlds import tiny_batch


def plain(seed=1):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return pd.deterministic(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)))


def sgd(defense, lr=0.5):
    return torch.optim.SGD(defense.parameters(), lr=lr)


def trained(batches, **options):
    defense = plain()
    history = pd.fit(defense, batches, epochs=2, optimizer=sgd(defense), progress=False, **options)
    return torch.cat([p.detach().flatten() for p in defense.parameters()]), history


def parts(*sizes):
    x, y = tiny_batch(sum(sizes))
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


@pytest.mark.parametrize(
    ("sizes", "joined"), [((8, 8), (16,)), ((3, 9, 5, 7), (12, 12)), ((4, 4, 2), (8, 2))]
)
def test_accumulated_batches_are_one_batch(sizes, joined):
    one, history = trained(parts(*sizes), accumulate=2)
    other, expected = trained(parts(*joined))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert history.loss == pytest.approx(expected.loss, rel=1e-5)
    assert history.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)


@pytest.mark.parametrize("name", [name for name in BUILDERS if name not in DISCRETE])
def test_kl_terms_count_once_in_a_step_of_several_batches(name):
    """The same draws for both batches, so that their gradient is that of the joined batch."""
    defense = defended(name).eval()
    x, y = tiny_batch(8)
    draws = defense.draw(x)
    local = {site.name for site in defense.sites.values() if site.local}

    def objective(defense, x, y):
        rows = slice(int(where[0]), int(where[0]) + len(x))
        where[0] = (where[0] + len(x)) % 8
        of = lambda name: any(name.startswith(site) for site in local)  # noqa: E731
        given = {n: v.detach()[rows] if of(n) else v.detach() for n, v in draws.items()}
        step = defense.eval().step(x, y, given)
        kl = sum(step.kl.values()) / defense.num_data
        return kl - step.log_lik.mean()

    results = []
    for batches, accumulate in (([(x, y)], 1), (list(zip(x.split(5), y.split(5), strict=True)), 2)):
        where, twin = [0], copy.deepcopy(defense)
        twin.model.num_data = 8
        pd.fit(
            twin,
            batches,
            epochs=1,
            objective=objective,
            optimizer=sgd(twin, 1.0),
            accumulate=accumulate,
            max_grad_norm=None,
            progress=False,
        )
        results.append(torch.cat([p.detach().flatten() for p in twin.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_schedules_count_steps_not_batches():
    defense = plain()
    optimizer = sgd(defense)
    schedule = rates.OneCycleLR(optimizer, max_lr=1.0, total_steps=4)
    options = {"optimizer": optimizer, "progress": False, "epochs": 2}
    pd.fit(defense, parts(4, 4, 4), schedule=schedule, accumulate=2, **options)
    assert schedule.last_epoch == 4
    marked = rates.StepLR(optimizer, 1)
    pd.fit(defense, parts(4, 4, 4), schedule=PerStep(marked), accumulate=3, **options)
    assert marked.last_epoch == 2


def test_progress_counts_batches():
    seen = []

    def objective(defense, x, y, *, kl_weight):
        seen.append(kl_weight)
        return pd.objectives.elbo(defense, x, y, kl_weight=kl_weight)

    trained(parts(4, 4, 4), accumulate=2, objective=objective, kl_schedule=lambda progress: progress)
    assert seen == pytest.approx([i / 6 for i in range(6)])


@pytest.mark.parametrize("name", BUILDERS)
def test_bfloat16_computes_forward_passes_and_keeps_parameters(name):
    defense, kinds = defended(name), set()

    def objective(defense, x, y):
        def see(module, inputs, output):
            kinds.add(output.dtype)

        convolutions = [module for module in defense.modules() if isinstance(module, nn.Conv2d)]
        handles = [module.register_forward_hook(see, prepend=True) for module in convolutions]
        try:
            return pd.objectives.elbo(defense, x, y)
        finally:
            for handle in handles:
                handle.remove()

    batch = tiny_batch(50)
    history = pd.fit(
        defense, [batch], epochs=2, objective=objective, autocast=torch.bfloat16, progress=False, seed=0
    )
    exact = pd.fit(defended(name), [batch], epochs=2, progress=False, seed=0)
    assert kinds == {torch.bfloat16}
    assert {p.dtype for p in defense.parameters()} == {torch.float32}
    assert history.loss == pytest.approx(exact.loss, rel=0.05) and history.loss != exact.loss


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "expected accumulate >= 1"),
        ({"autocast": torch.float16}, "expected autocast=torch.bfloat16 or None, got torch.float16"),
        ({"autocast": "bf16"}, "expected autocast=torch.bfloat16"),
        ({"weight_draws": "same"}, "unknown weight_draws 'same'; known: independent, shared"),
        ({"fabric": "ddp"}, "expected fabric as a lightning_fabric.Fabric, got str"),
        ({"checkpoints": "folder"}, "expected checkpoints as"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        trained(parts(4), **options)
