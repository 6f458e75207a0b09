"""The settings of a routed model, frozen: what changes from batch to batch is in ``routing``."""

import dataclasses

from tread_composer.routing.arguments import Argument, TokenArgument
from tread_composer.routing.route import Route

__all__ = ['ListSettings', 'RoutingSettings']


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
class RoutingSettings:
    """The arguments of ``apply_tread``, resolved for one model.

    Args:
        lists: The block lists in the order in which the model runs them; their blocks are counted through.
        routes: Disjoint routes in order of depth.
        spans: First and last block of each route.
        shared: All samples have the same route; kept ids are ``[1, K]``.
        ordered: The blocks need ascending tokens; they are not probed.
        float32_after: Run the one block behind each route without autocast, in float32.
    """

    lists: tuple[ListSettings, ...]
    routes: tuple[Route, ...]
    spans: tuple[tuple[int, int], ...]
    shared: bool = False
    ordered: bool = False
    float32_after: bool = False

    def differences(self, requested: 'RoutingSettings') -> list[str]:
        """One line for each setting that differs: ``name: present value, requested: value``."""
        pairs = zip(self._words().items(), requested._words().values(), strict=True)
        return [f'{name}: {value!r}, requested: {target!r}' for (name, value), target in pairs if value != target]

    def _words(self) -> dict[str, object]:
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
