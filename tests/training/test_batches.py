"""What `fit` and `recalibrate` take for a loader: what starts anew, with or without a length, and what is refused."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

import probdefense as pd
from probdefense.objectives import elbo
from tests.worlds import tiny_batch


class Stream(IterableDataset):
    """Examples without a number of them."""

    def __init__(self, count=20):
        self.x, self.y = tiny_batch(count)

    def __iter__(self):
        return iter(zip(self.x, self.y, strict=True))


def plain():
    return pd.deterministic(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)))


def fit(loader, **options):
    return pd.fit(plain(), loader, **{"epochs": 2, "progress": False, **options})


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Stream(), batch_size=8),
        DataLoader(TensorDataset(*tiny_batch(20)), batch_size=8),
        [tuple(part[i : i + 8] for part in tiny_batch(20)) for i in (0, 8, 16)],
        [[part[i : i + 8] for part in tiny_batch(20)] for i in (0, 8, 16)],
    ],
    ids=["no length", "loader", "list", "list of lists"],
)
def test_every_loader_trains_the_same(loader):
    torch.manual_seed(1)
    found = fit(loader)
    torch.manual_seed(1)
    defense, losses = plain(), []
    optimizer = torch.optim.Adam(defense.param_groups(), lr=1e-3)
    for _ in range(2):
        losses.append(0.0)
        for rows in (slice(0, 8), slice(8, 16), slice(16, 20)):
            x, y = (part[rows] for part in tiny_batch(20))
            loss = nn.functional.cross_entropy(defense.net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1] += float(loss.detach()) * len(x) / 20
    assert found.loss == pytest.approx(losses, rel=1e-5)


def test_a_schedule_of_progress_needs_a_length():
    with pytest.raises(ValueError, match="this loader has no length"):
        fit(DataLoader(Stream(), batch_size=8), kl_schedule=lambda progress: progress)


def used_up():
    loader = iter([tiny_batch()])
    list(loader)
    return loader


@pytest.mark.parametrize(
    ("make", "epochs", "message"),
    [
        (
            lambda: (tiny_batch() for _ in range(3)),
            2,
            "expected a loader that starts anew .* got a generator",
        ),
        (lambda: (batch for batch in []), 1, "the loader gave no batch"),
        (used_up, 1, "the loader gave no batch"),
        (lambda: iter([tiny_batch()]), 2, "the loader gave no batch"),
        (lambda: [], 1, "the loader has no examples"),
        (lambda: DataLoader(Stream(0), batch_size=2), 1, "the loader gave no batch"),
        (lambda: DataLoader(TensorDataset(*tiny_batch(3)), 4, drop_last=True), 1, "without drop_last=True"),
    ],
)
def test_an_epoch_without_a_batch_is_refused(make, epochs, message):
    with pytest.raises(ValueError, match=message):
        fit(make(), epochs=epochs)


def test_one_epoch_of_a_generator_is_fine():
    assert len(fit((tiny_batch() for _ in range(3)), epochs=1).loss) == 1


x, y = tiny_batch()
BAD = [
    (None, "a loader of batches .*, got NoneType None; DataLoader"),
    (3, "a loader of batches .*, got int 3"),
    ("digits", "a loader of batches .*, got str 'digits'"),
    (x, r"a loader of batches .* got a Tensor; DataLoader\(TensorDataset\(x, y\)"),
    ((x, y), r"batches \(x, y\), got a Tensor; DataLoader\(TensorDataset\(x, y\)"),
    ([x, y], r"batches \(x, y\), got a Tensor"),
    ((x.numpy(), y.numpy()), r"batches \(x, y\), got a ndarray"),
    ({"x": x, "y": y}, "a loader of batches .*, got a dict of x, y"),
    (TensorDataset(x, y), "a loader of batches .*, got TensorDataset .* makes them"),
    ([{"image": x, "label": y}], "batches .*, got a dict of image, label; .*collate_fn"),
    ([(x, y, x)], "batches .*, got a tuple of 3; .*collate_fn"),
    ([(x,)], "batches .*, got a tuple of 1"),
    ([(x.numpy(), y)], "expected x as a torch.Tensor"),
    ([(x, y.tolist())], r"expected y as int64 class indices, got list; convert with torch.as_tensor\(y\)"),
    ([(x, y.numpy())], r"got ndarray; convert with torch.as_tensor\(y\)"),
    ([(x, y.int())], r"got torch.int32; convert with y.long\(\)"),
    ([(x, y.float())], "got torch.float32; regression is out of scope: train it with Pyro's own SVI"),
    ([(x, torch.eye(3)[y])], r"one-hot or soft labels with y.argmax\(1\)"),
    ([(x, y[:3])], r"expected y of shape \(6,\)"),
    ([(x, y.unsqueeze(1))], r"y of shape \(6,\), one label per example"),
    ([(x, y + 5)], "the number of classes in the logits"),
    ([(x, y - 5)], "labels are class indices from 0"),
    ([(torch.randint(9, (6, 36)), y)], "tokens are out of scope: give the network embeddings"),
    ([(x.double(), y)], "expected inputs that fit the network"),
    ([(x[:, :, :5], y)], "expected inputs that fit the network"),
    ([(x * torch.nan, y)], "finite values in x"),
    ([("image", "label")], "expected x as a torch.Tensor"),
    ([tiny_batch(), 3], "batches .*, got int 3"),
    (np.array([[1.0, 2.0]]), "batches .* got a ndarray"),
]


@pytest.mark.parametrize(("loader", "message"), BAD)
def test_what_holds_no_batches_is_refused(loader, message):
    defense = pd.deterministic(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)))
    before = [parameter.clone() for parameter in defense.parameters()]
    with pytest.raises((TypeError, ValueError), match=message):
        pd.fit(defense, loader, epochs=1, progress=False)
    assert all(map(torch.equal, before, defense.parameters())), "something was trained"
    assert defense.training and not defense._step_hooks


@pytest.mark.parametrize(
    "own",
    [
        lambda data: DataLoader(data, 8, shuffle=True),
        lambda data: DataLoader(data, 8, shuffle=True, generator=torch.Generator()),
        lambda data: DataLoader(data, 8, sampler=RandomSampler(data, generator=torch.Generator())),
        lambda data: [(data.tensors[0][:8], data.tensors[1][:8])],
    ],
    ids=["global", "its own", "the sampler's own", "none"],
)
def test_a_seed_makes_one_result_and_moves_nothing_outside(own):
    def noisy(defense, x, y):
        order.append(x[:, 0, 0, 0].tolist())
        attacked = pd.attacks.pgd(defense.samples(1), x, y, eps=0.1, num_steps=1)
        return elbo(defense, attacked, y)

    def train(seed, disturb):
        torch.manual_seed(disturb)
        loader = own(TensorDataset(*tiny_batch(20)))
        generator = getattr(getattr(loader, "sampler", None), "generator", None)
        states = [torch.get_rng_state(), None if generator is None else generator.get_state()]
        with torch.random.fork_rng():
            torch.manual_seed(5)
            defense = pd.defenses.rse(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 3)))
        pd.fit(defense, loader, epochs=2, objective=noisy, seed=seed, progress=False)
        assert torch.equal(states[0], torch.get_rng_state())
        assert generator is None or torch.equal(states[1], generator.get_state())
        return torch.cat([p.detach().flatten() for p in defense.parameters()])

    order: list[list[float]] = []
    first, again, other = train(3, disturb=0), train(3, disturb=1), train(4, disturb=0)
    assert torch.equal(first, again) and not torch.equal(first, other)
    third = len(order) // 3
    assert order[:third] == order[third : 2 * third]


def test_recalibration_that_fails_keeps_the_statistics():
    net = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 2))
    defense, x = pd.deterministic(net), torch.tensor([[0.0], [0.5]])
    pd.recalibrate(defense, [(x, torch.tensor([0, 1]))])
    found = {name: value.clone() for name, value in net.state_dict().items()}
    y = torch.tensor([0, 1])
    for loader, message in (
        ([], "no examples"),
        (iter(()), "no batch"),
        (iter([(x, y), (x + 2, y)]), r"\[0, 1\]"),
        (iter([(x, y), (torch.rand(2, 3), y)]), "fit the network"),
        ((x, y), "TensorDataset"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            pd.recalibrate(defense, loader)
        assert all(torch.equal(value, found[name]) for name, value in net.state_dict().items())
        assert net[0].momentum == 0.1
