"""The whole idea on one page, with torch and pyro only: a defense is a Pyro model and its guide.

All sites are drawn first (weights, then noise); the network is then a pure function of the draws and
the input. The same draws serve training, averaging and attacks, so randomness reaches every attack.

    python examples/mini_probdefense.py
"""

import math
import sys

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn
from torch.func import functional_call


class Mini(nn.Module):
    """Mean-field weights and Gaussian noise on the input of a small network."""

    def __init__(self, net: nn.Module, num_data: int, sigma: float = 0.1, init_scale: float = 0.02):
        super().__init__()
        self.names, tensors = zip(*net.named_parameters(), strict=True)
        self.shapes = [tensor.shape for tensor in tensors]
        self.net, self.num_data, self.sigma = [net], num_data, sigma  # the net has no parameters of its own
        self.loc = nn.Parameter(torch.cat([tensor.detach().flatten() for tensor in tensors]))
        self.log_scale = nn.Parameter(torch.full_like(self.loc, math.log(init_scale)))

    def logits(self, x: Tensor, theta: Tensor, eps: Tensor) -> Tensor:
        """The pure function: one draw of the weights and of the noise, one batch."""
        parts = theta.split([shape.numel() for shape in self.shapes])
        weights = {n: p.view(s) for n, s, p in zip(self.names, self.shapes, parts, strict=True)}
        return functional_call(self.net[0], weights, (x + self.sigma * eps,))

    def plate(self, x: Tensor) -> pyro.plate:
        return pyro.plate("data", size=self.num_data, subsample=torch.arange(len(x)), dim=-1)

    def model(self, x: Tensor, y: Tensor) -> None:
        """p(theta) prod_i p(eps_i) p(y_i | x_i, theta, eps_i)"""
        prior = dist.Normal(torch.zeros_like(self.loc), 1.0).to_event(1)
        theta, plate = pyro.sample("theta", prior), self.plate(x)
        with plate:
            noise = dist.Normal(0.0, 1.0).expand(x.shape).to_event(x.dim() - 1)
            eps = pyro.sample("eps", noise)
            pyro.sample("y", dist.Categorical(logits=self.logits(x, theta, eps)), obs=y)

    def guide(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """q(theta) prod_i p(eps_i): the noise keeps its prior, so its KL is zero."""
        theta = pyro.sample("theta", dist.Normal(self.loc, self.log_scale.exp()).to_event(1))
        with self.plate(x):
            noise = dist.Normal(0.0, 1.0).expand(x.shape).to_event(x.dim() - 1)
            return theta, pyro.sample("eps", noise)

    def elbo(self, x: Tensor, y: Tensor) -> Tensor:
        """The negative evidence lower bound, in nats per example."""
        return TraceMeanField_ELBO().differentiable_loss(self.model, self.guide, x, y) / self.num_data

    def forward(self, x: Tensor, num_samples: int) -> Tensor:
        """Logits of fresh draws, (samples, batch, classes): differentiable and never averaged."""
        with poutine.block():
            return torch.stack([self.logits(x, *self.guide(x)) for _ in range(num_samples)])


def predict(logits: Tensor) -> Tensor:
    """Log of the mean probability, (samples, batch, classes) -> (batch, classes)."""
    return logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))


def expected_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """What the attacker climbs: expectation over transformation is a mean over the sample axis."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), y.repeat(len(logits)), reduction="none")


def eot_gradient(defense: nn.Module, x: Tensor, y: Tensor, num_samples: int) -> Tensor:
    """Gradient of the expected cross-entropy with respect to the input; nothing else is touched."""
    point = x.detach().requires_grad_(True)
    loss = expected_cross_entropy(defense(point, num_samples), y).sum() / num_samples
    return torch.autograd.grad(loss, point)[0]


def pgd(
    defense: nn.Module, x: Tensor, y: Tensor, eps: float, num_steps: int = 20, num_samples: int = 8
) -> Tensor:
    """Projected gradient ascent on the expected loss, in the l-inf ball and the box."""
    x_adv = (x + eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    for _ in range(num_steps):
        step = 2.5 * eps / num_steps * eot_gradient(defense, x_adv, y, num_samples).sign()
        x_adv = (x + (x_adv + step - x).clamp(-eps, eps)).clamp(0, 1)
    return x_adv


def accuracy(defense: nn.Module, x: Tensor, y: Tensor, num_samples: int = 50) -> float:
    """By the mean probability of fresh draws: never the draws that an attack climbed."""
    with torch.no_grad():
        return float((predict(defense(x, num_samples)).argmax(-1) == y).float().mean())


def two_rings(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points on two rings inside the unit square, and which ring."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (count,), generator=generator)
    angle = 2 * math.pi * torch.rand(count, generator=generator)
    radius = torch.where(y == 0, 0.15, 0.4) + 0.03 * torch.randn(count, generator=generator)
    return (0.5 + torch.stack([radius * angle.cos(), radius * angle.sin()], 1)).clamp(0, 1), y


def main(num_steps: int = 400) -> None:
    torch.manual_seed(0)
    (x, y), (x_test, y_test) = two_rings(400, seed=1), two_rings(200, seed=2)
    net = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2))
    defense = Mini(net, num_data=len(x), sigma=0.05)
    optimizer = torch.optim.Adam(defense.parameters(), lr=0.02)
    for _ in range(num_steps):
        x_train = pgd(defense, x, y, eps=0.05, num_steps=3, num_samples=1)  # adversarial SVI
        loss = defense.elbo(x_train, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"clean accuracy {accuracy(defense, x_test, y_test):.2f}")
    for eps in (0.05, 0.1, 0.2):
        x_adv = pgd(defense, x_test, y_test, eps)
        print(f"under EOT-PGD at eps {eps:.2f}: {accuracy(defense, x_adv, y_test):.2f}")


if __name__ == "__main__":
    main(num_steps=20 if "--quick" in sys.argv else 400)
