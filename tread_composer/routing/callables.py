"""The callables that a routed or tapped block list yields in place of its blocks.

Shapes: B samples, N tokens, K kept tokens, D width.
"""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tread_composer.routing.arguments import RoutingError, bare, kind, tensors_in
from tread_composer.routing.passes import Pass
from tread_composer.routing.stack import inside_reentrant
from tread_composer.routing.taps import Slot

__all__ = ['calls_of', 'in_float32']

# What torch, a model's own checks and Python raise on a tensor of an unexpected shape.
_FAILURES = RuntimeError, ValueError, IndexError, TypeError, AssertionError


def calls_of(
    blocks: Sequence[nn.Module],
    offset: int,
    passes: Mapping[int, Pass],
    float32: Collection[int],
    slots: Sequence[Slot],
) -> list[Callable[..., Any]]:
    """One callable for each block: the block itself wherever nothing is to be done.

    Args:
        blocks: The blocks of the list, or of a slice of it.
        offset: Number of ``blocks[0]`` within the list.
        passes: The pass that goes through each block on a route.
        float32: Blocks that run without autocast, in float32.
        slots: Where to leave what blocks return.
    """
    calls: list[Callable[..., Any]] = []
    passed: list[Pass] = []
    for index, block in enumerate(blocks, offset):
        call: Callable[..., Any] = in_float32(block) if index in float32 else block
        route, taps = passes.get(index), [slot for slot in slots if slot.index == index]
        if route is None and (taps or passed):
            call = OffRoute(tuple(passed), block, call, index, taps)
        elif route is not None and (taps or route.wraps(index)):
            call = OnRoute(route, block, call, index, taps)
        if route is not None and index == route.end and route.explains:
            passed.append(route)  # from here on an error may come of what the route has shortened
        calls.append(call)
    return calls


class _StandIn:
    """A callable in place of a block. Every other attribute, read or written, is the block's own."""

    _STATE = ('route', 'passed', 'block', 'call', 'index', 'slots', 'with_grad')

    def __init__(self, block: nn.Module, call: Callable[..., Any], index: int, slots: Sequence[Slot]) -> None:
        self.block, self.call, self.index, self.slots = block, call, index, slots

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._STATE:
            object.__setattr__(self, name, value)
        else:
            setattr(self.block, name, value)


class OffRoute(_StandIn):
    """A block beside the routes: one that is tapped, or, in the probed forward passes, one behind a route."""

    def __init__(self, passed: tuple[Pass, ...], *block: Any) -> None:
        super().__init__(*block)
        self.passed, self.with_grad = passed, torch.is_grad_enabled()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.slots:
            _refuse_reentrant(self.with_grad, f'block {self.index}')
        out = self._explained(args, kwargs) if self.passed else self.call(*args, **kwargs)
        for slot in self.slots:
            slot.put(out, None)  # all tokens
        return out

    def _explained(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call; where it fails on something of the route's length, the error says so."""
        try:
            return self.call(*args, **kwargs)
        except _FAILURES as error:
            counts = [route.counts for route in self.passed if route.kept is not None]
            short = {
                f'{argument!r} ({kind(value)})': None
                for kept, total in counts
                for argument, value in _named(self.block, args, kwargs)
                if kept != total and _has_length(value, kept) and not _has_length(value, total)
            }
            if not short or _speaks_for_itself(error):
                raise
            raise RoutingError(
                f'block {self.index} of {self.passed[-1].settings.path!r}, behind the route, failed on all tokens: '
                f'{error}\n'
                f'{", ".join(short)} has as many entries as tokens were kept on the route: it comes from a block there.'
                ' Let the route hold both ends of such a connection or neither: where block i hands something to block '
                'depth - 1 - i, a route that begins as far from the start as it ends before the end (start=2, end=-3)'
            ) from error


class OnRoute(_StandIn):
    """A block of a route."""

    def __init__(self, route: Pass, *block: Any) -> None:
        super().__init__(*block)
        self.route = route

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        route, starts = self.route, self.index == self.route.start
        if starts:  # again in a recomputation: the pass remembers its ids
            route.enter(args, kwargs)
        reduced_args, reduced_kwargs = route.reduced(args, kwargs, starts=starts)
        if route.watched:
            out = self._watched(args, kwargs, reduced_args, reduced_kwargs)
        else:
            out = self.call(*reduced_args, **reduced_kwargs)
        for slot in self.slots:
            # Before the tokens are put back: what the block itself returned.
            slot.put(route.tokens_of(out), route.ids)
        return route.leave(out) if self.index == route.end else out

    def _watched(self, args: Any, kwargs: Any, reduced_args: Any, reduced_kwargs: Any) -> Any:
        """The call, tried if the pass has a probe; where it fails, with a word on how routing may have caused it."""
        route, starts = self.route, self.index == self.route.start
        name = f'block {self.index} of {route.settings.path!r}'
        _refuse_reentrant(route.with_grad, name)
        try:
            if route.probe is not None:
                if not starts:
                    route.probe.between(self.index, route.settings.tokens.value(args, kwargs))
                reduced = functools.partial(route.reduced, args, kwargs, starts=starts)
                route.probe.check(self.index, self.block, self.call, reduced)
            out = self.call(*reduced_args, **reduced_kwargs)
        except _FAILURES as error:
            kept, total = route.counts
            if kept == total or _speaks_for_itself(error):
                raise
            values = _named(self.block, reduced_args, reduced_kwargs)
            full = [f'{argument!r} ({kind(value)})' for argument, value in values if _has_length(value, total)]
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
            route.probe.note(route.tokens_of(out))
        return out


def _speaks_for_itself(error: Exception) -> bool:
    """Whether an error has no need of an explanation: ours, or the one that Composer reads to try a smaller batch."""
    return isinstance(error, RoutingError) or 'out of memory' in str(error)


def _has_length(value: Any, length: int) -> bool:
    return any(length in tensor.shape for tensor in tensors_in(value))


def _refuse_reentrant(with_grad: bool, name: str) -> None:
    """Refuse a call without gradients, made by the model's own reentrant checkpointing, in a pass with gradients."""
    if with_grad and not torch.compiler.is_compiling() and not torch.is_grad_enabled() and inside_reentrant():
        raise RoutingError(
            f'{name} is called inside of reentrant activation checkpointing of the model itself, which does not work '
            "with a route or a tap: its backward pass would run twice, on copies. Switch the model's own "
            "checkpointing off (or to use_reentrant=False) and use Composer's: parallelism_config with "
            "activation_checkpointing, or torch's checkpoint_wrapper around each block"
        )


def _named(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
    """The arguments of a call with their names; what ``*args`` takes has none but its number."""
    parameters = inspect.signature(bare(block).forward).parameters.values()
    names = [x.name for x in parameters if x.kind in (x.POSITIONAL_ONLY, x.POSITIONAL_OR_KEYWORD)]
    names += [f'argument {index}' for index in range(len(names), len(args))]
    return [*zip(names, args, strict=False), *kwargs.items()]


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
