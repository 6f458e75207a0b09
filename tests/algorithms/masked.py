"""A small model for MaskDiT, and runs of it."""

from tests.helpers import fit as fit_any
from tests.helpers import tiny_dit, weights
from tread_composer.latent_diffusion import LatentDiffusion
from tread_composer.objectives import EDM

SMALL = {'decoder_depth': 2, 'decoder_hidden_size': 8, 'decoder_num_heads': 2}


def edm_model(objective=None, depth=6):
    return LatentDiffusion(tiny_dit(depth), objective or EDM(), latent_shape=(1, 8, 8), num_classes=10)


def fit(*algorithms, **keywords):
    return fit_any(algorithms, **{'model': edm_model(), **keywords})


def run(*algorithms, **keywords):
    trainer, recorder = fit(*algorithms, **keywords)
    return recorder.losses, weights(trainer), recorder.batches
