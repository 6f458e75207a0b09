"""What a denoiser learns, and the equation that turns noise into data with it (``protocols.Objective``)."""

from tread_composer.objectives.edm import EDM
from tread_composer.objectives.flow_matching import FlowMatching
from tread_composer.objectives.timesteps import LogitNormal, Uniform

__all__ = ['EDM', 'FlowMatching', 'LogitNormal', 'Uniform']
