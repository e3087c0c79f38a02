"""Crops and flips: shifts of the image itself, from torch's random state."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from probdefense.data import augmented


def numbered(size=5, count=400):
    """Images whose pixels are all different, so that a shift can be read off."""
    x = torch.arange(1, size * size + 1).float().view(1, 1, size, size).expand(count, -1, -1, -1) / (
        size * size
    )
    return TensorDataset(x, torch.arange(count))


def test_images_are_shifted_and_mirrored_evenly():
    data = numbered()
    padded = torch.nn.functional.pad(data[0][0], [2] * 4)
    windows = {
        (top, left, flip): w.flip(-1) if flip else w
        for top in range(5)
        for left in range(5)
        for flip in (False, True)
        for w in [padded[:, top : top + 5, left : left + 5]]
    }
    seen = []
    for x, _ in (augmented(data, crop=2)[i] for i in range(len(data))):
        (found,) = [key for key, window in windows.items() if torch.equal(window, x)]
        seen.append(found)
    assert len(set(seen)) == 50, "every shift and its mirror image"
    flips = sum(flip for _, _, flip in seen)
    assert abs(flips - 200) < 4.5 * 10


def test_nothing_else_moves_and_labels_stay():
    data = numbered(count=7)
    still = augmented(data, crop=0, flip=False)
    assert len(still) == 7 and all(torch.equal(still[i][0], data[i][0]) for i in range(7))
    _, y = next(iter(DataLoader(augmented(data), batch_size=7)))
    assert y.tolist() == list(range(7))


def test_draws_are_those_of_the_random_state():
    data = augmented(numbered(count=20))
    torch.manual_seed(1)
    first = [x for x, _ in (data[i] for i in range(20))]
    torch.manual_seed(1)
    assert all(torch.equal(x, data[i][0]) for i, x in enumerate(first))
    assert not all(torch.equal(x, data[i][0]) for i, x in enumerate(first))


@pytest.mark.parametrize(
    ("call", "kind", "said"),
    [
        (lambda: augmented([1, 2].__iter__()), TypeError, "expected a map-style data set, got list_iterator"),
        (lambda: augmented(numbered(), crop=-1), ValueError, "expected crop >= 0"),
        (
            lambda: augmented(TensorDataset(torch.rand(3, 4), torch.zeros(3)))[0],
            ValueError,
            r"got \(4,\); augment images",
        ),
        (lambda: augmented([("text", 1)])[0], ValueError, "got str; augment images only"),
    ],
)
def test_what_is_no_image_is_refused(call, kind, said):
    with pytest.raises(kind, match=said):
        call()
