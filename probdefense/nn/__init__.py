"""Layers of a defended network, and the surgery that puts them into a trained one."""

from probdefense.nn import transforms
from probdefense.nn.brelu import BReLU
from probdefense.nn.conditional_noise import ConditionalNoise
from probdefense.nn.correlated_noise import CorrelatedNoise
from probdefense.nn.dropout import MaskedDropout
from probdefense.nn.jump_relu import JumpReLU, MarginalJumpReLU, smoothed_jump
from probdefense.nn.noise import Noise
from probdefense.nn.normalize import Normalize
from probdefense.nn.relative_noise import RelativeNoise
from probdefense.nn.two_logits import TwoLogits

__all__ = [
    "BReLU",
    "ConditionalNoise",
    "CorrelatedNoise",
    "JumpReLU",
    "MarginalJumpReLU",
    "MaskedDropout",
    "Noise",
    "Normalize",
    "RelativeNoise",
    "TwoLogits",
    "smoothed_jump",
    "transforms",
]
