"""A block list that routes: an ordinary list of modules whose iterator, in a forward pass, yields callables.

One callable for each block: the block itself outside of a route, a thin stand-in for it inside. The full sequence that
waits for the end of the route lives in that one iteration, never on a shared object, so activation checkpointing,
several forwards before one backward, and recomputation all stay exact. Whoever walks the list elsewhere (to shard,
compile, wrap or count blocks) gets the blocks.
"""

import re
import sys
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from tread_composer.routing.arguments import RoutingError
from tread_composer.routing.callables import calls_of
from tread_composer.routing.routing import Routing
from tread_composer.routing.stack import in_forward
from tread_composer.routing.taps import Slot

__all__ = ['ROUTED', 'BlockList', 'RoutedList', 'explain_failures', 'stop_explaining']

BlockList = nn.ModuleList | nn.Sequential
_WORDS = 'was on its route'


class RoutedList:
    """Mixin: routed callables in a forward pass while training with an armed route or inside of ``forced``."""

    routing: Routing | None = None  # decides the routes
    list_number: int = 0  # which of the lists of the routing this is
    offset: int = 0  # of a slice: number of its first block within the list
    step: int = 1  # of a slice
    slots: tuple[Slot, ...] = ()  # where to leave what blocks return: those of all taps

    def __iter__(self) -> Iterator[Any]:
        return iter(self._walked())

    def children(self) -> Iterator[Any]:
        """The blocks, or what a forward pass calls in their place: ``checkpoint_sequential`` walks over these."""
        return iter(self._walked())

    def __getitem__(self, index: Any) -> Any:
        piece = super().__getitem__(index)  # type: ignore[misc]
        if isinstance(index, slice):
            positions = range(len(self))[index]  # type: ignore[arg-type]
            piece.training = self.training  # type: ignore[attr-defined]
            piece.routing, piece.list_number, piece.slots = self.routing, self.list_number, self.slots
            # Counted within the whole list: a slice of a slice is one too.
            piece.offset, piece.step = self.offset + positions.start * self.step, self.step * positions.step
        return piece

    def __add__(self, blocks: Any) -> Any:
        if any(call is not block for call, block in zip(self._walked(), self._modules.values(), strict=True)):  # type: ignore[attr-defined]
            raise RoutingError(
                'the forward pass walks over a sum of lists, which does not route: walk over one list after the other, '
                'and name both: blocks=[...]'
            )
        return super().__add__(blocks)  # type: ignore[misc]

    def _walked(self) -> list[Any]:
        blocks, routing = list(self._modules.values()), self.routing  # type: ignore[attr-defined]
        training = self.training  # type: ignore[attr-defined]
        routed = routing is not None and (training or routing.in_evaluation) and routing.armed
        slots = [slot for slot in self.slots if training or slot.evaluation]
        # Asked last: it looks through the call stack.
        if not (routed or slots) or not blocks or not in_forward(blocks[0]):
            return blocks
        if not routed or routing is None:
            return calls_of(blocks, self.offset, {}, (), slots if self.step == 1 else [])
        if self.step != 1:
            raise RoutingError(
                f'{routing.paths[self.list_number]}: the model walks over a slice of it with step {self.step}: a route '
                'is a stretch of neighbouring blocks in their order'
            )
        passes = routing.passes(self.list_number, self.offset, len(blocks), training=training)
        return calls_of(blocks, self.offset, passes, routing.float32_blocks[self.list_number], slots)

    @property
    def is_slice(self) -> bool:
        """Whether this is a slice of the list that was routed or tapped."""
        return 'offset' in vars(self)

    def release(self, *, route: bool = False, slots: Collection[Slot] = ()) -> None:
        """Give the route or some slots back; without any left, become the plain list again."""
        self.routing = None if route else self.routing
        self.slots = tuple(slot for slot in self.slots if slot not in slots)
        if self.routing is None and not self.slots:
            for name in ('routing', 'list_number', 'offset', 'step', 'slots'):
                self.__dict__.pop(name, None)
            self.__class__ = _PLAIN[type(self)]  # type: ignore[assignment]


class RoutedModuleList(RoutedList, nn.ModuleList):
    """An ``nn.ModuleList`` that routes."""


class RoutedSequential(RoutedList, nn.Sequential):
    """An ``nn.Sequential`` that routes; its own forward iterates over itself."""


ROUTED: dict[type, type] = {nn.ModuleList: RoutedModuleList, nn.Sequential: RoutedSequential}
_PLAIN: dict[type, type] = {routed: plain for plain, routed in ROUTED.items()}


def explain_failures(model: nn.Module) -> None:
    """Add to errors of sizes what routing has to do with them, in forward passes of ``model`` that are not compiled.

    Code of the model between two blocks of a route (residuals of a ControlNet, hints) expects all tokens and meets the
    kept ones. It runs outside of every call that routing knows, so a hook looks at the error that ends the pass.
    """
    model.register_forward_hook(_explain, always_call=True)


def stop_explaining(model: nn.Module) -> None:
    """Take the hook back, wherever in ``model`` it is: also in a copy of the model that had it."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_hooks.items() if hook is _explain]:
            del module._forward_hooks[key]
            module._forward_hooks_always_called.pop(key, None)


def _explain(module: nn.Module, args: Any, output: Any) -> None:
    error = None if torch.compiler.is_compiling() else sys.exc_info()[1]
    if error is None:
        return
    is_of_torch = isinstance(error, RuntimeError) and not isinstance(error, RoutingError)
    numbers = {int(number) for number in re.findall(r'\d+', str(error))} if is_of_torch else set()
    for part in module.modules():
        if isinstance(part, RoutedList) and part.routing is not None:
            path, stretches = part.routing.paths[part.list_number], part.routing.stretches[part.list_number]
            for stretch in stretches:
                if stretch.present is not None and numbers.issuperset(stretch.present) and _WORDS not in str(error):
                    kept, total = stretch.present
                    error.args = (
                        f'{error}\n{path!r} {_WORDS}, blocks {stretch.start} to {stretch.end}, where {kept} of {total} '
                        f'tokens are present. Between these blocks the model itself works on all {total} (residuals of '
                        'a ControlNet, hints): let the route end before that, or begin behind it',
                    )
                stretch.present = None  # the pass is over
