"""Random filters: which are random, by how much, and what becomes of the scales."""

import pytest
import torch
from torch import nn

import probdefense as pd
from probdefense.defenses import random_filters
from probdefense.objectives import elbo
from tests.worlds import monte_carlo_tolerance, tiny_batch, tiny_net


def scales(defense):
    return torch.cat([m.scale.detach().flatten() for m in defense.modules() if hasattr(m, "channels")])


def test_only_the_chosen_filters_vary_and_by_the_scale():
    net = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.Flatten())
    defense, x = random_filters(net, 0.5, init_scale=0.3), torch.ones(1, 1, 1, 1)
    with torch.no_grad():
        draws = defense(x, 20_000)[:, 0]
    torch.testing.assert_close(draws[:, 2:], net(x)[:, 2:].expand(20_000, 2).detach())
    relative = draws[:, :2].var(0) / 0.3**2 - 1  # fan-in 1
    assert float(relative.abs().max()) < monte_carlo_tolerance(2**0.5, 20_000)
    torch.testing.assert_close(defense.mean()(x)[0], net(x))


def test_scales_are_in_units_of_the_fan_in_and_the_site_holds_the_random_part_alone():
    defense = random_filters(tiny_net(), 0.5, init_scale=0.3, floor=0.1, ceiling=1.0)
    first, second = (m for m in defense.modules() if hasattr(m, "channels"))
    torch.testing.assert_close(first.scale.detach(), torch.full((2, 1, 3, 3), 0.3 / 3))
    torch.testing.assert_close(second.scale.detach(), torch.full((2, 3, 3, 3), 0.3 / 27**0.5))
    assert defense.sites["random_filters"].size == 2 * 9 + 2 * 27
    assert (first.channels, second.channels) == ([0, 1], [0, 1])


def test_where_and_share_choose():
    defense = random_filters(tiny_net(), 1.0, where=lambda name, _: name.startswith("4"))
    assert [names[0] for names in defense.sites["random_filters"].names] == ["4.weight"]
    assert defense.sites["random_filters"].size == 4 * 27
    assert random_filters(tiny_net(), 0.01).sites["random_filters"].size == 9 + 27


def trained(floor):
    """Scales on inputs that are right already: noise in the logits can only cost."""
    net, x, y = (
        nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten()),
        torch.ones(64, 1, 1, 1),
        torch.zeros(64).long(),
    )
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))
    defense = random_filters(net, 1.0, floor=floor, init_scale=0.5)
    defense.net.requires_grad_(False)[0].random_filters.requires_grad_(True)
    torch.manual_seed(0)
    optimizer = torch.optim.Adam([p for p in defense.parameters() if p.requires_grad], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        elbo(defense, x, y, num_particles=8).backward()
        optimizer.step()
    return scales(defense)


@pytest.mark.slow
def test_without_a_floor_training_takes_the_scales_down_and_a_floor_holds_them():
    """The known failure of learned scales: they follow the loss to zero."""
    free, held = trained(1e-6), trained(0.3)
    assert float(free.max()) < 0.15
    assert 0.3 <= float(held.min()) <= float(held.max()) < 0.4


def test_a_state_of_other_bounds_or_channels_is_refused():
    saved = random_filters(tiny_net(), 0.5)
    for other, name in (
        (random_filters(tiny_net(), 0.5, ceiling=2.0), "ceiling"),
        (random_filters(tiny_net(), 0.75), "channels"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=f"{name} is|size mismatch"):
            other.load_state_dict(saved.state_dict())


def test_random_means_get_noise_too():
    defense, (x, _) = random_filters(pd.defenses.bayesian(tiny_net(), num_data=6)), tiny_batch()
    draws = defense.draw(x)
    filled = defense.model.fill(x, draws)
    plain = defense.sites["weights"].fill(draws["weights"], defense.net)["4.weight"]
    moved = (filled["4.weight"] - plain).abs().flatten(1).amax(1)
    assert bool((moved[:2] > 0).all()) and not bool(moved[2:].any())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.0}, "share"),
        ({"init_scale": 2.0}, "expected init_scale between floor 0.1 and ceiling 1.0"),
        ({"init_scale": 0.05}, "expected init_scale between floor"),
        ({"where": lambda name, _: False}, "expected convolutions, found none"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        random_filters(tiny_net(), **options)


def test_arviz_holds_the_random_filters_alone():
    tree = pd.to_arviz(random_filters(tiny_net(), 0.5), tiny_batch(4), num_samples=5, weights=True)
    assert tree["posterior"]["4.weight"].shape == (1, 5, 2, 3, 3, 3)
    assert float(tree["posterior"]["4.weight"].std("draw").min()) > 0
