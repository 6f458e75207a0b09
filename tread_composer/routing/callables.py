"""What a routed or tapped block list yields in place of its blocks: callables that pass for them.

Shapes: B samples, N tokens, K kept tokens, D width.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from tread_composer.routing.arguments import RoutingError, bare
from tread_composer.routing.checks import explained, explained_behind
from tread_composer.routing.passes import Pass
from tread_composer.routing.stack import inside_reentrant
from tread_composer.routing.taps import Slot

__all__ = ['calls_of']

_FAILURES = RuntimeError, ValueError, IndexError, TypeError, AssertionError
_OWN = ('place', 'block', 'call', 'index', 'slots', 'passed', 'with_grad', 'first', 'last')


def calls_of(
    blocks: Sequence[nn.Module],
    first: int,
    passes: Mapping[int, Pass],
    float32: Set[int],
    slots: Sequence[Slot],
) -> list[Callable[..., Any]]:
    """One callable for each block: the block itself wherever nothing is to be done.

    Args:
        blocks: Of the list, or of a slice of it.
        first: Number of the first of them within the list.
        passes: The pass that goes through each block on a route.
        float32: Blocks that run without autocast, in float32.
        slots: Where to leave what blocks return.
    """
    calls: list[Callable[..., Any]] = []
    passed: list[Pass] = []
    for index, block in enumerate(blocks, first):
        call: Callable[..., Any] = in_float32(block) if index in float32 else block
        place, here = passes.get(index), [slot for slot in slots if slot.index == index]
        if place is not None:
            if here or place.wraps(index):
                call = OnRoute(place, block, call, index, here)
            if index == place.end and place.explains:
                passed.append(place)
        elif here or passed:
            call = OffRoute(tuple(passed), block, call, index, here)
        calls.append(call)
    return calls


class _StandIn:
    """A callable in place of a block. Whatever is not a call is the block's own."""

    block: nn.Module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self.block, name, value)


class OffRoute(_StandIn):
    """A block beside the routes: one that is tapped, or, in the first forward passes, one behind a route.

    The latter says so where it fails on something of the route's length.
    """

    def __init__(
        self, passed: tuple[Pass, ...], block: nn.Module, call: Callable[..., Any], index: int, slots: Sequence[Slot]
    ) -> None:
        self.passed, self.block, self.call, self.index, self.slots = passed, block, call, index, slots
        self.with_grad = torch.is_grad_enabled()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.slots:
            _refuse_reentrant(self.with_grad, f'block {self.index}')
        out = self._explained(args, kwargs) if self.passed else self.call(*args, **kwargs)
        for slot in self.slots:
            slot.put(out, None)
        return out

    def _explained(self, args: Any, kwargs: Any) -> Any:
        try:
            return self.call(*args, **kwargs)
        except _FAILURES as error:
            where = f'block {self.index} of {self.passed[-1].settings.path!r}'
            counts = [one.counts for one in self.passed if one.kept is not None]
            explanation = explained_behind(error, where, counts, _named(self.block, args, kwargs))
            if explanation is error:
                raise
            raise explanation from error


class OnRoute(_StandIn):
    """A block of a route."""

    def __init__(
        self, place: Pass, block: nn.Module, call: Callable[..., Any], index: int, slots: Sequence[Slot]
    ) -> None:
        self.place, self.block, self.call, self.index, self.slots = place, block, call, index, slots
        self.first, self.last = index == place.start, index == place.end

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        here = self.place
        if self.first:
            here.enter(args, kwargs)
        reduced_args, reduced_kwargs = here.reduced(args, kwargs, first=self.first)
        if here.watched:
            out = self._watched(args, kwargs, reduced_args, reduced_kwargs)
        else:
            out = self.call(*reduced_args, **reduced_kwargs)
        for slot in self.slots:
            slot.put(here.tokens_of(out), here.ids)
        return here.leave(out) if self.last else out

    def _watched(self, args: Any, kwargs: Any, reduced_args: Any, reduced_kwargs: Any) -> Any:
        """The call; where it fails, with a word on how routing may have caused it."""
        here = self.place
        where = f'block {self.index} of {here.settings.path!r}'
        _refuse_reentrant(here.with_grad, where)
        try:
            fault = None if here.probe is None else self._fault(args, kwargs, where)
            out = None if fault else self.call(*reduced_args, **reduced_kwargs)
        except _FAILURES as error:
            explanation = explained(error, where, here.counts, _named(self.block, reduced_args, reduced_kwargs))
            if explanation is error:
                raise
            raise explanation from error
        if fault:
            raise RoutingError(fault)
        if here.probe is not None:
            here.probe.note(self.index, here.tokens_of(out))
        return out

    def _fault(self, args: Any, kwargs: Any, where: str) -> str | None:
        """What the probe says against this block, or against what the model did before it."""
        here = self.place
        assert here.probe is not None
        between = None if self.first else here.probe.between(self.index, here.settings.tokens.given(args, kwargs))
        if between:
            return between
        fault = here.probe.fault(
            self.block, self.call, lambda order: here.reduced(args, kwargs, first=self.first, order=order)
        )
        return fault and f'{where} cannot be routed: {fault}'


def _refuse_reentrant(with_grad: bool, where: str) -> None:
    """Refuse a call without gradients, made by the model's own reentrant checkpointing, in a pass with gradients."""
    if with_grad and not torch.compiler.is_compiling() and not torch.is_grad_enabled() and inside_reentrant():
        raise RoutingError(
            f'{where} is called inside of reentrant activation checkpointing of the model itself, which cannot go '
            "with a route or a tap: its backward pass would run twice, on copies. Switch the model's own "
            "checkpointing off (or to use_reentrant=False) and use Composer's: parallelism_config with "
            "activation_checkpointing, or torch's checkpoint_wrapper around each block"
        )


def _named(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
    """The arguments of a call with their names; what ``*args`` takes has none but its number."""
    names = [
        name
        for name, one in inspect.signature(bare(block).forward).parameters.items()
        if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
    ]
    names += [f'argument {index}' for index in range(len(names), len(args))]
    return [*zip(names, args, strict=False), *kwargs.items()]


def in_float32(block: Callable[..., Any]) -> Callable[..., Any]:
    """The block without autocast and with float32 inputs, as the paper's code runs the one behind a route."""

    def widen(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    def call(*args: Any, **kwargs: Any) -> Any:
        device = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).device
        with torch.autocast(device.type, enabled=False):
            return block(*(widen(a) for a in args), **{name: widen(a) for name, a in kwargs.items()})

    return call
