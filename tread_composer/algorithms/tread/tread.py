"""``Tread``: draws a fresh route for every batch and hands it to the model's block list."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor, nn

from tread_composer.algorithms.base import AlgorithmBase
from tread_composer.algorithms.schedule import Window
from tread_composer.core.batch import KEPT_TOKENS, SAMPLE_IDS
from tread_composer.core.bounds import AtLeast1
from tread_composer.core.errors import UserError
from tread_composer.core.options import check_bounds
from tread_composer.core.randomness import KeyedRandom
from tread_composer.routing import (
    Route,
    Routing,
    RoutingError,
    TokenArguments,
    apply_tread,
    check_routes,
    find_blocks,
    keep_lowest,
)
from tread_composer.routing.arguments import kind, tensors_in
from tread_composer.routing.tokens import AlwaysKeep, both_ends

__all__ = ['Tread']

log = logging.getLogger(__name__)

# Settings that are handed to ``apply_tread`` as they are.
_OF_ROUTING = (
    'blocks', 'tokens', 'tokens_out', 'token_arguments', 'always_keep', 'shared', 'ordered', 'float32_after',
)  # fmt: skip


class Tread(AlgorithmBase):
    """Train with a random share of the tokens skipping most of the blocks (TREAD, arXiv 2501.04765).

    On ``Event.INIT`` the model's block list is routed (see ``tread_composer.routing.apply_tread``); parameters and
    state-dict keys do not change, evaluation is dense. On ``Event.BATCH_START`` the kept tokens of the whole device
    batch are drawn, another set for each sample, keyed by (seed, batch, sample): they are the same after a resume, an
    out-of-memory retry or with another microbatch size. A sample is known by its entry ``sample_ids`` if the batch has
    one, else by its place in the global batch.

    Logs ``tread/kept_tokens`` (all tokens while routing is off) and ``tread/selection_rate``; with several routes,
    ``tread/route_<k>/...`` for each.

    Args beside those of ``apply_tread``:
        start: First block on the route; negative counts from the end.
        end: Last block on the route, inclusive. The authors' placement is 2 to -4 for every depth.
        selection_rate: Share of the tokens that skip the blocks, in [0, 1).
        routes: Several disjoint routes in order of depth, instead of the three above.
        start_time: Composer time string from which on tokens are routed; from the beginning if None.
        end_time: Composer time string from which on routing is off, for example ``'0.92dur'`` (the paper's stage
            (F)); never if None.
        num_tokens: N, where the module around the block list has no attribute ``num_tokens``. Learnt in the first
            forward pass if None, which ``torch.compile(fullgraph=True)`` cannot trace.

    Raises:
        ValueError: A setting is wrong in itself; on ``Event.INIT``, one that does not fit the model.

    Example:
        ``Trainer(model=model, algorithms=[Tread()], ...)``
    """

    incompatible_with: ClassVar[Mapping[str, str]] = {
        'MaskDiT': 'both take tokens out of the same blocks, each as its own cure for the same cost: a route returns '
        'every token before a loss on all of them, and a token that MaskDiT has masked is not there to return',
    }

    instead_of_two: ClassVar[str] = 'One routes several lists: blocks=[...], and several times: routes=[...]'

    _routing: Routing  # since Event.INIT

    def __init__(
        self,
        start: int = 2,
        end: int = -4,
        selection_rate: float = 0.5,
        *,
        routes: Sequence[Route | Mapping[str, Any]] | None = None,
        start_time: str | None = None,
        end_time: str | None = None,
        blocks: str | Sequence[str] | Mapping[str, Mapping[str, Any] | None] | None = None,
        tokens: str | None = None,
        tokens_out: int | None = None,
        token_arguments: TokenArguments | None = None,
        always_keep: int | Sequence[int] = 0,
        shared: bool = False,
        ordered: bool = False,
        num_tokens: int | None = None,
        float32_after: bool = False,
    ) -> None:
        single = Route(start, end, selection_rate)
        if routes is not None and single != Route():
            raise ValueError(
                f'Tread: give either routes or start, end and selection_rate, not both ({routes}, {single})'
            )
        self.routes = (single,) if routes is None else _several(routes)
        self.start_time, self.end_time = start_time, end_time
        check_bounds('Tread: num_tokens', AtLeast1 | None, num_tokens)
        both_ends(always_keep)  # refuses what is neither a count nor a pair of counts
        # Plain copies, as a checkpoint and the representation have them; what is neither is refused on INIT.
        if isinstance(blocks, Mapping):
            self.blocks: Any = {path: dict(settings or {}) for path, settings in blocks.items()}
        else:
            self.blocks = blocks if blocks is None or isinstance(blocks, str) else list(blocks)
        self.tokens, self.tokens_out, self.num_tokens = tokens, tokens_out, num_tokens
        if isinstance(token_arguments, Mapping):
            token_arguments = dict(token_arguments)
        elif isinstance(token_arguments, Sequence) and not isinstance(token_arguments, str):
            token_arguments = tuple(token_arguments)
        self.token_arguments = token_arguments
        self.always_keep = always_keep if isinstance(always_keep, int) else list(always_keep)
        self.shared, self.ordered, self.float32_after = shared, ordered, float32_after
        self._window = Window(start_time, end_time, 'nothing would be routed')
        self._known_tokens = self._drawn_for = num_tokens
        self._random: tuple[int, int] = (0, 0)  # seed and batch
        self.active = False  # whether the batch in hand is routed
        self._rows: list[int] = []  # what tells the samples of the batch apart
        self._beside: Tensor | None = None  # ids [B, sum of K] of a batch that has no place for them
        self._offset = 0  # of the next microbatch
        self._looked = False

    def arguments(self) -> dict[str, Any]:
        """The arguments that make an equal one; a single route is one of ``routes``."""
        names = ('start_time', 'end_time', *_OF_ROUTING[:-1], 'num_tokens', 'float32_after')
        return {'routes': list(self.routes), **{name: getattr(self, name) for name in names}}

    def settings(self) -> dict[str, Any]:
        """What a checkpoint is bound to."""
        # The later ones only where they say something: a checkpoint from before there were any has no such keys.
        later = {'always_keep': self.always_keep, 'shared': self.shared}
        if isinstance(self.blocks, (list, dict)):
            later['blocks'] = self.blocks
        return {
            'routes': {f'{k}': dataclasses.asdict(route) for k, route in enumerate(self.routes)},
            'start_time': self.start_time,
            'end_time': self.end_time,
            'float32_after': self.float32_after,
            **{name: value for name, value in later.items() if value},
        }

    def problems(self, config: Any) -> Iterator[tuple[str, str]]:
        """What speaks against it in a run with this ``Config``: pairs of a setting ('' for all of it) and a text."""
        depth = config.depth()
        try:
            if depth is not None:
                check_routes(self.routes, depth)
        except ValueError as error:
            yield '', f'{error}; change the route or model.depth'
            return
        needed = config.token_arguments()
        written = needed if self.token_arguments is None else self.token_arguments  # the network says it itself
        missing = [name for name in needed if name not in written]
        if missing:
            yield (
                'token_arguments',
                f'{list(written)}, but a block of model {config.model.name!r} is also given {", ".join(missing)}, with '
                'a row for each token that says where it is in the image; the rows must follow the tokens that a route '
                'keeps. Leave token_arguments out, or write token_arguments: '
                f'[{", ".join(dict.fromkeys([*written, *needed]))}]',
            )

    def cost_window(self) -> tuple[str | None, str | None]:
        """Time strings from and until which tokens are saved; None: from the beginning, to the end."""
        return self.start_time, self.end_time

    def tokens_per_block(self, depth: int, num_tokens: int) -> list[int]:
        """How many tokens each block sees while routing is on."""
        counts = [num_tokens] * depth
        for route in self.routes:
            start, end = route.span(depth)
            counts[start : end + 1] = [route.num_kept(num_tokens, self.always_keep)] * (end - start + 1)
        return counts

    def plan_rows(self, plan: Mapping[str, Any]) -> dict[str, str]:
        """What ``plan`` prints of the route."""
        window = {'start_time': self.start_time, 'end_time': self.end_time}
        schedule = ''.join(f', {name} {time}' for name, time in window.items() if time)
        return {'route': '; '.join(plan['routes']) + schedule}

    @contextlib.contextmanager
    def rehearse(self, denoiser: Any, batch_size: int) -> Iterator[None]:
        """Route a network's training forwards, of shapes alone; ``UserError`` if it has no blocks of that name."""
        model = nn.Module()  # blocks are named as in the model around the network
        model.denoiser = denoiser
        for path in [self.blocks] if isinstance(self.blocks, str) else self.blocks or []:
            try:
                find_blocks(model, path)
            except ValueError as error:
                raise UserError(f"algorithms.tread.{error}. Here the block list is 'denoiser.blocks'") from None
        routing = apply_tread(denoiser, self.routes, always_keep=self.always_keep)
        counts = [route.num_kept(denoiser.num_tokens, self.always_keep) for route in self.routes]
        device = next(denoiser.parameters()).device
        kept = [torch.zeros(batch_size, count, dtype=torch.int64, device=device) for count in counts]
        routing.arm(kept, num_tokens=denoiser.num_tokens)
        try:
            yield
        finally:
            routing.disarm()

    def _on_init(self, state: State, logger: Logger) -> None:
        super()._on_init(state, logger)
        try:
            settings = {name: getattr(self, name) for name in _OF_ROUTING}
            self._routing = apply_tread(state.model, self.routes, **settings)
        except ValueError as error:
            raise UserError(f'algorithms.tread: {error}') from None
        self._routing.disarm()
        if self.num_tokens is None:
            path = self._routing.paths[0]
            guess = getattr(state.model.get_submodule(path.rpartition('.')[0]), 'num_tokens', None)
            self._known_tokens = guess if type(guess) is int and guess > sum(both_ends(self._keeps)) else None

    def _on_batch_start(self, state: State, logger: Logger) -> None:
        self.active, self._beside = self._window.holds(state), None
        if not self.active:
            self._routing.disarm()  # a forward pass that raised has left it armed
            return
        batch_size = _num_samples(state.batch)
        if isinstance(state.batch, dict) and SAMPLE_IDS in state.batch:
            self._rows = _sample_rows(state.batch[SAMPLE_IDS])
        else:  # places in the global batch
            begin = dist.get_global_rank() * batch_size
            self._rows = list(range(begin, begin + batch_size))
        self._random = (state.rank_zero_seed, int(state.timestamp.batch))
        self._drawn_for = self._known_tokens
        if self._known_tokens is not None:
            ids = [self._draw(self._rows, k, batch_size, self._known_tokens) for k in range(len(self.routes))]
            ids_BK = torch.cat(ids, dim=1).expand(batch_size, -1)  # K summed over the routes
            # In a dict the ids travel as one more entry; beside any other batch they are cut here, by microbatches.
            if type(state.batch) is dict:
                state.batch[KEPT_TOKENS] = ids_BK
            else:
                self._beside = ids_BK

    def _on_before_train_batch(self, state: State, logger: Logger) -> None:
        self._offset = 0  # also fires when Composer runs a batch again after it ran out of memory

    def _on_before_forward(self, state: State, logger: Logger) -> None:
        if not self.active:
            return
        ids = None
        if type(state.batch) is dict and KEPT_TOKENS in state.batch:
            ids = state.batch[KEPT_TOKENS]
            # A new dict: the device batch itself must keep its ids for a second try.
            state.batch = {key: value for key, value in state.batch.items() if key != KEPT_TOKENS}
        batch_size = _num_samples(state.batch)
        samples = slice(self._offset, self._offset + batch_size)
        self._offset += batch_size
        if self._beside is not None:
            ids = self._beside[samples]
        if ids is not None:
            assert self._drawn_for is not None  # there are no ids without it
            lengths = [route.num_kept(self._drawn_for, self._keeps) for route in self.routes]
            ids = ids[:1] if self.shared else ids
            ids = state.device.tensor_to_device(ids).split(lengths, dim=1)  # one [B, K] for each route
        # The sampler serves sequences of another length than the usual one; it is keyed, so it may be asked twice.
        sampler = functools.partial(self._draw, self._rows[samples])
        self._routing.arm(ids, num_tokens=self._drawn_for, sampler=sampler)

    def _on_after_forward(self, state: State, logger: Logger) -> None:
        routing = self._routing
        if self.active and not routing.used:
            raise RoutingError(
                'Tread: the training forward never iterated over the routed block list, so nothing was routed '
                f'({", ".join(routing.unused_paths)}). Tread needs a model that says `for block in self.blocks` (or '
                'enumerate, zip) or calls an nn.Sequential; one that indexes its blocks must be changed, or another '
                'list named with blocks=...'
            )
        if self.active and not self._looked:
            self._looked = True
            if routing.checked is None and not self.ordered:
                log.warning(
                    'Tread: the model is compiled as a whole, so its blocks were not checked (docs/your_model.md): '
                    'train a batch without torch.compile once, if this model never was'
                )

    def _on_after_backward(self, state: State, logger: Logger) -> None:
        # Not earlier: activation checkpointing around the whole list runs it again during backward.
        self._routing.disarm()

    def _on_batch_end(self, state: State, logger: Logger) -> None:
        for k, route in enumerate(self.routes):
            prefix = 'tread' if len(self.routes) == 1 else f'tread/route_{k}'
            metrics = {f'{prefix}/selection_rate': route.selection_rate if self.active else 0.0}
            if self._known_tokens is not None:
                kept = route.num_kept(self._known_tokens, self._keeps)
                metrics[f'{prefix}/kept_tokens'] = kept if self.active else self._known_tokens
            logger.log_metrics(metrics)

    def _draw(self, rows: Sequence[int], route: int, batch_size: int, num_tokens: int) -> Tensor:
        """Kept ids ``[batch_size, K]`` (``[1, K]`` if shared) on the CPU: lowest of uniform scores, all sets alike."""
        rows, copies = ([0], 1) if self.shared else (rows, batch_size // max(len(rows), 1))
        if not self.shared and copies * len(rows) != batch_size:
            raise RoutingError(
                f'Tread: the batch has {len(rows)} samples, but the block list got {batch_size}, which is no multiple '
                "(two views, folded frames). Tokens must be [B, N, ...], samples first: for torch's own transformer "
                'layers that is batch_first=True'
            )
        if self.num_tokens is None:
            # What a foreign module calls num_tokens may be its vocabulary; what its blocks got is certain.
            self._known_tokens = num_tokens
        random = KeyedRandom(*self._random, rows)
        # Views or frames of one sample are samples of the blocks: each has a route of its own.
        purposes = [f'tread/{route}', *(f'tread/{route}/{copy}' for copy in range(1, copies))]
        scores_BN = torch.cat([random.uniform(purpose, num_tokens) for purpose in purposes])
        num_kept = self.routes[route].num_kept(num_tokens, self._keeps)
        return keep_lowest(scores_BN, num_kept, always_keep=self._keeps)

    @property
    def _keeps(self) -> AlwaysKeep:
        """The tokens that never skip in the first list, for which ids are drawn."""
        return self._routing.always_keep


def _several(routes: Any) -> tuple[Route, ...]:
    """The setting ``routes``."""
    if isinstance(routes, (Route, Mapping)) or not isinstance(routes, Sequence):
        raise ValueError(f'Tread: routes: {routes!r} is no list of routes; write one, also for a single route: [...]')
    if not routes:
        raise ValueError('Tread: routes is empty; leave Tread out to train densely')
    settings = [entry.name for entry in dataclasses.fields(Route)]
    for route in routes:
        if not isinstance(route, Route) and not (isinstance(route, Mapping) and set(route).issubset(settings)):
            raise ValueError(f'Tread: routes: {route!r} is no route; write Route(...), or a mapping of {settings}')
    return tuple(route if isinstance(route, Route) else Route(**route) for route in routes)


def _sample_rows(ids: Any) -> list[int]:
    """What tells the samples of a batch apart, from its own entry; ``UserError`` if that means something else."""
    fits = isinstance(ids, Tensor) and ids.dim() == 1 and not (ids.is_floating_point() or ids.is_complex())
    rows = ids.tolist() if fits else []
    if not fits or min(rows, default=0) < 0:
        described = f'{kind(ids)}, {ids.dtype}' if isinstance(ids, Tensor) else kind(ids)
        raise UserError(
            f'Tread: the entry {SAMPLE_IDS!r} of the batch is {described}. Routes are drawn by it, so it must hold a '
            'whole number from 0 on for each sample, for example its place in the data set: a tensor [B]. If it is '
            "something else, give that another name; without the entry, routes are drawn by the samples' places in the "
            'batch'
        )
    return rows


def _num_samples(batch: Any) -> int:
    """The samples of a batch, counted by its first tensor that has dimensions."""
    for tensor in tensors_in(batch):
        if tensor.dim():
            return tensor.shape[0]
    raise ValueError(f'Tread: no tensor with samples in a batch of type {type(batch).__name__}')
