"""How many draws share a forward pass: a model of one number, and the measurements that it rests on.

A pass of its own for every draw costs a fixed overhead per layer; one pass for many draws falls out of the
cache as soon as its widest layer does. So many draws are taken at once as keep the widest layer of all
images, rows times draws, within `LAYER_BYTES`, whether they are folded into the batch or mapped over. One
thing more shows in the table below: mapping over the weights of two or three draws does not pay.
"""

from typing import NamedTuple

LAYER_BYTES = 3_000_000
"""What the widest layer of one pass may take."""


class Row(NamedTuple):
    """CPU milliseconds per draw of one thread, by the number of draws in a pass, out of 16 draws."""

    net: str
    random: str
    widest: int
    batch: int
    cost: dict[int, float]


CNN, RESNET, MLP = 28 * 28 * 32 * 4, 32 * 32 * 16 * 4, 28 * 28 * 4
"""Bytes per image of the widest layer of three networks: 100,000, 270,000 and 270,000 parameters."""

TABLE = (
    Row("CNN", "shared noise", CNN, 1, {1: 1.166, 2: 0.955, 4: 0.725, 16: 0.664}),
    Row("CNN", "shared noise", CNN, 2, {1: 1.714, 2: 1.282, 4: 1.059, 16: 1.148}),
    Row("CNN", "shared noise", CNN, 4, {1: 2.343, 2: 1.912, 4: 1.880, 16: 2.410}),
    Row("CNN", "shared noise", CNN, 8, {1: 3.710, 2: 3.446, 4: 3.468, 16: 4.425}),
    Row("CNN", "shared noise", CNN, 16, {1: 6.208, 2: 6.103, 4: 5.810, 16: 7.790}),
    Row("CNN", "shared noise", CNN, 32, {1: 11.452, 2: 11.617, 4: 11.467, 16: 18.604}),
    Row("CNN", "shared noise", CNN, 64, {1: 22.134, 2: 23.146, 4: 30.804}),
    Row("CNN", "shared noise", CNN, 128, {1: 42.809, 2: 65.070, 4: 74.339}),
    Row("CNN", "fresh noise", CNN, 1, {1: 1.100, 2: 0.870, 4: 0.637, 16: 0.582}),
    Row("CNN", "fresh noise", CNN, 2, {1: 1.744, 2: 1.264, 4: 1.030, 16: 1.146}),
    Row("CNN", "fresh noise", CNN, 4, {1: 2.558, 2: 2.070, 4: 1.952, 16: 2.636}),
    Row("CNN", "fresh noise", CNN, 8, {1: 4.137, 2: 3.740, 4: 3.893, 16: 4.935}),
    Row("CNN", "fresh noise", CNN, 16, {1: 7.817, 2: 7.230, 4: 6.949, 16: 8.777}),
    Row("CNN", "fresh noise", CNN, 32, {1: 14.444, 2: 13.971, 4: 13.560, 16: 20.482}),
    Row("CNN", "fresh noise", CNN, 128, {1: 54.993, 2: 71.619, 4: 82.131}),
    Row("CNN", "weights", CNN, 1, {1: 1.333, 2: 1.491, 4: 1.163, 16: 0.940}),
    Row("CNN", "weights", CNN, 2, {1: 1.850, 2: 1.887, 4: 1.592, 16: 1.349}),
    Row("CNN", "weights", CNN, 4, {1: 2.455, 2: 2.476, 4: 2.179, 16: 2.066}),
    Row("CNN", "weights", CNN, 8, {1: 3.798, 2: 3.820, 4: 3.591, 16: 3.556}),
    Row("CNN", "weights", CNN, 16, {1: 6.081, 2: 6.739, 4: 6.547, 16: 7.830}),
    Row("CNN", "weights", CNN, 32, {1: 12.405, 2: 14.460, 4: 14.106, 16: 19.968}),
    Row("CNN", "weights", CNN, 128, {1: 40.656, 2: 51.383, 4: 67.696}),
    Row("MLP", "shared noise", MLP, 1, {1: 0.401, 2: 0.241, 4: 0.165, 16: 0.095}),
    Row("MLP", "shared noise", MLP, 8, {1: 0.482, 2: 0.347, 4: 0.235, 16: 0.164}),
    Row("MLP", "shared noise", MLP, 32, {1: 0.655, 2: 0.513, 4: 0.392, 16: 0.336}),
    Row("MLP", "shared noise", MLP, 64, {1: 0.849, 2: 0.709, 4: 0.615}),
    Row("MLP", "shared noise", MLP, 128, {1: 1.183, 2: 1.157, 4: 1.059}),
    Row("MLP", "fresh noise", MLP, 1, {1: 0.354, 2: 0.195, 4: 0.118, 16: 0.044}),
    Row("MLP", "fresh noise", MLP, 8, {1: 0.456, 2: 0.329, 4: 0.204, 16: 0.135}),
    Row("MLP", "fresh noise", MLP, 32, {1: 0.780, 2: 0.599, 4: 0.478, 16: 0.414}),
    Row("MLP", "fresh noise", MLP, 128, {1: 1.798, 2: 1.651, 4: 1.573}),
    Row("MLP", "weights", MLP, 1, {1: 1.586, 2: 1.670, 4: 1.535, 16: 1.416}),
    Row("MLP", "weights", MLP, 8, {1: 1.646, 2: 1.743, 4: 1.630, 16: 1.506}),
    Row("MLP", "weights", MLP, 16, {1: 1.830, 2: 1.691, 4: 1.677, 16: 1.826}),
    Row("MLP", "weights", MLP, 64, {1: 1.774, 2: 1.828, 4: 1.742}),
    Row("MLP", "weights", MLP, 128, {1: 2.188, 2: 2.240, 4: 2.061}),
    Row("ResNet-20", "shared noise", RESNET, 1, {1: 5.452, 2: 4.231, 4: 3.242, 16: 2.417}),
    Row("ResNet-20", "shared noise", RESNET, 2, {1: 7.365, 2: 5.530, 4: 4.444, 16: 3.715}),
    Row("ResNet-20", "shared noise", RESNET, 4, {1: 9.335, 2: 7.877, 4: 7.104, 16: 6.212}),
    Row("ResNet-20", "shared noise", RESNET, 8, {1: 14.781, 2: 14.072, 4: 12.809, 16: 13.542}),
    Row("ResNet-20", "shared noise", RESNET, 16, {1: 24.624, 2: 24.559}),
    Row("ResNet-20", "shared noise", RESNET, 32, {1: 43.071, 2: 46.906}),
    Row("ResNet-20", "shared noise", RESNET, 64, {1: 86.818, 2: 107.833}),
    Row("ResNet-20", "fresh noise", RESNET, 1, {1: 5.096, 2: 3.777, 4: 2.717, 16: 2.036}),
    Row("ResNet-20", "fresh noise", RESNET, 2, {1: 7.456, 2: 5.503, 4: 4.652, 16: 3.836}),
    Row("ResNet-20", "fresh noise", RESNET, 4, {1: 12.640, 2: 10.398, 4: 9.085, 16: 8.288}),
    Row("ResNet-20", "fresh noise", RESNET, 8, {1: 20.610, 2: 18.441, 4: 16.765, 16: 17.794}),
    Row("ResNet-20", "fresh noise", RESNET, 16, {1: 35.201, 2: 32.219}),
    Row("ResNet-20", "fresh noise", RESNET, 32, {1: 68.520, 2: 67.253}),
    Row("ResNet-20", "weights", RESNET, 1, {1: 5.121, 2: 5.861, 4: 4.470, 16: 3.303}),
    Row("ResNet-20", "weights", RESNET, 2, {1: 6.789, 2: 7.177, 4: 5.763, 16: 4.562}),
    Row("ResNet-20", "weights", RESNET, 4, {1: 8.876, 2: 9.856, 4: 8.102, 16: 7.300}),
)
"""Measured on two shared cores of an x86 server, the numbers of draws taking turns, medians of 2 to 5."""


FEWEST = 4
"""Mapping over the weights of fewer draws than this costs more than a pass for each."""


def draws_at_once(batch: int, widest: int, weights: bool = False) -> int:
    """How many draws of `batch` rows share a pass of a network whose widest layer takes `widest` bytes.

    With `weights` every draw has weights of its own.
    """
    count = max(1, LAYER_BYTES // (max(1, widest) * batch))
    return 1 if weights and count < FEWEST else count
