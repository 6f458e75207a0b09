"""What a denoiser learns, and the equation that turns noise into data with it (``protocols.Objective``).

A new objective is a file here and a line in ``OBJECTIVES``. One of another package is named in the configuration:
``objective.name: package.module:Class``.
"""

from tread_composer.objectives.ddpm import DDPM
from tread_composer.objectives.edm import EDM
from tread_composer.objectives.flow_matching import FlowMatching
from tread_composer.objectives.timesteps import CosMap, LogitNormal, Mode, Shifted, Uniform
from tread_composer.objectives.weighting import MinSNR

__all__ = [
    'OBJECTIVES', 'TIME_DISTRIBUTIONS', 'WEIGHTINGS', 'CosMap', 'DDPM', 'EDM', 'FlowMatching', 'LogitNormal', 'MinSNR',
    'Mode', 'Shifted', 'Uniform',
]  # fmt: skip

OBJECTIVES = {'flow_matching': FlowMatching, 'edm': EDM, 'ddpm': DDPM}
"""By the name that configurations use, ``objective.name``."""

TIME_DISTRIBUTIONS = {'uniform': Uniform, 'logit_normal': LogitNormal, 'mode': Mode, 'cosmap': CosMap}
"""``objective.time_distribution.name``."""

WEIGHTINGS = {'min_snr': MinSNR}
"""``objective.weighting.name``."""
