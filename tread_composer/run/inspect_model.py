"""``python -m tread_composer inspect-model``: how to route somebody's model, found by running it."""

from torch import nn

from tread_composer.core.errors import UserError
from tread_composer.core.named import import_named
from tread_composer.routing import FoundSettings, RoutingError, find_settings

__all__ = ['inspect_model']


def inspect_model(reference: str, blocks: str | None = None) -> FoundSettings:
    """Run a model densely and routed; what it prints as is the call of ``Tread`` that routes it.

    ``reference`` is ``package.module:function``, called without arguments: it returns a model and ``run(model)``.
    ``blocks`` is the dotted name of the block list; the only one if None.

    Raises:
        UserError: The function is not there or does not return these two, or the model cannot be routed.
    """
    try:
        function = import_named(reference)
    except ImportError as error:
        raise UserError(
            f'{reference}: {error}; write package.module:function, for example my_package.models:small_model. Python '
            'must be able to import it: start the command in its folder, or set PYTHONPATH'
        ) from None
    pair = function()
    types = [type(part).__name__ for part in (pair if isinstance(pair, tuple) else [pair])]
    if len(types) != 2 or not isinstance(pair[0], nn.Module) or not callable(pair[1]):
        raise UserError(
            f'{reference}: returns {", ".join(types)}; it must return a torch.nn.Module and run(model), a pair'
        )
    try:
        settings = find_settings(*pair, blocks=blocks)
    except (ValueError, RoutingError) as error:
        raise UserError(f'{reference}: {error}') from None
    if settings.fault is not None:
        raise UserError(f'{reference}: {settings}')
    return settings
