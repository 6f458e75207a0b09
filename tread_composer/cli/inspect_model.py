"""The words of ``python -m tread_composer inspect-model``: how to route somebody's model, found by running it."""

import argparse
from typing import Any

from tread_composer.core.errors import UserError
from tread_composer.core.named import import_named
from tread_composer.core.process import importing

__all__ = ['add_arguments', 'inspect_model_command']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All options of the command."""
    add = parser.add_argument
    add(
        'function',
        help='package.module:function, called without arguments. It returns a small model on the CPU and run(model), '
        'which makes one forward pass and returns its output',
    )
    add('--blocks', metavar='PATH', help='the block list, where the model has several (default: the only one)')


def inspect_model_command(options: argparse.Namespace) -> int:
    """Run the model densely and routed, and print the call of ``Tread`` that routes it, or why there is none.

    Raises:
        UserError: The function is not there or does not return these two, or the model cannot be routed.
    """
    with importing():
        from tread_composer.routing import RoutingError, find_settings

    model, run = _made(options.function)
    try:
        settings = find_settings(model, run, blocks=options.blocks)
    except (ValueError, RoutingError) as error:
        raise UserError(f'{options.function}: {error}') from None
    if settings.fault is not None:
        raise UserError(f'{options.function}: {settings}')
    print(settings)
    return 0


def _made(reference: str) -> tuple[Any, Any]:
    """The model and what runs it."""
    from torch import nn

    module, _, name = reference.partition(':')
    if not module or not name:
        raise UserError(f'{reference}: write package.module:function, for example my_package.models:small_model')
    try:
        function = import_named(reference)
    except ImportError as error:
        raise UserError(
            f'{reference}: {error}; Python must be able to import it: start the command in its folder, or set '
            f'PYTHONPATH'
        ) from None
    pair = function()
    if not isinstance(pair, tuple) or len(pair) != 2 or not callable(pair[1]):
        raise UserError(f'{reference}: returns {type(pair).__name__}; it must return the model and run(model), a pair')
    if not isinstance(pair[0], nn.Module):
        raise UserError(
            f'{reference}: returns a model and run(model), but the first of the two is of type '
            f'{type(pair[0]).__name__}; it must be a torch.nn.Module'
        )
    return pair
