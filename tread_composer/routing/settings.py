"""What was asked of a routed model: frozen, and on the floor below whatever changes from batch to batch."""

import dataclasses
from collections.abc import Sequence

from tread_composer.routing.arguments import Argument, TokenArgument
from tread_composer.routing.route import Route

__all__ = ['ListSettings', 'RoutingSettings', 'Segment']


@dataclasses.dataclass(frozen=True)
class ListSettings:
    """How the blocks of one list take and return their tokens.

    Args:
        path: Dotted name of the block list within the model.
        depth: Number of its blocks.
        tokens: The block's argument that carries the tokens.
        tokens_out: Position of the tokens in a block's tuple output, counted from 0; None where the output is a tensor.
        token_arguments: Further block arguments with one entry per token.
        always_keep: Number of leading and of trailing tokens that never skip.
    """

    path: str
    depth: int
    tokens: Argument
    tokens_out: int | None = None
    token_arguments: tuple[TokenArgument, ...] = ()
    always_keep: tuple[int, int] = (0, 0)


@dataclasses.dataclass(frozen=True)
class Segment:
    """The part of a route that lies in one block list, both ends inclusive and counted within that list.

    Args:
        path: Dotted name of the block list, for messages.
        route: Number of the route.
        start: First block.
        end: Last block.
    """

    path: str
    route: int
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class RoutingSettings:
    """All that ``apply_tread`` was asked for.

    Args:
        lists: The block lists in the order in which the model runs them; their blocks are counted through.
        routes: Disjoint routes in order of depth.
        spans: Their first and last blocks.
        shared: All samples have the same route, and ids are ``[1, K]``; ``[B, K]`` is fine as long as no argument
            lacks a dimension for the samples.
        ordered: The blocks need ascending tokens; they are not probed.
        float32_after: Run the one block behind each route without autocast, in float32.
    """

    lists: tuple[ListSettings, ...]
    routes: tuple[Route, ...]
    spans: tuple[tuple[int, int], ...]
    shared: bool = False
    ordered: bool = False
    float32_after: bool = False

    @property
    def paths(self) -> tuple[str, ...]:
        """Dotted names of the block lists."""
        return tuple(one.path for one in self.lists)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Number of the first block of each list, counted through all of them."""
        return tuple(sum(one.depth for one in self.lists[:number]) for number in range(len(self.lists)))

    def segments(self) -> tuple[tuple[Segment, ...], ...]:
        """What lies of each route in each list, list by list."""
        return tuple(
            tuple(
                Segment(one.path, route, max(start - offset, 0), min(end - offset, one.depth - 1))
                for route, (start, end) in enumerate(self.spans)
                if start < offset + one.depth and end >= offset
            )
            for one, offset in zip(self.lists, self.offsets, strict=True)
        )

    def differences(self, asked: 'RoutingSettings') -> list[str]:
        """What differs from other settings, one line each: ``name: value here, value asked for``."""
        return [
            f'{name}: {present!r} there, {wanted!r} now'
            for (name, present), wanted in zip(self._words().items(), asked._words().values(), strict=True)
            if present != wanted
        ]

    def _words(self) -> dict[str, object]:
        """The settings as a user wrote them."""
        return {
            'blocks': list(self.paths),
            'routes': [f'{start} to {end} at rate {r.selection_rate}' for (start, end), r in self._placed()],
            'tokens': [one.tokens.name for one in self.lists],
            'tokens_out': [one.tokens_out for one in self.lists],
            'token_arguments': [[str(argument) for argument in one.token_arguments] for one in self.lists],
            'always_keep': [one.always_keep for one in self.lists],
            'shared': self.shared,
            'ordered': self.ordered,
            'float32_after': self.float32_after,
        }

    def _placed(self) -> Sequence[tuple[tuple[int, int], Route]]:
        return list(zip(self.spans, self.routes, strict=True))
