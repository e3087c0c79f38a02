r"""Random changes of images, each a layer with a hole for its numbers and a scale, fixed or trained.

Raff et al., 2019, [Barrage of Random
Transforms](https://openaccess.thecvf.com/content_CVPR_2019/html/Raff_Barrage_of_Random_Transforms_for_Adversarially_Robust_Defense_CVPR_2019_paper.html);
Xie et al., 2018, [Mitigating Adversarial Effects Through Randomization](https://arxiv.org/abs/1711.01991),
for resizing and padding. A transform is non-centered: its latent is uniform on [-1, 1] and the change is
`scale` times that, so scale 0 is the identity, negating the latent inverts the change, and an unfilled
layer does nothing. All keep [0, 1], and all but the two that round are differentiable.
"""

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample, pad

from probdefense.nn.placeholder import Placeholder
from probdefense.nn.surgery import free_name
from probdefense.types import Inputs
from probdefense.validation import check_kind, check_positive, check_share

BLOCK = 8
"""Side of the blocks of a JPEG."""

FINEST = 1e-6
"""The smallest step of a quantization: below it single precision rounds anyway."""


class Transform(nn.Module):
    r"""One random change of images, $x \mapsto T(x, s\, u)$, $u$ uniform on [-1, 1] for every example.

    Subclasses say what the change is. It acts in ``eval()`` too.

    Args:
        scale: $s$, the largest change, in the unit that the subclass states.
        learned: Whether $s$ is trained, as $e^{\rho}$.

    Raises:
        ValueError: a negative scale, or a learned one of 0.
    """

    noise_coefficients = True  # no weight decay on these parameters, and no prior by default

    def __init__(self, scale: float, *, learned: bool = False):
        super().__init__()
        check_kind("learned", learned, bool, "give True or False")
        scale = check_positive("scale", scale, zero=not learned)
        if learned:
            self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        else:
            self.register_buffer("fixed_scale", torch.tensor(scale))
        self.u = Placeholder(dist.Uniform(-1.0, 1.0))

    @property
    def scale(self) -> Tensor:
        """The current $s$."""
        return self.log_scale.exp() if "log_scale" in self._parameters else self.fixed_scale  # type: ignore[return-value]

    def record(self) -> dict[str, Any]:
        """The arguments that make it."""
        return {"scale": float(self.scale.detach()), "learned": "log_scale" in self._parameters}

    def latent(self, x: Inputs) -> tuple[int, ...]:
        """The shape of $u$ for one image."""
        return (1,)

    def numbers(self, x: Inputs) -> Tensor:
        """$u$ for every image, ``(batch, *latent)``; zeros where nothing was filled."""
        like = x.new_zeros(()).expand(len(x), *self.latent(x))
        return self.u(like).expand(like.shape)

    def change(self, x: Inputs, u: Tensor) -> Tensor:
        """The images changed by these numbers, one row of `u` each."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it changes")

    def forward(self, x: Inputs) -> Tensor:
        """``(batch, channels, height, width)`` to the same shape."""
        return self.change(x, self.numbers(x))

    def extra_repr(self) -> str:
        return f"scale={float(self.scale.detach()):.4g}, learned={'log_scale' in self._parameters}"


class Shift(Transform):
    """Moves an image, up to `scale` of its side along each axis; what comes in is black.

    Examples:
        >>> layer, x = Shift(0.5), torch.tensor([[[[0.0, 1.0]]]])
        >>> layer.change(x, torch.tensor([[-1.0, 0.0]]))
        tensor([[[[1., 0.]]]])
    """

    def latent(self, x: Inputs) -> tuple[int, ...]:
        return (2,)

    def change(self, x: Inputs, u: Tensor) -> Tensor:
        one, zero = torch.ones_like(u[:, 0]), torch.zeros_like(u[:, 0])
        right, down = (-2 * self.scale * u).unbind(1)
        return _read(x, (one, zero, right), (zero, one, down))


class Rotation(Transform):
    """Turns an image about its center, up to `scale` degrees; corners that come in are black.

    Examples:
        >>> x = torch.tensor([[[[0.0, 1.0], [0.0, 0.0]]]])
        >>> Rotation(90.0).change(x, torch.ones(1, 1)).round().abs()  # counterclockwise
        tensor([[[[1., 0.],
                  [0., 0.]]]])
    """

    def change(self, x: Inputs, u: Tensor) -> Tensor:
        angle = (self.scale * u[:, 0]).deg2rad()
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
        tall = x.shape[-2] / x.shape[-1]
        return _read(x, (cos, -sin * tall, zero), (sin / tall, cos, zero))


class Zoom(Transform):
    r"""Magnifies an image about its center by $e^{s u}$.

    Examples:
        >>> x = torch.rand(1, 1, 4, 4)
        >>> torch.allclose(Zoom(0.0).change(x, torch.ones(1, 1)), x)
        True
    """

    def change(self, x: Inputs, u: Tensor) -> Tensor:
        factor = (-self.scale * u[:, 0]).exp()
        zero = torch.zeros_like(factor)
        return _read(x, (factor, zero, zero), (zero, factor, zero))


class _Framed(Transform):
    """A frame of $1 - s |u_0|$ of the image, at a random place within it."""

    def __init__(self, scale: float, *, learned: bool = False):
        super().__init__(check_share("scale", scale, ends="[)"), learned=learned)

    def latent(self, x: Inputs) -> tuple[int, ...]:
        return (3,)

    def frame(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Side and center of the frame, and a zero."""
        side = 1 - self.scale.clamp_max(0.99) * u[:, 0].abs()
        return side, (1 - side) * u[:, 1], (1 - side) * u[:, 2], torch.zeros_like(side)


