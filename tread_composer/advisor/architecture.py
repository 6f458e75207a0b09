"""A route for a model that we know nothing of: what its code tells, and what only its author can say.

Works on any ``nn.Module``, before or after training, without running it. Nothing is read from the names of classes. The
names of a block's arguments lead to questions, never to settings.
"""

import contextlib
import inspect
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tread_composer.advisor.placement import Rule, recommended_route
from tread_composer.routing import Route, find_blocks, routing_of

__all__ = ['RouteAdvice', 'format_advice', 'propose_route']

_PER_TOKEN = re.compile(r'(^|_)(mask|rope|rotary|freq|freqs|pos|position|positions|cos|sin|ids)(_|$)')
_WIDTH = 110
_OTHER_SEQUENCE = re.compile(r'^(encoder|context|cond|text|cross)(_|$)')


@dataclass(frozen=True)
class RouteAdvice:
    """A proposed route.

    Attributes:
        blocks: Path of the block list within the model.
        depth: Number of blocks.
        route: None where there are too few blocks for one.
        rule: ``'authors'`` (TREAD's), ``'scaled'`` (ours) or ``'none'``.
        arguments: Keyword arguments for ``Tread`` as far as they are known.
        reasons: Why, a sentence each.
        questions: What the code does not tell and the model's author must know, a sentence each.
    """

    blocks: str
    depth: int
    route: Route | None
    rule: Rule
    arguments: Mapping[str, Any]
    reasons: tuple[str, ...]
    questions: tuple[str, ...]


def propose_route(model: nn.Module, blocks: str | None = None) -> RouteAdvice:
    """Propose a route for a model, and say why.

    Looks at the list of blocks and at the signature of their ``forward``. The model is neither run nor changed, and its
    weights may be on the meta device.

    Args:
        model: Any module with a list of blocks.
        blocks: Path of the list; found if there is only one candidate.

    Raises:
        ValueError: The list is not found; the message names the candidates.
    """
    path, listed = find_blocks(model, blocks)
    depth = len(listed)
    if not depth:
        raise ValueError(f'blocks: {path!r} is empty; name a list of blocks')
    placement = recommended_route(depth)
    route = placement.route
    reasons = [f'{path or "the model itself"}: {depth} blocks', *placement.reasons]
    present = routing_of(model)
    if present is not None:
        now = ', '.join(f'{start} to {end}' for start, end in present.spans)
        reasons.append(f'the model is routed already (blocks {now}); another route needs a fresh copy')
    arguments: dict[str, Any] = {}
    questions: list[str] = []
    if route is not None:
        arguments = {'start': route.start, 'end': route.end, 'selection_rate': route.selection_rate}
        if not _is_found(model):
            arguments['blocks'] = path
        owner = model.get_submodule(path.rpartition('.')[0])
        known = tuple(getattr(owner, 'token_arguments', ()))
        if known:
            arguments['token_arguments'] = known
            reasons.append(f'token_arguments={known!r}: the model says so itself')
        start, end = route.span(depth)
        on_route = [listed[index] for index in range(start, end + 1)]
        questions = [*_about_blocks(on_route, start), *_about_signature(on_route[0], known), *_ALWAYS_ASKED]
    return RouteAdvice(path, depth, route, placement.rule, arguments, tuple(reasons), tuple(questions))


def format_advice(advice: RouteAdvice, *, questions: bool = True) -> str:
    """The advice for a terminal.

    Args:
        advice: What to print.
        questions: Print what the model's author should check, too.
    """
    if advice.route is None:
        lines = ['proposed: no route']
    else:
        start, end = advice.route.span(advice.depth)
        call = ', '.join(f'{name}={value!r}' for name, value in advice.arguments.items())
        lines = [f'proposed: blocks {start} to {end} of 0 to {advice.depth - 1}, Tread({call})']
    asked = advice.questions if questions else ()
    rows = [*(('because', reason) for reason in advice.reasons), *(('check', question) for question in asked)]
    lines += [
        textwrap.fill(text, _WIDTH, initial_indent=f'  {word:<9}', subsequent_indent=' ' * 11) for word, text in rows
    ]
    return '\n'.join(lines)


def _is_found(model: nn.Module) -> bool:
    """Whether the list is found without its path: there is one candidate only."""
    with contextlib.suppress(ValueError):
        find_blocks(model)
        return True
    return False


_ALWAYS_ASKED = (
    'the model calls its blocks by iterating over the list, not by index (Tread says so in the first training batch if '
    'it does not)',
    'each block takes any number of tokens: no table or window of a fixed length, no reshape to a grid',
    'tokens that are no part of the image (a class token, text) must not skip: see always_keep of Tread',
)


def _about_blocks(blocks: Sequence[nn.Module], start: int) -> list[str]:
    found = []
    if len({type(block) for block in blocks}) > 1:
        names = ', '.join(dict.fromkeys(type(block).__name__ for block in blocks))
        found.append(
            f'the route crosses blocks of several classes ({names}): all must take the arguments of block {start}'
        )
    sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
    if min(sizes) != max(sizes):
        found.append(
            f'its blocks have from {min(sizes):,} to {max(sizes):,} parameters: tokens must have one width from the '
            'start of the route to its end'
        )
    mixing = [
        name
        for name, module in blocks[0].named_modules()
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and max(_numbers(module.kernel_size)) > 1
    ]
    if mixing:
        found.append(
            f'{", ".join(mixing)}: a convolution mixes neighbours, and on a route other tokens are neighbours; in two '
            'dimensions it needs the whole grid, and such blocks cannot be routed'
        )
    return found


def _numbers(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple) else (int(value),)


def _about_signature(block: nn.Module, known: Sequence[str]) -> list[str]:
    signature = inspect.signature(block.forward)
    named = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and not isinstance(parameter.default, bool)  # a switch
    ]
    if not named:
        return ['the blocks do not name their arguments (a wrapper?): ask for the advice before they are wrapped']
    first, others = named[0], [name for name in named[1:] if name not in known]
    found = [f'tokens: {first!r}, the first argument of a block, holds them [B, N, D]; else say tokens=']
    suspects = [name for name in others if _PER_TOKEN.search(name) and not _OTHER_SEQUENCE.match(name)]
    strangers = [name for name in others if _OTHER_SEQUENCE.match(name)]
    rest = [name for name in others if name not in suspects and name not in strangers]
    if suspects:
        found.append(
            f'token_arguments: {", ".join(suspects)} may hold one entry for each token, by the name; those that are '
            f'[B, N, ...] must follow the kept tokens: token_arguments={suspects!r}'
        )
    if strangers:
        found.append(f'{", ".join(strangers)}: of another sequence, by the name; stays whole if it is')
    if rest:
        found.append(f'{", ".join(rest)}: one entry for each sample? If it is [B, N, ...], add it to token_arguments')
    return [*found, *_about_output(signature.return_annotation)]


def _about_output(annotation: Any) -> list[str]:
    text = '' if annotation is inspect.Signature.empty else str(getattr(annotation, '__name__', annotation))
    if 'tuple' in text.lower():
        return [f'the blocks return a tuple ({annotation}): say where the tokens are in it, for example tokens_out=0']
    if text.rpartition('.')[2] == 'Tensor':
        return []
    return ['the blocks return a tensor? If it is a tuple, say where the tokens are in it: tokens_out=0, for example']
