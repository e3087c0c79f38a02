"""The networks of the papers, in pixels: each normalizes inside if it normalizes at all."""

from probdefense.models.residual import preact_resnet18, resnet, resnet18, resnet20, resnext29, wide_resnet
from probdefense.models.small import cohen_lenet, lenet, madry_cnn, small_cnn, strided_cnn
from probdefense.models.vgg import model_a, vgg16
from probdefense.models.weights import load_weights

__all__ = [
    "cohen_lenet",
    "lenet",
    "load_weights",
    "madry_cnn",
    "model_a",
    "preact_resnet18",
    "resnet",
    "resnet18",
    "resnet20",
    "resnext29",
    "small_cnn",
    "strided_cnn",
    "vgg16",
    "wide_resnet",
]
