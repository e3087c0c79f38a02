"""Predictions of loaders and data sets are those of their tensors."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

import probdefense as pd
from tests.contract import BUILDERS, defended
from tests.worlds import tiny_batch

COUNT = 23


class Images(Dataset):
    """A data set without labels."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i]


FORMS = {
    "a loader": lambda x, y: DataLoader(TensorDataset(x, y), 5),
    "a loader of inputs": lambda x, y: DataLoader(TensorDataset(x), 7),
    "a data set": lambda x, y: TensorDataset(x, y),
    "a data set of inputs": lambda x, y: Images(x),
    "a list of batches": lambda x, y: [(x[:9], y[:9]), (x[9:], y[9:])],
    "a generator": lambda x, y: (part for part in x.split(4)),
    "a pair": lambda x, y: (x, y),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["bayesian on rse", "deterministic"])
def test_a_loader_is_predicted_as_its_tensors(name, form):
    defense, (x, y) = defended(name), tiny_batch(COUNT)
    state = torch.get_rng_state()
    whole, found = (pd.predict(defense, data, 6, seed=3) for data in (x, FORMS[form](x, y)))
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(found.log_probs, whole.log_probs)
    torch.testing.assert_close(found.expected_entropy, whole.expected_entropy)
    assert found.num_samples == whole.num_samples and found.decided is None


@pytest.mark.parametrize("name", BUILDERS)
def test_every_batch_has_the_same_draws(name):
    defense, (x, _) = defended(name), tiny_batch(1)
    found = pd.predict(defense, [x, x, x], 3).log_probs
    torch.testing.assert_close(found[1:], found[:1].expand(2, -1), atol=1e-5, rtol=1e-5)


def test_labels_of_a_loader_are_settled_or_left_open_one_by_one():
    x, y = tiny_batch(COUNT)
    found = pd.predict(defended("bayesian on rse"), DataLoader(TensorDataset(x, y), 5), 20, alpha=0.1, seed=0)
    assert found.num_samples.shape == found.label.shape == (COUNT,)
    assert bool((found.num_samples[~found.settled] == 20).all()) and bool((found.num_samples <= 20).all())
    plain = pd.predict(defended("deterministic"), DataLoader(TensorDataset(x, y), 5), 20, alpha=0.1)
    assert torch.equal(plain.label, plain.log_probs.argmax(-1))


def test_one_batch_is_in_memory_at_a_time():
    seen = []

    def reading():
        for part in tiny_batch(COUNT)[0].split(5):
            seen.append(len(part))
            yield part

    def answers(x, num_samples):
        assert sum(seen) - len(x) < COUNT and seen[-1] == len(x)
        return torch.zeros(num_samples, len(x), 3)

    assert pd.predict(answers, reading(), 2).log_probs.shape == (COUNT, 3)


@pytest.mark.parametrize(
    ("data", "error", "said"),
    [
        (DataLoader(TensorDataset(torch.rand(4, 2)), shuffle=True), ValueError, "shuffle=False"),
        ([], ValueError, "got an empty loader"),
        ([torch.rand(2, 2), torch.rand(2, 4)], ValueError, "expected every batch of shape"),
        ([()], TypeError, "expected x as a torch.Tensor"),
        ("digits", TypeError, "expected x, a data set or a loader of batches, got str"),
        ({"x": torch.rand(2, 2)}, TypeError, "expected x, a data set or a loader of batches, got dict"),
        (torch.rand(2, 2).numpy(), TypeError, "convert with torch.as_tensor"),
        (3, TypeError, "got int"),
    ],
)
def test_other_data_are_refused(data, error, said):
    with pytest.raises(error, match=said):
        pd.predict(pd.deterministic(torch.nn.Linear(2, 3)), data)


class Pictures(Images):
    """A data set whose transform was forgotten."""

    def __getitem__(self, i):
        from PIL import Image

        return Image.fromarray((self.x[i, 0] * 255).byte().numpy()), 0


@pytest.mark.parametrize("form", [lambda data: data, DataLoader])
@pytest.mark.parametrize("ask", [pd.predict, pd.evaluate])
def test_pictures_that_are_no_tensors_are_refused_by_name(ask, form):
    with pytest.raises(TypeError, match=r"expected a data set of tensors, got one of PIL .*ToTensor\(\)"):
        ask(defended("deterministic"), form(Pictures(tiny_batch(3)[0])))


@pytest.mark.parametrize("ask", [pd.predict, pd.evaluate])
def test_a_loader_that_leaves_examples_out_is_refused(ask):
    data = TensorDataset(*tiny_batch(7))
    with pytest.raises(ValueError, match="leaves out the last 3 of them; make it with drop_last=False"):
        ask(defended("deterministic"), DataLoader(data, 4, drop_last=True))
    ask(defended("deterministic"), DataLoader(data, 7, drop_last=True))  # leaves out none
