"""Pyro's NUTS runs on the model of a defense and agrees with SVI where the posterior is simple."""

import pyro
import pytest
import torch
from pyro.infer import MCMC, NUTS
from torch import nn

import probdefense as pd
from probdefense.objectives import elbo


@pytest.mark.slow
def test_nuts_and_svi_agree_on_the_weights_of_a_small_net():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(60, 2, generator=generator)
    y = (x[:, 0] + 0.3 * torch.randn(60, generator=generator) > 0.5).long()
    net = nn.Linear(2, 2, bias=False)
    defense = pd.defenses.bayesian(net, num_data=60, init_scale=0.3).eval()
    optimizer = torch.optim.Adam(defense.parameters(), lr=0.03)
    for _ in range(400):
        optimizer.zero_grad()
        elbo(defense, x, y, num_particles=4).backward()
        optimizer.step()
    sampler = MCMC(NUTS(defense.model), num_samples=150, warmup_steps=100, disable_progbar=True)
    sampler.run(x, y)
    weights = sampler.get_samples()["weights"]
    assert weights.shape == (150, 4) and len(pyro.get_param_store()) == 0
    loc = defense.guide.posteriors["weights"].loc.detach()
    # Only differences of the two rows are identified by the data; the prior settles the rest.
    contrast = weights[:, 2:] - weights[:, :2]
    assert (loc[2:] - loc[:2]).tolist() == pytest.approx(contrast.mean(0).tolist(), abs=0.35)
