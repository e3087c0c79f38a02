r"""Random input transforms: some of several changes of the image, in a random order.

Raff et al., 2019, [Barrage of Random Transforms for Adversarially Robust
Defense](https://openaccess.thecvf.com/content_CVPR_2019/html/Raff_Barrage_of_Random_Transforms_for_Adversarially_Robust_Defense_CVPR_2019_paper.html).
The numbers of every transform are sites drawn for each example, and the image is read by interpolation, so
that an attack sees the derivative of the very draw that it meets. Sitawarin et al., 2022, [Demystifying
the Adversarial Robustness of Random Transformation Defenses](https://arxiv.org/abs/2207.03574), take
most of what the paper claims by such gradients, many draws and momentum.
"""

import copy
import math
from collections.abc import Sequence

from torch import nn

from probdefense.core.defense import Defense
from probdefense.core.registry import builder, recordable
from probdefense.defenses.host import device_and_dtype, host
from probdefense.nn import transforms as kinds
from probdefense.nn.surgery import insert_at_input
from probdefense.nn.transforms import RandomTransforms, Transform
from probdefense.validation import check_count, check_kind

KINDS = (
    kinds.Shift,
    kinds.Rotation,
    kinds.Zoom,
    kinds.ResizePad,
    kinds.Crop,
    kinds.Color,
    kinds.Blur,
    kinds.PixelNoise,
    kinds.BitDepth,
    kinds.Jpeg,
)
for kind in KINDS:
    recordable(kind)


@builder
def random_transforms(
    net: nn.Module,
    transforms: Sequence[Transform] | None = None,
    *,
    count: int | None = None,
    num_data: int | None = None,
) -> Defense:
    r"""Changes every image by `count` of the transforms, in a random order, before the network sees it.

    The default suits small images: ``Shift(0.1)``, ``Rotation(10.0)``, ``Zoom(0.1)``, ``ResizePad(0.2)``,
    ``Crop(0.2)``, ``Color(0.5)``, ``Blur(0.7)`` and ``PixelNoise(0.05)``, four of them at a time.
    ``BitDepth`` and ``Jpeg`` are not among them, as their derivative is 0 and hides that of the others:
    attack what has them by `bpda` with `surrogates`.

    Args:
        net: A network or a `Defense` on images ``(batch, channels, height, width)`` in [0, 1]; it is
            copied, parameters keep their names.
        transforms: Of ``probdefense.nn.transforms``; copied. Scales are fixed or trained (``learned=True``).
        count: How many are applied to each image; half of them, rounded up, by default.
        num_data: Size of the training set; not needed, as the transforms have no KL.

    Returns:
        A `Defense` with a site for every transform and one for their order.

    Raises:
        ValueError: no transforms, or more to apply than there are.

    References:
        Raff et al., 2019, [Barrage of Random
        Transforms](https://openaccess.thecvf.com/content_CVPR_2019/html/Raff_Barrage_of_Random_Transforms_for_Adversarially_Robust_Defense_CVPR_2019_paper.html),
        whose transforms were attacked by learned stand-ins, so what gradients of their own take was open;
        Xie et al., 2018, [Mitigating Adversarial Effects Through
        Randomization](https://arxiv.org/abs/1711.01991)

    Examples:
        >>> import probdefense as pd
        >>> T = pd.nn.transforms
        >>> list(random_transforms(pd.models.small_cnn(), [T.Shift(0.1), T.Color(0.5)]).sites)
        ['transforms.shift', 'transforms.color', 'transforms']
    """
    chosen = _defaults() if transforms is None else _checked(transforms)
    count = math.ceil(len(chosen) / 2) if count is None else check_count("count", count)
    if count > len(chosen):
        raise ValueError(f"expected count of at most the {len(chosen)} transforms, got {count}; lower it")
    net, sites, num_data = host(net, num_data)
    layer = RandomTransforms(chosen, count).to(device_and_dtype(net, sites))
    insert_at_input(net, "transforms", layer)
    return Defense.from_sites(net, sites, num_data)


def _defaults() -> list[Transform]:
    return [
        kinds.Shift(0.1),
        kinds.Rotation(10.0),
        kinds.Zoom(0.1),
        kinds.ResizePad(0.2),
        kinds.Crop(0.2),
        kinds.Color(0.5),
        kinds.Blur(0.7),
        kinds.PixelNoise(0.05),
    ]


def _checked(transforms: Sequence[Transform]) -> list[Transform]:
    way = "give some of probdefense.nn.transforms, such as [Shift(0.1)]"
    check_kind("transforms", transforms, (list, tuple, nn.ModuleList), way)
    for transform in transforms:
        check_kind("every transform", transform, Transform, way)
    if not len(transforms):
        raise ValueError(f"expected transforms, got none; {way}")
    return [copy.deepcopy(transform) for transform in transforms]
