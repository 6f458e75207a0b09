"""One forward pass along one route: the full sequence that waits, the kept ids, and how a call is reduced to them.

A pass is given its settings and where its ids come from; it knows nothing of whoever armed them. Shapes: B samples, N
tokens, K kept tokens, D width.
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from tread_composer.routing.arguments import Call, ListSettings, RoutingError, kind, output_tokens
from tread_composer.routing.probe import PROBED_FORWARDS, Probe
from tread_composer.routing.tokens import put_back, take_kept

__all__ = ['Pass', 'Stretch']


@dataclasses.dataclass(eq=False)
class Stretch:
    """The part of a route that lies in one block list, and what forward passes along it have shown."""

    route: int  # its number
    start: int  # first block, counted within the list
    end: int  # last block, inclusive
    used: bool = False  # by any pass. Written only: a counter would recompile the graph each time
    forwards: int = 0  # training forwards that were not compiled
    present: tuple[int, int] | None = None  # K and N while such a forward is between the first and the last block
    conclusive: bool | None = None  # whether a probe could tell that all blocks are sound; None before there was one


@dataclasses.dataclass(eq=False)
class Pass:
    """One pass along a stretch: holds the full sequence and the kept ids between its first and its last block."""

    settings: ListSettings
    stretch: Stretch
    start: int  # a slice of the list may begin or end within the stretch
    end: int
    ids_of: Callable[[Tensor], Tensor]  # tokens [B, N, D] to the kept ids [B, K], or [1, K]
    probed: bool  # whether its blocks may be tried
    watched: bool  # in training that is not compiled
    kept: Tensor | None = None
    probe: Probe | None = None

    @property
    def ids(self) -> Tensor:
        """The kept ids ``[B, K]``, or ``[1, K]``, since the first block of the route."""
        assert self.kept is not None
        return self.kept

    @property
    def counts(self) -> tuple[int, int]:
        """K and N of this pass."""
        return self.ids.shape[1], self.full.shape[1]

    @property
    def explains(self) -> bool:
        """Whether blocks behind the route should explain their errors: in the probed passes, before the model ran."""
        return self.watched and self.stretch.forwards + 1 in PROBED_FORWARDS

    def wraps(self, index: int) -> bool:
        """Whether this block's call must be changed: an inner block without token arguments just runs."""
        early = self.watched and self.stretch.forwards < max(PROBED_FORWARDS)  # to try it, and to explain its errors
        return bool(index in (self.start, self.end) or self.settings.token_arguments or early)

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Store the full sequence that the route's first block was given, and settle which tokens are kept."""
        x = self.settings.tokens.value(args, kwargs)
        if not isinstance(x, Tensor) or x.dim() != 3:
            raise RoutingError(
                f'{self.settings.path}: the argument {self.settings.tokens.name!r} should hold tokens [B, N, D], the '
                f'block got {kind(x)}. Tokens cannot be dropped from a [B, H, W, D] grid. Use tokens= to select another'
            )
        self.full: Tensor = x
        # Asked once in a pass: a model that checkpoints its own blocks calls this again during the backward pass, when
        # the routing may be armed for another batch.
        if self.kept is None:
            self.kept = self.ids_of(x)
            if self.watched:
                self.stretch.forwards += 1
                self.stretch.present = self.counts if self.counts[0] < self.counts[1] else None
                # A tensor subclass or a meta tensor has no values to compare.
                comparable = type(x) is Tensor and x.device.type != 'meta'
                if self.probed and comparable and self.stretch.forwards in PROBED_FORWARDS:
                    self.probe = Probe(self.settings, x, self.kept)
        self.stretch.used = True  # in compiled passes too, hence a plain assignment

    def reduced(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, starts: bool, order: Tensor | None = None
    ) -> Call:
        """The call's arguments for the kept tokens, in another order ``[K]`` if the probe gives one."""
        original, kept, tokens = (args, kwargs), self.ids, self.settings.tokens
        if order is not None:
            kept = kept[:, order]
        if starts:  # [B, N, D] -> [B, K, D]; later blocks are given [B, K, D] by the block before
            args, kwargs = tokens.replaced(args, kwargs, take_kept(self.full, kept.expand(len(self.full), -1)))
        elif order is not None:
            args, kwargs = tokens.replaced(args, kwargs, tokens.value(args, kwargs)[:, order])
        for follower in self.settings.token_arguments:  # tables and masks: N entries -> K entries
            value = follower.kept(*original, (self.full.shape[0], self.full.shape[1]), kept)
            if value is not None:
                args, kwargs = follower.argument.replaced(args, kwargs, value)
        return args, kwargs

    def leave(self, out: Any) -> Any:
        """The last block's output with the kept tokens back in the full sequence."""
        position, kept = self.settings.tokens_out, self.ids.expand(len(self.full), -1)
        x = output_tokens(out, position)
        if x.shape[1] != kept.shape[1]:  # costs nothing when compiled: shapes are known while tracing
            raise RoutingError(
                f'{self.settings.path}: {kept.shape[1]} tokens went onto the route and {x.shape[1]} came off it, so '
                'their places are not known: a block, or the model between two blocks, adds or drops tokens. End the '
                'route before that block'
            )
        restored = put_back(self.full, x, kept)  # [B, K, D] -> [B, N, D]
        if self.watched:
            self.stretch.present = None
        if self.probe is not None:
            self._end_probe(self.probe, restored)
        if isinstance(out, Tensor):
            return restored
        assert position is not None  # output_tokens refuses a tuple without one
        return (*out[:position], restored, *out[position + 1 :])

    def _end_probe(self, probe: Probe, restored: Tensor) -> None:
        self.probe = None
        self.stretch.conclusive = bool(self.stretch.conclusive) or probe.conclusive
        probe.end(restored)
        if probe.hooks and self.stretch.forwards == 1:
            kept, total = self.counts
            hooks = '; '.join(f'{name} on {count} of them' for name, count in sorted(probe.hooks.items()))
            warnings.warn(
                f'{self.settings.path}: blocks of the route have hooks, which see {kept} of {total} tokens ({hooks}). '
                'tap_blocks hands out what a block returned together with the ids of the kept tokens',
                stacklevel=2,
            )