class ResizePad(_Framed):
    """Shrinks an image, by up to `scale` of its side, and pads it with black to its size at a random place.

    Examples:
        >>> shrunk = ResizePad(0.5).change(torch.ones(1, 1, 4, 4), torch.tensor([[1.0, -1.0, -1.0]]))
        >>> shrunk[0, 0]  # to the upper left
        tensor([[1., 1., 0., 0.],
                [1., 1., 0., 0.],
                [0., 0., 0., 0.],
                [0., 0., 0., 0.]])
    """

    def change(self, x: Inputs, u: Tensor) -> Tensor:
        side, right, down, zero = self.frame(u)
        return _read(x, (1 / side, zero, -right / side), (zero, 1 / side, -down / side))


class Crop(_Framed):
    """Cuts out a window, smaller by up to `scale` of the side, and enlarges it: the inverse of `ResizePad`.

    Examples:
        >>> x = torch.tensor([[[[0.0, 0.0, 1.0, 1.0]] * 4]])
        >>> Crop(0.5).change(x, torch.tensor([[1.0, 1.0, 0.0]]))[0, 0, 0]  # the right half
        tensor([0.7500, 1.0000, 1.0000, 1.0000])
    """

    def change(self, x: Inputs, u: Tensor) -> Tensor:
        side, right, down, zero = self.frame(u)
        return _read(x, (side, zero, right), (zero, side, down), beyond="border")


class Color(Transform):
    r"""Lightens or darkens every channel: its odds $x / (1 - x)$ become $e^{s u}$ times as large.

    Black and white stay, so nothing has to be clipped.

    Examples:
        >>> layer, x = Color(math.log(3.0)), torch.tensor([[[[0.0, 0.5, 1.0]]]])
        >>> layer.change(x, torch.ones(1, 1))
        tensor([[[[0.0000, 0.7500, 1.0000]]]])
    """

    def latent(self, x: Inputs) -> tuple[int, ...]:
        return (x.shape[1],)

    def change(self, x: Inputs, u: Tensor) -> Tensor:
        odds = (self.scale * u).exp()[..., None, None]
        return x * odds / (1 + x * (odds - 1))


