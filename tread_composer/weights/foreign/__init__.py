"""Weights of other projects, brought into the form and the conventions of this one; nowhere else are they converted."""

from typing import TYPE_CHECKING

from tread_composer.core.lazy import lazy_names

if TYPE_CHECKING:
    from tread_composer.weights.foreign.command import import_weights
    from tread_composer.weights.foreign.files import LAYOUTS
    from tread_composer.weights.foreign.hints import Hints

__all__ = ['LAYOUTS', 'Hints', 'import_weights']

# The flags of `import` are read off `Hints`, and `--help` is not to load torch for them.
_NAMES = {'Hints': 'hints', 'LAYOUTS': 'files', 'import_weights': 'command'}
__getattr__ = lazy_names(__name__, {name: f'{__name__}.{module}' for name, module in _NAMES.items()})
