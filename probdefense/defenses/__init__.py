"""Builders: one paper, one file, one function from a network (or a Defense) to a Defense."""

from probdefense.core.families import MultiplicativeLogNormal
from probdefense.defenses.bayesian import bayesian, signal_to_noise
from probdefense.defenses.brelu import brelu
from probdefense.defenses.conditional_noise import conditional_noise
from probdefense.defenses.ensemble import ensemble
from probdefense.defenses.from_samples import from_samples
from probdefense.defenses.gaussian import gaussian as gaussian
from probdefense.defenses.jump_relu import jump_relu, quantiles, surrogates, tune_kappa
from probdefense.defenses.laplace import laplace
from probdefense.defenses.mc_dropout import mc_dropout
from probdefense.defenses.particles import particles
from probdefense.defenses.pni import pni
from probdefense.defenses.random_filters import random_filters
from probdefense.defenses.random_transforms import random_transforms
from probdefense.defenses.rse import rse
from probdefense.defenses.wca import wca

__all__ = [
    "MultiplicativeLogNormal",
    "bayesian",
    "brelu",
    "conditional_noise",
    "ensemble",
    "from_samples",
    "jump_relu",
    "laplace",
    "mc_dropout",
    "particles",
    "pni",
    "quantiles",
    "random_filters",
    "random_transforms",
    "rse",
    "signal_to_noise",
    "surrogates",
    "tune_kappa",
    "wca",
]
