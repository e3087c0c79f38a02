"""Random changes of the input: what each does, that all keep the box, and what an attack sees of them."""

import math

import pytest
import torch
from torch import nn

import probdefense as pd
from probdefense.nn import transforms as kinds
from tests.worlds import tiny_batch, tiny_net

ALL = {
    "shift": kinds.Shift(0.3),
    "rotation": kinds.Rotation(40.0),
    "zoom": kinds.Zoom(0.5),
    "resize and pad": kinds.ResizePad(0.5),
    "crop": kinds.Crop(0.5),
    "color": kinds.Color(2.0),
    "blur": kinds.Blur(1.5),
    "noise": kinds.PixelNoise(0.5),
    "bit depth": kinds.BitDepth(0.4),
    "jpeg": kinds.Jpeg(0.2),
}
ROUNDING = {"bit depth", "jpeg"}
every_kind = pytest.mark.parametrize("name", ALL)
smooth_kinds = pytest.mark.parametrize("name", [name for name in ALL if name not in ROUNDING])


def images(count=4, channels=2, height=6, width=6):
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(0))


def numbers(transform, x, seed=1):
    """What its site would supply."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(len(x), *transform.latent(x), generator=generator) - 1


def scaled(name, scale):
    return type(ALL[name])(scale)


@every_kind
@pytest.mark.parametrize("shape", [(4, 2, 6, 6), (3, 1, 5, 9), (2, 3, 16, 11)])
def test_scale_zero_and_no_numbers_are_the_identity(name, shape):
    x = images(*shape)
    none = scaled(name, 0.0)
    torch.testing.assert_close(none.change(x, numbers(none, x)), x, rtol=0.0, atol=5e-6)
    torch.testing.assert_close(ALL[name](x), x, rtol=0.0, atol=5e-6)


@every_kind
@pytest.mark.parametrize("shape", [(4, 2, 6, 6), (3, 1, 5, 9)])
def test_the_box_and_the_shape_are_kept(name, shape):
    for x in (images(*shape), images(*shape).round(), torch.ones(shape), torch.zeros(shape)):
        changed = ALL[name].change(x, numbers(ALL[name], x))
        assert changed.shape == x.shape
        assert bool(torch.isfinite(changed).all())
        assert float(changed.min()) >= -1e-6 and float(changed.max()) <= 1 + 1e-6
    assert not torch.allclose(
        ALL[name].change(images(*shape), numbers(ALL[name], images(*shape))), images(*shape)
    )


def inner(x):
    return x[..., 2:4, 2:4]


def test_exact_cases():
    x, one = images(), torch.ones(4, 1)
    turned = kinds.Rotation(90.0).change(x, one)
    torch.testing.assert_close(turned, x.rot90(1, (2, 3)), rtol=0.0, atol=1e-5)
    torch.testing.assert_close(kinds.Rotation(180.0).change(x, one), x.flip(2, 3), rtol=0.0, atol=1e-5)
    moved = kinds.Shift(1 / 3).change(x, torch.tensor([[1.0, -0.5]]).expand(4, 2))  # 2 right, 1 up
    expected = torch.zeros_like(x)
    expected[..., :5, 2:] = x[..., 1:, :4]
    torch.testing.assert_close(moved, expected, rtol=0.0, atol=1e-5)
    halved = kinds.Zoom(math.log(2.0)).change(x, -one)
    pooled = nn.functional.avg_pool2d(x[..., :, :], 2)
    padded = kinds.ResizePad(0.5).change(x, torch.tensor([[1.0, 0.0, 0.0]]).expand(4, 3))
    torch.testing.assert_close(halved, padded, rtol=0.0, atol=1e-5)
    corner = kinds.ResizePad(0.5).change(x, torch.tensor([[-1.0, -1.0, 1.0]]).expand(4, 3))  # left and low
    torch.testing.assert_close(corner[..., 3:, :3], pooled, rtol=0.0, atol=1e-5)
    assert not corner[..., :3, :].any() and not corner[..., 3:].any()


@pytest.mark.parametrize("name", ["color"])
def test_negated_numbers_invert(name):
    transform, x = ALL[name], images()
    u = numbers(transform, x)
    torch.testing.assert_close(transform.change(transform.change(x, u), -u), x)


def test_inverses_of_what_is_read_between_pixels():
    """Where no pixel is interpolated or lost, negated numbers invert; a crop is the inverse of a padding."""
    x = images(height=8, width=8)
    for transform, u in (
        (kinds.Shift(0.25), torch.tensor([[1.0, -1.0]])),
        (kinds.Rotation(90.0), torch.ones(1, 1)),
    ):
        u = u.expand(4, -1)
        there_and_back = transform.change(transform.change(x, u), -u)
        torch.testing.assert_close(there_and_back[..., 2:6, 2:6], x[..., 2:6, 2:6], rtol=0.0, atol=1e-5)
    wide = nn.functional.interpolate(images(height=4, width=4), scale_factor=2.0, mode="nearest")
    u = torch.tensor([[1.0, 0.0, 0.0]]).expand(4, 3)
    back = kinds.Crop(0.5).change(kinds.ResizePad(0.5).change(wide, u), u)
    smooth = torch.full_like(wide, 0.4)
    kept = kinds.Crop(0.5).change(kinds.ResizePad(0.5).change(smooth, u), u)
    torch.testing.assert_close(inner(kept), inner(smooth), rtol=0.0, atol=1e-5)
    assert float((back - wide).abs().mean()) < 0.3


def test_blur_is_the_normalized_gaussian():
    x = torch.zeros(1, 1, 9, 9)
    x[..., 4, 4] = 1.0
    blurred = kinds.Blur(1.0).change(x, torch.ones(1, 1))[0, 0]
    row = torch.exp(-torch.arange(-2.0, 3.0).square() / 2)
    row = row / row.sum()
    torch.testing.assert_close(blurred[2:7, 2:7], torch.outer(row, row), rtol=1e-4, atol=1e-6)
    assert float(blurred.sum()) == pytest.approx(1.0)
    assert torch.equal(
        kinds.Blur(1.0).change(x, -torch.ones(1, 1)), kinds.Blur(1.0).change(x, torch.ones(1, 1))
    )


def test_jpeg_rounds_the_cosine_coefficients():
    x, scale = images(1, 1, 8, 8), 0.3
    k = torch.arange(8, dtype=torch.float64)
    cosines = torch.cos((2 * k + 1) * k[:, None] * math.pi / 16)
    cosines[0] /= math.sqrt(2)
    coefficients = cosines @ x[0, 0].double() @ cosines.T / 4
    step = scale * (1 + k + k[:, None])
    rough = (coefficients / step).round() * step
    expected = (cosines.T @ rough @ cosines / 4).clamp(0, 1)
    found = kinds.Jpeg(scale).change(x, torch.ones(1, 1))[0, 0].double()
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-5)


@smooth_kinds
def test_the_derivative_is_that_of_the_draw(name, float64):
    transform = type(ALL[name])(float(ALL[name].scale), learned=True).double()
    x = 0.2 + 0.6 * images(2, 1, 4, 4).double()
    u = 0.3 * numbers(transform, x).double()
    torch.autograd.gradcheck(transform.change, (x.requires_grad_(), u), atol=1e-4)
    transform.change(x, u).square().sum().backward()
    assert float(transform.log_scale.grad.abs()) > 0


@pytest.mark.parametrize("name", sorted(ROUNDING))
def test_rounding_has_no_gradient_and_declares_what_to_take_instead(name):
    defense = pd.defenses.random_transforms(tiny_net(), [ALL[name]]).eval()
    x, y = tiny_batch()

    def slope():
        point = x.clone().requires_grad_()
        torch.manual_seed(0)
        logits = defense(point, num_samples=4)
        return logits.detach(), torch.autograd.grad(logits.square().sum(), point)[0]

    before, nothing = slope()
    assert not nothing.any()
    smooth = pd.defenses.surrogates(defense)
    assert [key.rpartition(".")[2] for key in smooth] == ["rounding"]
    with pd.attacks.bpda(defense, smooth):
        after, found = slope()
        x_adv = pd.attacks.pgd(defense, x, y, eps=0.1, num_steps=2, seed=0)
    torch.testing.assert_close(after, before)
    assert float(found.abs().flatten(1).amax(1).min()) > 0
    assert float((x_adv - x).abs().max()) == pytest.approx(0.1, abs=1e-5)


def test_every_image_gets_its_own_subset_in_its_own_order():
    transforms = [kinds.Shift(0.5), kinds.Color(1.0), kinds.Blur(1.0)]
    layer = kinds.RandomTransforms(transforms, count=2)
    x = images(6)
    order = torch.tensor(
        [[0.1, 0.2, 0.9], [0.2, 0.1, 0.9], [0.9, 0.2, 0.1], [0.9, 0.1, 0.2]] + [[0.3, 0.9, 0.1]] * 2
    )
    u = [numbers(transform, x, seed) for seed, transform in enumerate(transforms)]
    filled = {"order.value": order}
    filled |= {f"{name}.u.value": each for name, each in zip(("shift", "color", "blur"), u, strict=True)}
    found = torch.func.functional_call(layer, filled, x)
    for row, turns in enumerate([(0, 1), (1, 0), (2, 1), (1, 2), (2, 0), (2, 0)]):
        image = x[row : row + 1]
        for turn in turns:
            image = transforms[turn].change(image, u[turn][row : row + 1])
        torch.testing.assert_close(found[row : row + 1], image)


def test_how_many_are_applied():
    defense, x = pd.defenses.random_transforms(tiny_net()), tiny_batch()[0]
    assert defense.net.transforms.count == 4 and len(defense.sites) == 9
    draws = defense.draw(x)
    assert draws["transforms"].shape == (6, 8) and draws["transforms.shift"].shape == (6, 2)
    assert defense.input_noise is None
    with pytest.raises(ValueError, match="no certificate"):
        pd.certify(defense, x)


def test_a_certificate_counts_on_noise_before_the_transforms_only():
    before = pd.defenses.rse(pd.defenses.random_transforms(tiny_net()), sigma_init=0.3)
    assert before.input_noise[0] == "normal"
    behind = pd.defenses.random_transforms(pd.defenses.rse(tiny_net(), sigma_init=0.3))
    assert behind.input_noise is None


def test_scales_may_be_trained_and_given_layers_stay_as_they_are():
    given = kinds.Shift(0.2, learned=True)
    defense = pd.defenses.random_transforms(tiny_net(), [given, given])
    assert list(defense.sites) == ["transforms.shift", "transforms.shift_1", "transforms"]
    assert defense.net.transforms.shift is not given
    groups = defense.param_groups(weight_decay=0.1)
    assert any(p is defense.net.transforms.shift.log_scale for p in groups[1]["params"])


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (([],), ValueError, "got none"),
        (([nn.ReLU()],), TypeError, "every transform as Transform"),
        (("shift",), TypeError, "transforms as list"),
    ],
)
def test_what_are_no_transforms_is_refused(arguments, error, said):
    with pytest.raises(error, match=said):
        pd.defenses.random_transforms(tiny_net(), *arguments)


def test_more_of_what_is_refused():
    with pytest.raises(ValueError, match="at most the 1 transforms"):
        pd.defenses.random_transforms(tiny_net(), [kinds.Shift(0.1)], count=2)
    with pytest.raises(ValueError, match="scale > 0"):
        kinds.Shift(0.0, learned=True)
    with pytest.raises(ValueError, match=r"scale in \[0, 1\)"):
        kinds.Crop(1.0)
    with pytest.raises(ValueError, match="images"):
        pd.defenses.random_transforms(nn.Linear(4, 3))(torch.rand(2, 4))
