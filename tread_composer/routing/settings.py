"""The settings of a routed model, frozen: what changes from batch to batch is in ``routing``."""

import dataclasses

from tread_composer.routing.arguments import Argument, TokenArgument
from tread_composer.routing.route import Route

__all__ = ['ListSettings', 'RoutingSettings']


@dataclasses.dataclass(frozen=True)
class ListSettings:
    """How the blocks of one list take and return their tokens."""

    path: str  # dotted name of the list within the model
    depth: int  # number of its blocks
    tokens: Argument  # carries the tokens [B, N, D]
    tokens_out: int | None  # position of the tokens in a block's tuple output; None where the output is a tensor
    token_arguments: tuple[TokenArgument, ...]  # further arguments with one entry per token
    always_keep: tuple[int, int]  # number of leading and of trailing tokens that never skip


@dataclasses.dataclass(frozen=True)
class RoutingSettings:
    """The arguments of ``apply_tread``, resolved for one model."""

    lists: tuple[ListSettings, ...]  # in the order in which the model runs them; their blocks are counted through
    routes: tuple[Route, ...]  # disjoint, in order of depth
    spans: tuple[tuple[int, int], ...]  # first and last block of each route
    shared: bool  # all samples have the same route: kept ids are [1, K]
    ordered: bool  # the blocks need ascending tokens; they are not probed
    float32_after: bool  # the one block behind each route runs without autocast, in float32

    def words(self) -> dict[str, object]:
        """The settings as a user wrote them: numbers and names, no tuples of dataclasses."""
        spans = zip(self.spans, self.routes, strict=True)
        return {
            'blocks': [part.path for part in self.lists],
            'routes': [f'{start} to {end} at rate {route.selection_rate}' for (start, end), route in spans],
            'tokens': [part.tokens.name for part in self.lists],
            'tokens_out': [part.tokens_out for part in self.lists],
            'token_arguments': [[str(argument) for argument in part.token_arguments] for part in self.lists],
            'always_keep': [part.always_keep for part in self.lists],
            **{name: getattr(self, name) for name in ('shared', 'ordered', 'float32_after')},
        }
