"""Taps: what chosen blocks returned in the last forward pass, for losses on features.

Shapes: B samples, N tokens, K kept tokens, D width.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tread_composer.routing.arguments import RoutingError, output_tokens

__all__ = ['Slot', 'Tapped', 'Taps']


class Tapped(NamedTuple):
    """What a block returned.

    Attributes:
        tokens: ``[B, K, D]`` in the order of ``kept``; ``[B, N, D]`` off a route. Part of the autograd graph.
        kept: Ids ``[B, K]`` of these tokens within the full sequence where the block lies on a route, its last block
            included; None if these are all tokens. A target on all tokens is reduced with ``take_kept(target, kept)``.
    """

    tokens: Tensor
    kept: Tensor | None


@dataclasses.dataclass(eq=False)
class Slot:
    """Where a walk over a block list leaves what a block returned, for one reader.

    The one thing of a forward pass that outlives it: written by the walk, never read by it, so that a compiled graph
    has no guard on it.
    """

    index: int  # of the block
    tokens_out: int | None
    evaluation: bool  # written in evaluation mode too
    tokens: Tensor | None = None
    kept: Tensor | None = None

    def put(self, out: Any, kept: Tensor | None) -> None:
        """Leave a block's output and its kept ids."""
        # Not during a backward pass (graph task -1 is none): checkpointing that runs the walk again would replace the
        # tokens of the true pass, which the loss stands on, by copies.
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            tokens = output_tokens(out, self.tokens_out)  # [B, K, D], with its graph
            self.tokens = tokens
            # A shared route has ids [1, K]; readers get one row for each sample.
            self.kept = None if kept is None else kept.expand(tokens.shape[0], -1)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles go without the tensors, which belong to one graph.
        return {**self.__dict__, 'tokens': None, 'kept': None}


class Taps:
    """The reader's handle of ``tap_blocks``."""

    def __init__(self, slots: Mapping[int, Slot], remove: Callable[[], None]) -> None:
        self._slots, self._remove = dict(slots), remove  # by the numbers that were asked for; takes them out again

    def read(self) -> dict[int, Tapped]:
        """What the blocks returned in the last forward pass, by the numbers that were asked for; empties the taps.

        Raises:
            RoutingError: No forward pass went through one of the blocks since the last reading.
        """
        taken = {}
        for at, slot in self._slots.items():
            if slot.tokens is None:
                raise RoutingError(
                    f'tap_blocks: no forward pass went through block {at} since the last reading. Taps are written in '
                    'training mode (with evaluation=True in both), by a model that walks over its list of blocks'
                )
            taken[at] = Tapped(slot.tokens, slot.kept)
        self.clear()  # only once all of them are there
        return taken

    def clear(self) -> None:
        """Let go of what is there, unread."""
        for slot in self._slots.values():
            slot.tokens = slot.kept = None

    def remove(self) -> None:
        """Tap no more; other taps of the same blocks, and a route, stay."""
        self.clear()
        self._remove()
