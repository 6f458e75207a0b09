"""Where a route should be: by rule, the authors' and ours where that ends; and what a similarity map says about routes.

A map is evidence, not truth: no route has been trained to test the score. A depth is a place between blocks: depth 0
is behind the embedding, depth k behind block k - 1. A route over the blocks ``start..end`` takes tokens from depth
``start`` and hands them back, unchanged, at depth ``end + 1``.
"""

import contextlib
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from tread_composer.core.errors import UserError
from tread_composer.core.named import import_named
from tread_composer.routing import FoundSettings, Route, RoutingError, find_blocks, find_settings, routing_of

__all__ = [
    'SCORE_RULE', 'Candidate', 'RouteAdvice', 'candidate_spans', 'format_advice', 'inspect_model', 'propose_route',
    'rank_routes', 'read_route', 'recommended_route',
]  # fmt: skip

SCORE_RULE = 'score = similarity of the tokens where the route starts and where it ends x share of the blocks on it'

_FEWEST_FOR_AUTHORS = 8  # below, their rule leaves two blocks or fewer to the route
_RATE = 0.5
_BEFORE, _AFTER = 1 / 6, 1 / 4  # shares of the blocks that the authors' rule keeps dense in 12 blocks: 2 and 3
_WIDTH = 110  # characters of a line


@dataclass(frozen=True)
class RouteAdvice:
    """A route by rule, for any model of so many blocks or for one whose list was looked at."""

    depth: int  # blocks of the model
    route: Route | None  # None where there are too few blocks for one
    rule: Literal['authors', 'scaled', 'none']  # TREAD's, ours
    reasons: tuple[str, ...]  # a sentence each
    arguments: Mapping[str, Any] = field(default_factory=dict)  # for `Tread`, of a list that was looked at

    @property
    def span(self) -> tuple[int, int] | None:
        """First and last block of the route, both counted from 0."""
        return None if self.route is None else self.route.span(self.depth)


def recommended_route(depth: int) -> RouteAdvice:
    """The route for a model of ``depth`` blocks.

    From 8 blocks on the authors' (TREAD, arXiv 2501.04765): block 2 to block B - 4, both included, at rate 0.5, for
    every depth. With fewer, a scaled rule of ours, which nobody has studied: about a sixth of the blocks stays dense
    before the route and a quarter behind it, as in 12 blocks by the authors' rule, and one at least on either side.
    """
    if depth >= _FEWEST_FOR_AUTHORS:
        return RouteAdvice(depth, Route(2, -4, _RATE), 'authors', _AUTHORS_REASONS)
    before, after = (max(1, int(depth * share + 0.5)) for share in (_BEFORE, _AFTER))  # a half is rounded up
    if depth - before - after < 1:
        reason = f'{depth} blocks: with a dense block on either side none is left to route; train densely'
        return RouteAdvice(depth, None, 'none', (reason,))
    text = (
        f"our rule, not the authors': theirs (2 to B - 4) leaves {max(0, depth - 5) or 'none'} of {depth} blocks, so "
        f'their dense shares in 12 blocks are scaled: {before} before the route and {after} behind it. Nobody has '
        'measured routes in so few blocks; compare with a dense run'
    )
    return RouteAdvice(depth, Route(before, -1 - after, _RATE), 'scaled', (text, *_GUIDELINES))


def candidate_spans(depth: int) -> list[tuple[int, int]]:
    """First and last blocks of all routes that keep to the guidelines, in order.

    They start at block 1 or later, end where `recommended_route` ends or earlier, and are at least half as long as the
    longest such route (in the authors' study shorter ones gained little or lost).
    """
    route = recommended_route(depth).route
    if route is None:
        return []
    last_block = route.span(depth)[1]
    shortest = (last_block + 1) // 2
    starts = range(1, last_block - shortest + 2)
    return [(start, end) for start in starts for end in range(start + shortest - 1, last_block + 1)]


def propose_route(model: nn.Module, blocks: str | None = None) -> RouteAdvice:
    """Propose a route for a model, which is neither run nor changed, and say why.

    Its weights may be on the meta device. ``blocks`` is the path of its list of blocks, where there are several.

    Raises:
        ValueError: The list is not found (the message names the candidates), or is empty.
    """
    path, block_list = find_blocks(model, blocks)
    advice = recommended_route(len(block_list))
    reasons = [f'{path or "the model itself"}: {advice.depth} blocks', *advice.reasons]
    routing = routing_of(model)
    if routing is not None:
        spans = ', '.join(f'{start} to {end}' for start, end in routing.spans)
        reasons.append(f'the model is routed already (blocks {spans}); another route needs a fresh copy')
    arguments: dict[str, Any] = {}
    if advice.route is not None:
        arguments = {**asdict(advice.route), 'blocks': path}
        with contextlib.suppress(ValueError):  # it needs no name where it is found without
            find_blocks(model)
            del arguments['blocks']
    return replace(advice, reasons=tuple(reasons), arguments=arguments)


