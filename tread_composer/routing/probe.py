"""``Probe``: tries the blocks of one routed forward pass and says what speaks against routing them.

Off the hot path: only the forward passes of ``checks.PROBED_FORWARDS`` have one. Shapes: B samples, N tokens, K kept
tokens, D width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tread_composer.routing.arguments import Argument
from tread_composer.routing.checks import copied, probe, undisturbed

__all__ = ['Call', 'Probe']

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a block's call, by position and by name."""


class Probe:
    """The checks of one pass along one segment of a route.

    Args:
        tokens: The block's argument that carries the tokens.
        tokens_of: Takes the tokens out of a block's output.
        fixed: Number of leading tokens that keep their places.
        device: Where the tokens are.
    """

    def __init__(self, tokens: Argument, tokens_of: Callable[[Any], Any], fixed: int, device: torch.device) -> None:
        self.tokens, self.tokens_of, self.fixed, self.device = tokens, tokens_of, fixed, device
        self.conclusive = True

    def fault(self, block: nn.Module, call: Callable[..., Any], reduced: Callable[[Tensor | None], Call]) -> str | None:
        """Why this block cannot be routed, as far as trying shows it; None if nothing speaks against it.

        Args:
            block: The block's module.
            call: Calls it.
            reduced: The call's arguments for the kept tokens, in another order ``[K]`` if one is given.
        """

        def run(order: Tensor | None, changed: bool) -> Tensor | None:
            try:
                return called(order, changed)
            except torch.OutOfMemoryError:
                return None  # the call that counts may have the memory that this one lacked

        def called(order: Tensor | None, changed: bool) -> Tensor:
            args, kwargs = reduced(order)
            args, kwargs = copied(args), copied(kwargs)  # a block may write into its arguments
            if changed:
                x = self.tokens.given(args, kwargs).clone()
                x[0] = 1 - x[0]
                args, kwargs = self.tokens.replaced(args, kwargs, x)
            return self.tokens_of(call(*args, **kwargs))

        # Nothing before: a model that checkpoints its own blocks counts the tensors saved for the backward pass.
        with undisturbed(block, self.device):
            verdict = probe(run, self.tokens.given(*reduced(None)), self.fixed)
        self.conclusive = self.conclusive and verdict.conclusive
        return verdict.fault
