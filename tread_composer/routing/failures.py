"""A word on routing in errors that torch raises in the model's own code, between two blocks of a route.

Such code (residuals of a ControlNet, hints) expects all tokens and meets the kept ones. It runs outside of every call
that routing knows, so a hook on the model looks at the error that ends its forward pass.
"""

import re
import sys
from typing import Any

import torch
from torch import nn

from tread_composer.routing.arguments import RoutingError
from tread_composer.routing.lists import RoutedList
from tread_composer.routing.passes import Stretch

__all__ = ['explain_failures', 'stop_explaining']

_WORDS = 'was on its route'


def explain_failures(model: nn.Module) -> None:
    """Add to errors of sizes what routing has to do with them, in forward passes of ``model`` that are not compiled."""
    model.register_forward_hook(_explain, always_call=True)


def stop_explaining(model: nn.Module) -> None:
    """Take the hook back, wherever in ``model`` it is: also in a copy of the model that had it."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_hooks.items() if hook is _explain]:
            del module._forward_hooks[key]
            module._forward_hooks_always_called.pop(key, None)


def _explain(module: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    error = sys.exc_info()[1]
    if error is None:
        return
    explained = isinstance(error, RoutingError) or not isinstance(error, RuntimeError)
    numbers = set() if explained else {int(number) for number in re.findall(r'\d+', str(error))}
    for part in module.modules():
        if isinstance(part, RoutedList) and part.routing is not None:
            path, stretches = part.routing.paths[part.list_number], part.routing.stretches[part.list_number]
            for stretch in stretches:
                if stretch.present is not None and numbers.issuperset(stretch.present) and _WORDS not in str(error):
                    error.args = (f'{error}\n{_explanation(path, stretch)}',)
                stretch.present = None  # the pass is over


def _explanation(path: str, stretch: Stretch) -> str:
    assert stretch.present is not None
    kept, total = stretch.present
    return (
        f'{path!r} {_WORDS}, blocks {stretch.start} to {stretch.end}, where {kept} of {total} tokens are present. '
        f'Between these blocks the model itself works on all {total} (residuals of a ControlNet, hints): let the route '
        f'end before that, or begin behind it'
    )
