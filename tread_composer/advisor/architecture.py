"""A route for a model from its list of blocks alone, before or after training; nothing is run."""

import contextlib
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tread_composer.advisor.placement import Rule, recommended_route
from tread_composer.routing import Route, find_blocks, routing_of

__all__ = ['RouteAdvice', 'format_advice', 'propose_route']

_WIDTH = 110


@dataclass(frozen=True)
class RouteAdvice:
    """A proposed route.

    Attributes:
        blocks: Path of the block list within the model.
        depth: Number of blocks.
        route: None where there are too few blocks for one.
        rule: ``'authors'`` (TREAD's), ``'scaled'`` (ours) or ``'none'``.
        arguments: Keyword arguments for ``Tread`` that follow from the list and from what its owner declares; what the
            blocks' arguments mean, ``routing.find_settings`` measures.
        reasons: Why, a sentence each.
    """

    blocks: str
    depth: int
    route: Route | None
    rule: Rule
    arguments: Mapping[str, Any]
    reasons: tuple[str, ...]


def propose_route(model: nn.Module, blocks: str | None = None) -> RouteAdvice:
    """Propose a route for a model, which is neither run nor changed, and say why.

    Args:
        model: Any module with a list of blocks; its weights may be on the meta device.
        blocks: Path of the list; found if there is only one candidate.

    Raises:
        ValueError: The list is not found (the message names the candidates), or is empty.
    """
    path, block_list = find_blocks(model, blocks)
    depth = len(block_list)
    if not depth:
        raise ValueError(f'blocks: {path!r} is empty; name a list of blocks')
    placement = recommended_route(depth)
    reasons = [f'{path or "the model itself"}: {depth} blocks', *placement.reasons]
    routing = routing_of(model)
    if routing is not None:
        spans = ', '.join(f'{start} to {end}' for start, end in routing.spans)
        reasons.append(f'the model is routed already (blocks {spans}); another route needs a fresh copy')
    arguments: dict[str, Any] = {}
    if placement.route is not None:
        arguments = {name: getattr(placement.route, name) for name in ('start', 'end', 'selection_rate')}
        if not _is_unique(model):
            arguments['blocks'] = path
        owner = model.get_submodule(path.rpartition('.')[0])
        declared = tuple(getattr(owner, 'token_arguments', ()))
        if declared:
            arguments['token_arguments'] = declared
            reasons.append(f'token_arguments={declared!r}: declared by the model')
    return RouteAdvice(path, depth, placement.route, placement.rule, arguments, tuple(reasons))


def format_advice(advice: RouteAdvice) -> str:
    """The advice as lines for a terminal."""
    if advice.route is None:
        lines = ['proposed: no route']
    else:
        start, end = advice.route.span(advice.depth)
        call = ', '.join(f'{name}={value!r}' for name, value in advice.arguments.items())
        lines = [f'proposed: blocks {start} to {end} of 0 to {advice.depth - 1}, Tread({call})']
    wrapper = textwrap.TextWrapper(_WIDTH, initial_indent='  because  ', subsequent_indent=' ' * 11)
    return '\n'.join([*lines, *map(wrapper.fill, advice.reasons)])


def _is_unique(model: nn.Module) -> bool:
    """Whether the list is found without its path."""
    with contextlib.suppress(ValueError):
        find_blocks(model)
        return True
    return False