class Blur(Transform):
    r"""Gaussian blur of standard deviation $s |u|$ pixels, cut at 2 pixels; edges are repeated.

    Examples:
        >>> x = torch.tensor([[[[0.0, 1.0, 0.0, 0.0, 0.0]]]])
        >>> round(float(Blur(1.0).change(x, torch.ones(1, 1)).max()), 3)
        0.403
    """

    def change(self, x: Inputs, u: Tensor) -> Tensor:
        away = torch.arange(-2, 3, dtype=x.dtype, device=x.device)
        variance = (self.scale * u).square() + FINEST  # (batch, 1)
        weights = (-away.square() / (2 * variance)).softmax(1)[:, None, None, None, :]
        wide = (pad(x, (2, 2, 2, 2), mode="replicate").unfold(-1, 5, 1) * weights).sum(-1)
        return (wide.unfold(-2, 5, 1) * weights).sum(-1)


class PixelNoise(Transform):
    r"""Normal noise of standard deviation `scale` on every pixel, clipped to [0, 1].

    Examples:
        >>> layer, x = PixelNoise(0.25), torch.tensor([[[[0.5, 0.9]]]])
        >>> layer.change(x, torch.ones(1, 1, 1, 2))
        tensor([[[[0.7500, 1.0000]]]])
    """

    def __init__(self, scale: float, *, learned: bool = False):
        super().__init__(scale, learned=learned)
        self.u = Placeholder(dist.Normal(0.0, 1.0))

    def latent(self, x: Inputs) -> tuple[int, ...]:
        return tuple(x.shape[1:])

    def change(self, x: Inputs, u: Tensor) -> Tensor:
        return torch.addcmul(x, self.scale, u).clamp(0.0, 1.0)


class Rounding(nn.Module):
    """Rounds to whole numbers, with the derivative that rounding has: 0.

    An attack goes past it by ``bpda`` with the surrogate that it declares.

    Examples:
        >>> Rounding()(torch.tensor([0.4, 0.6]))
        tensor([0., 1.])
    """

    def surrogate(self, z: Tensor) -> Tensor:
        """What to differentiate in its place: the identity."""
        return z

    def forward(self, z: Tensor) -> Tensor:
        """Elementwise."""
        return z.round()


class _Quantized(Transform):
    """A transform that rounds; a scale inside rounding has no gradient, so none is trained."""

    def __init__(self, scale: float):
        super().__init__(scale)
        self.rounding = Rounding()

    def record(self) -> dict[str, Any]:
        return {"scale": float(self.scale)}


class BitDepth(_Quantized):
    """Rounds pixels to a random number of equal steps from 0 to 1, the coarsest of about `scale`.

    Its derivative is 0: see `probdefense.defenses.surrogates`.

    Examples:
        >>> BitDepth(0.5).change(torch.tensor([[[[0.1, 0.3, 0.8]]]]), torch.ones(1, 1))
        tensor([[[[0.0000, 0.5000, 1.0000]]]])
    """

    def change(self, x: Inputs, u: Tensor) -> Tensor:
        step = (self.scale * u).abs().clamp_min(FINEST)[..., None, None]
        levels = (1 / step).round().clamp_min(1.0)
        return self.rounding(x * levels) / levels


