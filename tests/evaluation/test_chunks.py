"""One report, whatever the batches, passes, restarts and shards in which it was made."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import probdefense as pd
from probdefense.core.streams import Keys
from probdefense.evaluation.examples import chunks
from tests.contract import BUILDERS, defended
from tests.worlds import LinearWorld, tiny_batch, tiny_net

ATTACKS = {
    "pgd": pd.with_draws(partial(pd.attacks.pgd, num_steps=2), 2),
    "ddn": pd.with_draws(partial(pd.attacks.ddn, num_steps=2), 2),
}


def written(report, folder):
    report.save(folder)
    return (folder / "report.json").read_bytes(), (folder / "arrays.npz").read_bytes()


def evaluated(data, name="bayesian on rse", **options):
    options = {"num_samples": 4, "chunk_size": 8, "norm": 2, "eps": [0.3, 0.6]} | options
    return pd.evaluate(defended(name), data, ATTACKS, **options)


class Doubling(Dataset):
    """A map-style set that holds its examples nowhere."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], int(self.y[index])


class Flow(IterableDataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __iter__(self):
        yield from zip(self.x, self.y, strict=True)


def test_the_bytes_do_not_depend_on_how_the_data_come(tmp_path):
    x, y = tiny_batch(12)
    forms = {
        "tensors": (x, y),
        "data set": TensorDataset(x, y),
        "map": Doubling(x, y),
        "batches of 3": DataLoader(TensorDataset(x, y), 3),
        "batches of 11, two workers": DataLoader(Doubling(x, y), 11, num_workers=2),
        "a flow": DataLoader(Flow(x, y), 7),
        "a list": [(x[:5], y[:5]), (x[5:], y[5:])],
    }
    files = {name: written(evaluated(data), tmp_path / name) for name, data in forms.items()}
    assert len(set(files.values())) == 1


def test_a_loader_that_shuffles_is_refused():
    loader = DataLoader(TensorDataset(*tiny_batch(20)), 5, shuffle=True)
    with pytest.raises(ValueError, match="keeps the order of its data, got one with a RandomSampler"):
        pd.evaluate(defended("rse"), loader)


def test_chunks_are_held_one_at_a_time():
    x, y = tiny_batch(40)
    alive = 0

    def batches():
        nonlocal alive
        for start in range(0, 40, 4):
            alive += 1
            yield x[start : start + 4], y[start : start + 4]

    for number, chunk in enumerate(chunks(batches(), 8)):
        assert alive == 2 * number + 2 and chunk.number == number and chunk.first == 8 * number
        assert torch.equal(chunk.x, x[chunk.ids])


SOME = [
    name if number % 3 == 0 else pytest.param(name, marks=pytest.mark.slow)
    for number, name in enumerate(BUILDERS)
]


@pytest.mark.parametrize("builder", SOME)
def test_passes_change_no_draw(builder):
    defense, x = defended(builder), tiny_batch(50)[0]
    whole = x.clone().requires_grad_()
    expected = defense.drawn(whole, 5, seed=3)
    (slope,) = torch.autograd.grad(expected.square().sum(), whole)
    for max_batch in (1, 7, 32, 64, 200):
        moved = x.clone().requires_grad_()
        found = defense.drawn(moved, 5, seed=3, max_batch=max_batch)
        (gradient,) = torch.autograd.grad(found.square().sum(), moved)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(gradient, slope, atol=1e-4, rtol=1e-3)
    others = [defense.drawn(x, 5, seed=seed) for seed in range(4, 12)]
    assert all(torch.equal(other, expected) for other in others) == (not defense.stochastic)
    state = torch.get_rng_state()
    defense.drawn(x, 2, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_draws_of_a_call_are_independent_and_of_the_family():
    world = LinearWorld(sigma=0.4)
    x, _ = world.points(33)
    logits = world.noisy().drawn(x, 400, seed=0)[..., 1].detach()
    noise = (logits - world.score(x)) / (world.sigma * world.w.norm())
    assert float(noise.mean()) == pytest.approx(0, abs=4.5 / math.sqrt(noise.numel()))
    assert float(noise.std()) == pytest.approx(1, abs=4.5 / math.sqrt(2 * noise.numel()))
    for axis in (0, 1):
        neighbors = (noise.roll(1, axis) * noise).mean()
        assert abs(float(neighbors)) < 4.5 / math.sqrt(noise.numel())


def test_a_row_of_a_whole_tile_depends_on_no_other_row():
    model, (x, _) = defended("rse").model, tiny_batch(40)
    ids = torch.arange(40)
    all_rows = Keys(model, 7, 3, ids, True).noise(x, range(3), range(40))
    some = torch.tensor([37, 2, 31])
    few = Keys(model, 7, 3, some, True).noise(x[some], range(1, 3), range(3))
    for name, values in all_rows.items():
        assert torch.equal(values[1:, some], few[name])


def test_the_numbers_of_a_chunk_belong_to_it_alone(tmp_path):
    """Another chunk size is another run of the attacks, and says so; verdict draws stay."""
    x, y = tiny_batch(20)
    one, other = evaluated((x, y)), evaluated((x, y), chunk_size=5)
    assert one.settings["chunk_size"] == 8 and other.settings["chunk_size"] == 5
    for rule in ("mean_prob", "single_draw"):
        key = f"correct/defense/clean/0/{rule}"
        assert np.array_equal(one.arrays[key], other.arrays[key])
    head = evaluated((x[:8], y[:8]))
    for key, array in head.arrays.items():
        axis = int(key.startswith("correct"))
        np.testing.assert_array_equal(np.take(one.arrays[key], range(8), axis), array, err_msg=key)


def test_two_calls_of_an_attack_see_other_draws_and_the_verdict_sees_none_of_them():
    seen = []

    def listening(f, x, y, *, eps):
        seen.extend(f(x).detach() for _ in range(3))
        return x

    defense, (x, y) = defended("rse"), tiny_batch(6)
    pd.evaluate(defense, (x, y), {"a": listening, "b": listening}, eps=[0.1, 0.2])
    draws = [draw for answer in seen for draw in answer]
    assert len(draws) == 2 * 2 * 3 * 16
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == len(draws)


def test_settings_name_what_the_bytes_depend_on():
    settings = evaluated(tiny_batch(4)).settings
    assert settings["draw_chunk"] is None and settings["threads"] == torch.get_num_threads()
    assert settings["torch"] == torch.__version__ and settings["device"] == "cpu"


@pytest.mark.parametrize("draw_chunk", [1, 40])
def test_passes_of_an_evaluation_leave_the_verdicts(draw_chunk):
    data = tiny_batch(12)
    whole, split = evaluated(data), evaluated(data, draw_chunk=draw_chunk)
    for one, other in zip(whole.rows, split.rows, strict=True):
        assert one["accuracy"] == other["accuracy"] and one["queries"] == other["queries"]


def test_shards_merge_into_the_report_of_the_whole(tmp_path):
    x, y = tiny_batch(20)
    whole = evaluated((x, y))
    parts = [evaluated((x[i : i + 8], y[i : i + 8]), first=i) for i in (8, 16, 0)]
    assert written(pd.Report.merge(parts), tmp_path / "a") == written(whole, tmp_path / "b")
    with pytest.raises(ValueError, match="got some of defense twice; give first="):
        pd.Report.merge([parts[0], parts[0]])
    with pytest.raises(ValueError, match="expected shards of one evaluation"):
        pd.Report.merge([parts[0], evaluated((x[:8], y[:8]), seed=1)])
    with pytest.raises(ValueError, match="at least one report"):
        pd.Report.merge([])
    with pytest.raises(ValueError, match="first as a multiple of chunk_size=8, got 5"):
        evaluated((x[:8], y[:8]), first=5)


def shard(logits_fn, first, attacks=None, **options):
    x, y = tiny_batch(20)
    part = slice(first, first + 8)
    return pd.evaluate(
        logits_fn, (x[part], y[part]), attacks, num_samples=3, chunk_size=8, first=first, **options
    )


def test_shards_of_two_networks_are_refused(tmp_path):
    shards = []
    for number, first in enumerate((0, 8)):
        torch.manual_seed(number)
        shard(pd.deterministic(tiny_net()), first).save(tmp_path / str(number))
        shards.append(pd.Report.load(tmp_path / str(number)))
    with pytest.raises(ValueError, match="expected shards of one evaluation.*: the defense differs"):
        pd.Report.merge(shards)


@pytest.mark.parametrize(
    "changed",
    [
        {"attacks": {"pgd": pd.with_draws(pd.attacks.fgsm, 2)}},
        {"attacks": {"fgsm": pd.attacks.fgsm}},
    ],
)
def test_shards_under_other_attacks_are_refused(changed):
    defense = defended("rse")
    one = shard(defense, 0, {"pgd": pd.attacks.fgsm})
    with pytest.raises(ValueError, match="expected shards of one evaluation"):
        pd.Report.merge([one, shard(defense, 8, **changed)])


@pytest.mark.parametrize("kind", ["frozen", "counted", "samples", "mean", "function"])
def test_shards_of_anything_that_answers_merge(kind):
    defense = defended("rse")
    logits_fn = {
        "frozen": lambda: defense.freeze(2),
        "counted": lambda: pd.counted(defense),
        "samples": lambda: defense.samples(3),
        "mean": lambda: defense.mean(),
        "function": lambda: lambda x, num_samples=None: defense(x, num_samples),
    }[kind]()
    merged = pd.Report.merge([shard(logits_fn, first, {"fgsm": pd.attacks.fgsm}) for first in (0, 8)])
    assert merged.row(attack="fgsm", rule="mean_prob")["num_examples"] == 16
