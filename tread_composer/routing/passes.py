"""One forward pass along one route: the full sequence that waits, the kept ids, and how a call is reduced to them.

A pass is given its settings and where its ids come from; it knows nothing of whoever armed them. Shapes: B samples, N
tokens, K kept tokens, D width.
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tread_composer.routing.arguments import RoutingError, kind, output_tokens
from tread_composer.routing.checks import PROBED_FORWARDS
from tread_composer.routing.probe import Call, Probe
from tread_composer.routing.settings import ListSettings
from tread_composer.routing.tokens import put_back, take_kept

__all__ = ['Pass', 'Record']


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
        span: First and last of its blocks on the route.
        record: What passes here have shown; written.
        ids: ``ids(x_BND)`` gives the kept ids ``[B, K]``, or ``[1, K]``, of this pass.
        training: Whether the list is in training mode.
        probed: Whether blocks may be tried (see ``checks``).
    """

    def __init__(
        self,
        settings: ListSettings,
        span: tuple[int, int],
        record: Record,
        ids: Callable[[Tensor], Tensor],
        *,
        training: bool,
        probed: bool,
    ) -> None:
        self.settings, self.record, self.ids_of = settings, record, ids
        self.start, self.end = span
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

    @property
    def counts(self) -> tuple[int, int]:
        """K and N of this pass."""
        return self.ids.shape[1], self.full.shape[1]

    @property
    def explains(self) -> bool:
        """Whether blocks behind the route should explain their errors: in the first passes, before the model ran."""
        return self.watched and self.record.forwards + 1 in PROBED_FORWARDS

    def wraps(self, index: int) -> bool:
        """Whether this block's call must be changed: an inner block without token arguments just runs."""
        early = self.watched and self.record.forwards < max(PROBED_FORWARDS)  # to try it, and to explain its errors
        return bool(index in (self.start, self.end) or self.settings.token_arguments or early)

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Store the full sequence that the route's first block was given, and settle which tokens are kept."""
        x = self.settings.tokens.value(args, kwargs)
        if not isinstance(x, Tensor) or x.dim() != 3:
            name, path = self.settings.tokens.name, self.settings.path
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
        self.record.used = True  # in compiled passes too, hence a plain assignment

    def _begin_probe(self, x: Tensor) -> None:
        if type(x) is Tensor and x.device.type != 'meta':
            self.probe = Probe(self.settings, x, self.ids)

    def reduced(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, starts: bool, order: Tensor | None = None
    ) -> Call:
        """The call's arguments for the kept tokens, in another order if one is given."""
        original, kept, tokens = (args, kwargs), self.ids, self.settings.tokens
        if order is not None:  # the probe's: the kept tokens, and whatever follows them, in another order
            kept = kept[:, order]
        if starts:  # [B, N, D] -> [B, K, D]; later blocks are given [B, K, D] by the block before
            args, kwargs = tokens.replaced(args, kwargs, take_kept(self.full, kept.expand(len(self.full), -1)))
        elif order is not None:
            args, kwargs = tokens.replaced(args, kwargs, tokens.value(args, kwargs)[:, order])
        for follower in self.settings.token_arguments:
            value = follower.kept(*original, (self.full.shape[0], self.full.shape[1]), kept)
            if value is not None:
                args, kwargs = follower.argument.replaced(args, kwargs, value)
        if order is not None and self.probe is not None:
            return self.probe.in_order(args, order), self.probe.in_order(kwargs, order)
        return args, kwargs

    def tokens_of(self, out: Any) -> Any:
        """The tokens in a block's output."""
        return output_tokens(out, self.settings.tokens_out)

    def leave(self, out: Any) -> Any:
        """The last block's output with the kept tokens back in the full sequence."""
        position, x, kept = self.settings.tokens_out, self.tokens_of(out), self.ids.expand(len(self.full), -1)
        if x.shape[1] != kept.shape[1]:  # costs nothing when compiled: shapes are known while tracing
            raise RoutingError(
                f'{self.settings.path}: {kept.shape[1]} tokens went onto the route and {x.shape[1]} came off it, so '
                'their places are not known: a block, or the model between two blocks, adds or drops tokens. End the '
                'route before that block'
            )
        restored = put_back(self.full, x, kept)  # [B, K, D] -> [B, N, D]
        if self.probe is not None:
            self._end_probe(self.probe, restored)
        # Other members of a tuple go on as they are: they are none of the tokens.
        if isinstance(out, Tensor):
            return restored
        assert position is not None
        return (*out[:position], restored, *out[position + 1 :])

    def _end_probe(self, probe: Probe, restored: Tensor) -> None:
        fault, self.probe = probe.end(restored), None
        self.record.conclusive = bool(self.record.conclusive) or probe.conclusive
        if fault:
            raise RoutingError(f'{self.settings.path}: the route cannot be vouched for: {fault}')
        if probe.hooks and self.record.forwards == 1:
            kept, total = self.counts
            hooks = '; '.join(f'{name} on {len(blocks)} of them' for name, blocks in probe.hooks.items())
            warnings.warn(
                f'{self.settings.path}: blocks of the route have hooks, which see {kept} of {total} tokens ({hooks}). '
                'tap_blocks hands out what a block returned together with the ids of the kept tokens',
                stacklevel=2,
            )
