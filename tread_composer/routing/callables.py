"""The callables that a routed or tapped block list yields in place of its blocks.

Shapes: B samples, N tokens, K kept tokens, D width.
"""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tread_composer.routing.arguments import FAILURES, Call, RoutingError, bare, kind, output_tokens, tensors_in
from tread_composer.routing.passes import Pass
from tread_composer.routing.stack import inside_reentrant
from tread_composer.routing.taps import Slot

__all__ = ['calls_of', 'in_float32']


def calls_of(
    blocks: Sequence[nn.Module],
    offset: int,
    passes: Mapping[int, Pass],
    float32: Collection[int],
    slots: Sequence[Slot],
) -> list[Callable[..., Any]]:
    """One callable for each block: the block itself wherever nothing is to be done.

    ``offset`` is the number of ``blocks[0]`` within the list. By such numbers, ``passes`` has the pass through a block,
    and ``float32`` the blocks that run without autocast.
    """
    calls: list[Callable[..., Any]] = []
    passed: tuple[Pass, ...] = ()
    for index, block in enumerate(blocks, offset):
        call: Callable[..., Any] = in_float32(block) if index in float32 else block
        route, taps = passes.get(index), [slot for slot in slots if slot.index == index]
        if taps or (passed if route is None else route.wraps(index)):
            call = _StandIn(block, call, index, taps, route, passed)
        if route is not None and index == route.end and route.explains:
            passed = (*passed, route)  # from here on an error may come of what the route has shortened
        calls.append(call)
    return calls


