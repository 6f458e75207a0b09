"""Token routing for diffusion transformers (TREAD) as a Composer algorithm, with the pipeline around it.

``tread_composer.routing`` needs torch alone. The names below are imported when they are first used, so that it stays
so: ``Tread`` brings Composer with it. The import of the package itself loads nothing, which the programs rely on.
"""

from typing import TYPE_CHECKING

from tread_composer.core.named import lazy_names

if TYPE_CHECKING:
    from tread_composer.algorithms.ema import EMA
    from tread_composer.algorithms.tread import Tread
    from tread_composer.latent_diffusion import LatentDiffusion
    from tread_composer.routing import Route, apply_tread

__version__ = '0.1.0'
__all__ = ['EMA', 'LatentDiffusion', 'Route', 'Tread', 'apply_tread']

__getattr__ = lazy_names(
    __name__,
    {
        'EMA': 'tread_composer.algorithms.ema',
        'LatentDiffusion': 'tread_composer.latent_diffusion',
        'Route': 'tread_composer.routing',
        'Tread': 'tread_composer.algorithms.tread',
        'apply_tread': 'tread_composer.routing',
    },
    submodules=(
        'advisor',
        'algorithms',
        'autoencoders',
        'callbacks',
        'data',
        'models',
        'objectives',
        'routing',
        'samplers',
    ),
)