class Jpeg(_Quantized):
    r"""Rounds the cosine coefficients of 8x8 blocks, as a JPEG does.

    The coefficient of frequencies $i, j$ is rounded to multiples of $s |u| (1 + i + j)$, and the result is
    clipped to [0, 1]. There is no chroma and no table of a standard. Its derivative is 0: see
    `probdefense.defenses.surrogates`.

    Examples:
        >>> x = torch.full((1, 1, 8, 8), 0.26)  # whose one coefficient is 8 * 0.26
        >>> bool(torch.isclose(Jpeg(2.0).change(x, torch.ones(1, 1)), torch.tensor(0.25)).all())
        True
    """

    basis: Tensor
    steps: Tensor

    def __init__(self, scale: float):
        super().__init__(scale)
        k = torch.arange(BLOCK, dtype=torch.float64)
        basis = torch.cos((2 * k + 1) * k[:, None] * math.pi / (2 * BLOCK)) * (2 / BLOCK) ** 0.5
        basis[0] /= 2**0.5
        self.register_buffer("basis", basis.to(torch.get_default_dtype()), persistent=False)
        self.register_buffer("steps", (1 + k + k[:, None]).to(basis.dtype).float(), persistent=False)

    def change(self, x: Inputs, u: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        whole = pad(x, (0, -width % BLOCK, 0, -height % BLOCK), mode="replicate")
        blocks = whole.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK)).transpose(-3, -2)
        step = (self.scale * u).abs()[..., None, None, None, None] * self.steps
        step = step.clamp_min(FINEST)
        rough = self.rounding(self.basis @ blocks @ self.basis.T / step) * step
        pixels = (self.basis.T @ rough @ self.basis).transpose(-3, -2).flatten(-2).flatten(-3, -2)
        return pixels[..., :height, :width].clamp(0.0, 1.0)


class RandomTransforms(nn.Module):
    r"""Some of several transforms, in a random order, each with numbers of its own for every example.

    Unfilled it is the identity.

    Args:
        transforms: What may be applied.
        count: How many are, to each image.

    Examples:
        >>> RandomTransforms([Shift(0.1), Color(0.5)], count=1)(torch.ones(1, 1, 2, 2))[0, 0]
        tensor([[1., 1.],
                [1., 1.]])
    """

    function_settings = ("count",)

    def __init__(self, transforms: list[Transform], count: int):
        super().__init__()
        self.count = count
        for transform in transforms:
            self.add_module(free_name(self, type(transform).__name__.lower()), transform)
        self.order = Placeholder(dist.Uniform(0.0, 1.0))

    def forward(self, x: Inputs) -> Tensor:
        """``(batch, channels, height, width)`` to the same shape."""
        if x.dim() != 4:
            raise ValueError(
                f"expected images (batch, channels, height, width), got shape {tuple(x.shape)}; only images "
                "can be transformed"
            )
        transforms = [child for child in self.children() if isinstance(child, Transform)]
        numbers = [transform.numbers(x) for transform in transforms]
        order = self.order(x.new_zeros(()).expand(len(x), len(transforms)))
        if order.dim() == 0 or len(x) == 0:
            return x
        turns = order.expand(len(x), -1).argsort(1)[:, : self.count]
        for turn in turns.unbind(1):
            x = _each_its_own(x, turn, [t.change for t in transforms], numbers)
        return x


def _each_its_own(
    x: Inputs, turn: Tensor, changes: list[Callable[[Tensor, Tensor], Tensor]], numbers: list[Tensor]
) -> Tensor:
    """Every image changed by the transform whose turn it is, images of one transform together."""
    kinds = torch.arange(len(changes), device=turn.device)
    counts = (turn == kinds[:, None]).sum(1)
    sizes = [int(count) for count in counts]  # vmap refuses this, and then draws are taken one by one
    rows = turn.argsort()
    parts = [
        change(x[of], u[of])
        for change, u, of in zip(changes, numbers, rows.split(sizes), strict=True)
        if len(of)
    ]
    return torch.cat(parts)[rows.argsort()]


def _read(x: Inputs, across: tuple[Tensor, ...], down: tuple[Tensor, ...], beyond: str = "zeros") -> Tensor:
    """The image that shows at each place what `x` has at an affine function of it, bilinear.

    Coordinates go from -1 to 1 across the image.
    """
    matrix = torch.stack([torch.stack(across, dim=1), torch.stack(down, dim=1)], dim=1)
    grid = affine_grid(matrix, list(x.shape), align_corners=False)
    return grid_sample(x, grid, padding_mode=beyond, align_corners=False)