class Candidate(NamedTuple):
    """A route that keeps to the guidelines, first and last block."""

    start: int
    end: int
    similarity: float  # mean cosine of the same token at depth `start` and at depth `end + 1`
    score: float  # similarity times the share of the model's blocks that are on the route


def rank_routes(similarity: Tensor) -> list[Candidate]:
    """All routes that keep to the guidelines (``candidate_spans``), best score first; the earlier start among equals.

    The score is ``similarity[start, end + 1] * (end - start + 1) / L`` of the map ``[L + 1, L + 1]`` of L blocks. Its
    two factors are what a route needs and what it is for: tokens that skip are handed to block ``end + 1`` as they were
    at ``start``, and the blocks between are the arithmetic that is saved.
    """
    depth = len(similarity) - 1
    candidates = []
    for start, end in candidate_spans(depth):
        alike = float(similarity[start, end + 1])
        candidates.append(Candidate(start, end, alike, alike * (end - start + 1) / depth))
    return sorted(candidates, key=lambda candidate: (-candidate.score, candidate.start))


def read_route(similarity: Tensor, start: int, end: int) -> dict[str, float]:
    """What the map ``[L + 1, L + 1]`` of L blocks says about the route from block ``start`` to ``end``, inclusive.

    Mean cosines of the same token at two depths: ``ends``, where tokens leave the route's blocks and where they return;
    ``outputs_mean`` and ``outputs_lowest``, depth ``start`` and the output of each block of the route, which become
    alike with a route (the paper's observation); ``all_pairs`` of different depths, to hold the others against.
    """
    depth = len(similarity) - 1
    outputs = similarity[start, start + 1 : end + 2]  # row of depth start: behind each block of the route
    off_diagonal = similarity.sum() - similarity.diagonal().sum()
    return {
        'start': start,
        'end': end,
        'ends': float(outputs[-1]),
        'outputs_mean': float(outputs.mean()),
        'outputs_lowest': float(outputs.min()),
        'all_pairs': float(off_diagonal / (depth * (depth + 1))),
    }


def inspect_model(reference: str, blocks: str | None = None) -> FoundSettings:
    """Run a model densely and routed; what it prints as is the call of ``Tread`` that routes it.

    ``reference`` is ``package.module:function``, called without arguments: it returns a model and ``run(model)``.
    ``blocks`` is the dotted name of the block list; the only one if None.

    Raises:
        UserError: The function is not there or does not return these two, or the model cannot be routed.
    """
    try:
        function = import_named(reference)
    except ImportError as error:
        raise UserError(
            f'{reference}: {error}; write package.module:function, for example my_package.models:small_model. Python '
            'must be able to import it: start the command in its folder, or set PYTHONPATH'
        ) from None
    pair = function()
    types = [type(part).__name__ for part in (pair if isinstance(pair, tuple) else [pair])]
    if len(types) != 2 or not isinstance(pair[0], nn.Module) or not callable(pair[1]):
        raise UserError(
            f'{reference}: returns {", ".join(types)}; it must return a torch.nn.Module and run(model), a pair'
        )
    try:
        settings = find_settings(*pair, blocks=blocks)
    except (ValueError, RoutingError) as error:
        raise UserError(f'{reference}: {error}') from None
    if settings.fault is not None:
        raise UserError(f'{reference}: {settings}')
    return settings


def format_advice(advice: RouteAdvice) -> str:
    """The advice as lines for a terminal."""
    if advice.span is None:
        lines = ['proposed: no route']
    else:
        start, end = advice.span
        call = ', '.join(f'{name}={value!r}' for name, value in advice.arguments.items())
        lines = [f'proposed: blocks {start} to {end} of 0 to {advice.depth - 1}, Tread({call})']
    wrapper = textwrap.TextWrapper(_WIDTH, initial_indent='  because  ', subsequent_indent=' ' * 11)
    return '\n'.join([*lines, *map(wrapper.fill, advice.reasons)])


_GUIDELINES = (
    'not from block 0: in the study (DiT-B/2, 12 blocks) 0 to 8 gained 16 points of FID, 1 to 8 and 2 to 8 almost 22',
    'long: 2 to 8 gained 22, 4 to 8 14, 5 to 8 5, and 6 to 8 lost 1',
    'not into the last blocks: 0 to 9 gained 15 and 0 to 10 lost 7',
)
_AUTHORS_REASONS = (
    "the authors' rule: block 2 to block B - 4, rate 0.5, for every depth (12, 24 and 28 in the paper); the same route "
    'in shares of the depth did not carry over from B to XL (FID 18.81 against 7.38)',
    *_GUIDELINES,
    'rate 0.5: 0.25 gained less (FID 26.5 against 21.3) and 0.75 lost (49.3; dense 43.5)',
)
