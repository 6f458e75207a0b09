"""One forward pass along one route: what a routed block list yields in place of the blocks of a route.

A pass is given its settings and where its ids come from; it knows nothing of whoever armed them. Shapes: B samples, N
tokens, K kept tokens, D width.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tread_composer.routing.arguments import RoutingError, bare, kind
from tread_composer.routing.checks import PROBED_FORWARDS, explained, inside_reentrant
from tread_composer.routing.probe import Call, Probe
from tread_composer.routing.settings import ListSettings, Segment
from tread_composer.routing.tokens import put_back, take_kept

__all__ = ['Pass', 'Record', 'in_float32']


@dataclasses.dataclass(eq=False)
class Record:
    """What forward passes along one segment have shown so far.

    Args:
        used: Whether there was one. Written only: a counter would recompile the graph each time.
        forwards: How many training forwards were not compiled.
        conclusive: Whether a probe could tell that all its blocks are sound; None before there was one.
    """

    used: bool = False
    forwards: int = 0
    conclusive: bool | None = None


class Pass:
    """One pass along a segment: holds the full sequence and the kept ids between its first and its last block.

    Args:
        settings: How the blocks of the list take their tokens.
        segment: Which of the blocks.
        record: Of the segment; written.
        ids: ``ids(x_BND)`` gives the kept ids ``[B, K]``, or ``[1, K]``, of this pass.
        training: Whether the list is in training mode.
        probed: Whether blocks may be tried (see ``checks``).
    """

    def __init__(
        self,
        settings: ListSettings,
        segment: Segment,
        record: Record,
        ids: Callable[[Tensor], Tensor],
        *,
        training: bool,
        probed: bool,
    ) -> None:
        self.settings, self.segment, self.record, self.ids_of = settings, segment, record, ids
        self.kept: Tensor | None = None
        # What only an eager forward can do, and only training needs.
        self.watched = training and not torch.compiler.is_compiling()
        self.with_grad = torch.is_grad_enabled()
        self.probed = probed
        self.probe: Probe | None = None

    @property
    def ids(self) -> Tensor:
        """The kept ids ``[B, K]``, or ``[1, K]``; the first block of the route has asked for them."""
        assert self.kept is not None
        return self.kept

    def around(self, block: nn.Module, call: Callable[..., Any], index: int) -> Callable[..., Any]:
        """What to yield for a block; ``call`` calls it."""
        first, last = index == self.segment.start, index == self.segment.end
        checked = self.watched and self.probed and self.record.forwards < max(PROBED_FORWARDS)
        if not (first or last or self.settings.token_arguments or checked):
            return call
        return OnRoute(self, block, call, index)

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Store the full sequence that the route's first block was given, and settle which tokens are kept."""
        x = self.settings.tokens.given(args, kwargs)
        if not isinstance(x, Tensor) or x.dim() != 3:
            name, path = self.settings.tokens.name, self.segment.path
            raise RoutingError(
                f'{path}: the argument {name!r} should hold tokens [B, N, D], the block got {kind(x)}. Of a grid '
                '[B, H, W, D] no tokens can be taken out; another argument is named with tokens=...'
            )
        self.full: Tensor = x
        # Asked once in a pass: a model that checkpoints its own blocks calls this again during the backward pass, when
        # the routing may be armed for another batch.
        if self.kept is None:
            self.kept = self.ids_of(x)
            if self.watched:
                self.record.forwards += 1
                if self.probed and self.record.forwards in PROBED_FORWARDS:
                    self._begin_probe(x)
        self.record.used = True

    def _begin_probe(self, x: Tensor) -> None:
        if type(x) is Tensor and x.device.type != 'meta':
            self.probe = Probe(self.settings.tokens, self.tokens_of, self.settings.always_keep, x.device)

    def reduced(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, first: bool, order: Tensor | None = None
    ) -> Call:
        """The call's arguments for the kept tokens, in another order if one is given."""
        original, kept, tokens = (args, kwargs), self.ids, self.settings.tokens
        if order is not None:
            kept = kept[:, order]
        if first:
            args, kwargs = tokens.replaced(args, kwargs, take_kept(self.full, kept.expand(len(self.full), -1)))
        elif order is not None:
            args, kwargs = tokens.replaced(args, kwargs, tokens.given(args, kwargs)[:, order])
        for one in self.settings.token_arguments:
            value = one.kept(*original, (self.full.shape[0], self.full.shape[1]), kept)
            if value is not None:
                args, kwargs = one.argument.replaced(args, kwargs, value)
        return args, kwargs

    def tokens_of(self, out: Any) -> Any:
        """The tokens in a block's output."""
        position = self.settings.tokens_out
        if isinstance(out, Tensor):
            return out
        if not isinstance(out, tuple) or position is None:
            raise RoutingError(
                f'the blocks return {kind(out)}: say where the tokens are, for example tokens_out=0 '
                '(their position in the tuple)'
            )
        if position >= len(out):
            raise RoutingError(f'tokens_out: {position} is outside of the tuple of {len(out)} that the blocks return')
        return out[position]

    def leave(self, out: Any) -> Any:
        """The last block's output with the kept tokens back in the full sequence."""
        position = self.settings.tokens_out
        restored = put_back(self.full, self.tokens_of(out), self.ids.expand(len(self.full), -1))
        if self.probe is not None:
            self.record.conclusive = bool(self.record.conclusive) or self.probe.conclusive
            self.probe = None
        if isinstance(out, Tensor):
            return restored
        assert position is not None
        return (*out[:position], restored, *out[position + 1 :])


