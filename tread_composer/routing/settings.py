"""The settings of a routed model, frozen: what changes from batch to batch is in ``routing``."""

import dataclasses
from itertools import accumulate

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
    """The part of a route that lies in one block list, both ends inclusive and counted within that list."""

    path: str
    route: int
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class RoutingSettings:
    """The arguments of ``apply_tread``, resolved for one model.

    Args:
        lists: The block lists in the order in which the model runs them; their blocks are counted through.
        routes: Disjoint routes in order of depth.
        spans: First and last block of each route.
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
        return tuple(settings.path for settings in self.lists)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Number of the first block of each list, counted through all of them."""
        return tuple(accumulate((settings.depth for settings in self.lists[:-1]), initial=0))

    def segments(self) -> tuple[tuple[Segment, ...], ...]:
        """The part of each route in each list, list by list."""
        rows = []
        for settings, offset in zip(self.lists, self.offsets, strict=True):
            # Counted within the list: negative where a route begins in a list before.
            within = [(route, start - offset, end - offset) for route, (start, end) in enumerate(self.spans)]
            rows.append(
                tuple(
                    Segment(settings.path, route, max(start, 0), min(end, settings.depth - 1))
                    for route, start, end in within
                    if start < settings.depth and end >= 0
                )
            )
        return tuple(rows)

    def differences(self, requested: 'RoutingSettings') -> list[str]:
        """One line for each setting that differs: ``name: present value, requested: value``."""
        # In words: users wrote numbers and names, not tuples of dataclasses.
        values = zip(self._words().items(), requested._words().values(), strict=True)
        return [f'{name}: {value!r}, requested: {target!r}' for (name, value), target in values if value != target]

    def _words(self) -> dict[str, object]:
        """The settings as a user wrote them."""
        spans = zip(self.spans, self.routes, strict=True)
        return {
            'blocks': list(self.paths),
            'routes': [f'{start} to {end} at rate {route.selection_rate}' for (start, end), route in spans],
            'tokens': [settings.tokens.name for settings in self.lists],
            'tokens_out': [settings.tokens_out for settings in self.lists],
            'token_arguments': [[str(argument) for argument in settings.token_arguments] for settings in self.lists],
            'always_keep': [settings.always_keep for settings in self.lists],
            'shared': self.shared,
            'ordered': self.ordered,
            'float32_after': self.float32_after,
        }
