"""Token routing for diffusion transformers (TREAD) as a Composer algorithm, with the pipeline around it.

``tread_composer.routing`` needs torch alone. The names below are imported when they are first used, so that it stays
so: ``Tread`` brings Composer with it.
"""

import importlib
from typing import Any

from tread_composer.routing import Route, apply_tread

__version__ = '0.1.0'
__all__ = ['EMA', 'LatentDiffusion', 'Route', 'Tread', 'apply_tread']

_LAZY = {
    'EMA': 'tread_composer.algorithms.ema',
    'LatentDiffusion': 'tread_composer.latent_diffusion',
    'Tread': 'tread_composer.algorithms.tread',
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(_LAZY[name]), name)