_OWN = ('routed_pass', 'block', 'call', 'index', 'first', 'last')


class OnRoute:
    """A block of a route, as the iteration yields it. Whatever is not a call is the block's own."""

    def __init__(self, routed_pass: Pass, block: nn.Module, call: Callable[..., Any], index: int) -> None:
        self.routed_pass, self.block, self.call, self.index = routed_pass, block, call, index
        segment = routed_pass.segment
        self.first, self.last = index == segment.start, index == segment.end

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        here = self.routed_pass
        if self.first:
            here.enter(args, kwargs)
        reduced_args, reduced_kwargs = here.reduced(args, kwargs, first=self.first)
        if here.watched:
            out = self._watched(args, kwargs, reduced_args, reduced_kwargs)
        else:
            out = self.call(*reduced_args, **reduced_kwargs)
        return here.leave(out) if self.last else out

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self.block, name, value)

    def _watched(self, args: Any, kwargs: Any, reduced_args: Any, reduced_kwargs: Any) -> Any:
        """The call, with a word of explanation where routing may be why it fails."""
        here = self.routed_pass
        where = f'block {self.index} of {here.segment.path!r}'
        if here.with_grad and not torch.is_grad_enabled() and inside_reentrant():
            raise RoutingError(
                f'{where} is called inside of reentrant activation checkpointing of the model itself, which cannot go '
                "with a route: its backward pass would run twice. Switch the model's own checkpointing off (or to "
                "use_reentrant=False) and use Composer's: parallelism_config with activation_checkpointing, or "
                "torch's checkpoint_wrapper around each block"
            )
        fault = None
        try:
            if here.probe is not None:
                fault = here.probe.fault(
                    self.block, self.call, lambda order: here.reduced(args, kwargs, first=self.first, order=order)
                )
            out = None if fault else self.call(*reduced_args, **reduced_kwargs)
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
            counts = here.ids.shape[1], here.full.shape[1]
            explanation = explained(error, where, counts, _named(self.block, reduced_args, reduced_kwargs))
            if explanation is error:
                raise
            raise explanation from error
        if fault:
            raise RoutingError(f'{where} cannot be routed: {fault}')
        return out


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