class _StandIn:
    """A callable in place of a block. Every other attribute, read or written, is the block's own.

    It stands on a route; or beside the routes for a block that is tapped, or, in the probed forward passes, behind one.
    """

    _STATE = ('block', 'call', 'index', 'slots', 'route', 'passed', 'with_grad')

    def __init__(
        self,
        block: nn.Module,
        call: Callable[..., Any],
        index: int,
        slots: Sequence[Slot],
        route: Pass | None,
        passed: tuple[Pass, ...],
    ) -> None:
        self.block, self.call, self.index, self.slots = block, call, index, slots
        self.route, self.passed = route, passed
        self.with_grad = torch.is_grad_enabled()  # of the pass: a checkpoint may switch it off around the call

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._STATE:
            object.__setattr__(self, name, value)
        else:  # what a model writes on its blocks in the loop belongs to them
            setattr(self.block, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        route = self.route
        if route is None:
            if self.slots:
                self._refuse_reentrant(f'block {self.index}')
            out = self._behind_routes(args, kwargs) if self.passed else self.call(*args, **kwargs)
            for slot in self.slots:  # of all tokens
                slot.put(out, None)
            return out
        starts = self.index == route.start
        if starts:  # again in a recomputation: the pass remembers its ids
            route.enter(args, kwargs)
        reduced = route.reduced(args, kwargs, starts=starts)  # N -> K tokens, tables and masks alike
        if route.watched:
            out = self._watched(route, (args, kwargs), reduced)
        else:
            out = self.call(*reduced[0], **reduced[1])
        for slot in self.slots:
            # [B, K, D], what the block itself returned; a tap from before the route does not know where it is.
            slot.put(output_tokens(out, route.settings.tokens_out), route.ids)
        return route.leave(out) if self.index == route.end else out  # [B, N, D] behind the last block

    def _watched(self, route: Pass, original: Call, reduced: Call) -> Any:
        """The call, tried if the pass has a probe; where it fails, with a word on how routing may have caused it."""
        starts, name = self.index == route.start, f'block {self.index} of {route.settings.path!r}'
        self._refuse_reentrant(name)
        try:
            if route.probe is not None:
                if not starts:
                    route.probe.between(self.index, route.settings.tokens.value(*original))
                arguments = functools.partial(route.reduced, *original, starts=starts)
                route.probe.check(self.index, self.block, self.call, arguments)
                reduced = route.probe.traced(reduced)
            out = self.call(*reduced[0], **reduced[1])
        except FAILURES as error:
            kept, total = route.counts
            if kept == total or _speaks_for_itself(error):  # with all tokens kept, it has nothing to do with the route
                raise
            full = self._of_length(total, reduced)
            hint = f' Arguments that still have {total} entries: {", ".join(full)}.' if full else ''
            raise RoutingError(
                f'{name} failed on {kept} of {total} tokens: {error}\n'
                f'An argument with one entry per token must be named in token_arguments.{hint} If there is none, and '
                'the block runs on all tokens, its work depends on their number or their grid (windows, a reshape to '
                'height x width, a position table of fixed size), or it receives tokens of a block before the route (a '
                'long skip connection, residuals of a ControlNet), and it cannot be routed; leave such blocks out of '
                'the route'
            ) from error
        if route.probe is not None:
            tapped = bool(self.slots) or self.index == route.end
            route.probe.note(output_tokens(out, route.settings.tokens_out), self.index, read=tapped)
        return out

    def _behind_routes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call; where it fails on something of a route's length, the error says so."""
        try:
            return self.call(*args, **kwargs)
        except FAILURES as error:
            short: list[str] = []
            for kept, total in [route.counts for route in self.passed if route.kept is not None]:
                full = self._of_length(total, (args, kwargs))  # of them all where nothing was skipped
                short += [text for text in self._of_length(kept, (args, kwargs)) if text not in [*full, *short]]
            if not short or _speaks_for_itself(error):
                raise
            raise RoutingError(
                f'block {self.index} of {self.passed[-1].settings.path!r}, behind the route, failed on all tokens: '
                f'{error}\n'
                f'{", ".join(short)} has as many entries as tokens were kept on the route: it comes from a block there.'
                ' Let the route hold both ends of such a connection or neither: where block i hands something to block '
                'depth - 1 - i, a route that begins as far from the start as it ends before the end (start=2, end=-3)'
            ) from error

    def _refuse_reentrant(self, name: str) -> None:
        """Refuse a call without gradients by the model's own reentrant checkpointing, in a pass that has them."""
        if self.with_grad and not torch.compiler.is_compiling() and not torch.is_grad_enabled() and inside_reentrant():
            raise RoutingError(
                f'{name} is called inside of reentrant activation checkpointing of the model itself, which does not '
                "work with a route or a tap: its backward pass would run twice, on copies. Switch the model's own "
                "checkpointing off (or to use_reentrant=False) and use Composer's: parallelism_config with "
                "activation_checkpointing, or torch's checkpoint_wrapper around each block"
            )

    def _of_length(self, length: int, call: Call) -> list[str]:
        """The arguments of a call that hold a tensor of this length, in words; those of ``*args`` by their numbers."""
        args, kwargs = call
        parameters = inspect.signature(bare(self.block).forward).parameters.values()
        names = [x.name for x in parameters if x.kind in (x.POSITIONAL_ONLY, x.POSITIONAL_OR_KEYWORD)]
        names += [f'argument {index}' for index in range(len(names), len(args))]
        values = [*zip(names, args, strict=False), *kwargs.items()]
        lengths = {name: [size for tensor in tensors_in(value) for size in tensor.shape] for name, value in values}
        return [f'{name!r} ({kind(value)})' for name, value in values if length in lengths[name]]


def _speaks_for_itself(error: Exception) -> bool:
    """Whether an error has no need of an explanation: ours, or the one that Composer reads to try a smaller batch."""
    return isinstance(error, RoutingError) or 'out of memory' in str(error)


def in_float32(block: Callable[..., Any]) -> Callable[..., Any]:
    """The block without autocast and with float32 inputs, as the paper's code runs the one behind a route."""

    def widen(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    def call(*args: Any, **kwargs: Any) -> Any:
        # Autocast is switched off for the device of the tokens.
        device = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).device
        with torch.autocast(device.type, enabled=False):
            return block(*(widen(a) for a in args), **{name: widen(a) for name, a in kwargs.items()})

    return call
