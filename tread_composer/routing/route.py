"""Where tokens leave and return, and how many of them: the settings of a route."""

import dataclasses
import itertools
import numbers
from collections.abc import Sequence

from tread_composer.routing.tokens import AlwaysKeep, count_kept

__all__ = ['Route', 'check_routes', 'parts_within']


@dataclasses.dataclass(frozen=True)
class Route:
    """A shortcut around the blocks ``start..end``, taken by a random share of the tokens while training.

    r_{i->j} of TREAD (arXiv 2501.04765, section 3): just before block ``start`` a random subset of the tokens is set
    aside unchanged, the other ("kept") tokens go through the blocks ``start..end``, **both inclusive**, and after
    block ``end`` the set-aside ("routed") tokens are put back at their own places.

    Args:
        start: First block on the route; negative counts from the end.
        end: Last block on the route, inclusive; ``-4`` of 28 blocks is block 24, the paper's B - 4.
        selection_rate: Share of the tokens that take the route, i.e. skip the blocks; ``0 <= selection_rate < 1``.
            Of ``N`` tokens that may skip ``int(N * selection_rate)`` are routed.

    Raises:
        ValueError: A value is of the wrong type or outside of its range.
    """

    start: int = 2  # the defaults are the paper's placement and rate, for every depth
    end: int = -4
    selection_rate: float = 0.5

    def __post_init__(self) -> None:
        for name in ('start', 'end'):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Integral):
                raise ValueError(f'{name}: {value!r} is not a block number; give an integer (negative: from the end)')
        rate = self.selection_rate  # 1 would leave no token on the blocks
        if isinstance(rate, bool) or not isinstance(rate, numbers.Real) or not 0 <= rate < 1:
            raise ValueError(
                f'selection_rate: {rate!r} is not in [0, 1); it is the share of tokens that skip the blocks, '
                'for example 0.5 (0 routes nothing)'
            )

    def span(self, depth: int) -> tuple[int, int]:
        """First and last block of the route in a model of ``depth`` blocks, both counted from 0.

        Raises:
            ValueError: The route does not lie within the model.
        """
        # -4 of 28 is block 24.
        start, end = (index + depth if index < 0 else index for index in (self.start, self.end))
        if not 0 <= start <= end < depth:
            raise ValueError(
                f'the route from block {self.start} to block {self.end} does not fit {depth} blocks: it would run '
                f'from {start} to {end}, and 0 <= start <= end <= {depth - 1} must hold'
            )
        return start, end

    def num_kept(self, num_tokens: int, always_keep: AlwaysKeep = 0) -> int:
        """Tokens that stay on the blocks, out of ``num_tokens``: ``N - int(N * selection_rate)``.

        With ``always_keep`` tokens that never skip, N counts the others, and those are added.
        """
        return count_kept(num_tokens, self.selection_rate, always_keep)


def check_routes(routes: Sequence[Route], depth: int) -> list[tuple[int, int]]:
    """The spans of several routes in a model of ``depth`` blocks.

    Raises:
        ValueError: There is no route, one does not fit, or two overlap or stand in the wrong order.
    """
    if not routes:
        raise ValueError('routes: there is none; give at least one Route')
    spans = [route.span(depth) for route in routes]
    # Ends are inclusive: a route that starts at the end of the one before would share that block.
    for (_, end), (start, _) in itertools.pairwise(spans):
        if start <= end:
            raise ValueError(
                f'the routes {spans} overlap or are out of order in {depth} blocks: each must start after the one '
                'before it has ended'
            )
    return spans


def parts_within(spans: Sequence[tuple[int, int]], offset: int, depth: int) -> list[tuple[int, int, int]]:
    """Number of the route, first and last block of the parts of routes in a list of ``depth`` blocks behind others."""
    return [
        (route, max(start - offset, 0), min(end - offset, depth - 1))
        for route, (start, end) in enumerate(spans)
        if start < offset + depth and end >= offset
    ]
