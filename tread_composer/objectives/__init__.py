"""What a denoiser learns, and the equation that turns noise into data with it (``protocols.Objective``)."""

from tread_composer.objectives.ddpm import DDPM
from tread_composer.objectives.edm import EDM
from tread_composer.objectives.flow_matching import FlowMatching
from tread_composer.objectives.timesteps import CosMap, DiscreteUniform, LogitNormal, Mode, Shifted, Uniform
from tread_composer.objectives.weighting import MinSNR, min_snr_weight

__all__ = [
    'CosMap',
    'DDPM',
    'DiscreteUniform',
    'EDM',
    'FlowMatching',
    'LogitNormal',
    'MinSNR',
    'Mode',
    'Shifted',
    'Uniform',
    'min_snr_weight',
]
