"""``Routing``: what a routed block list is armed with, and the handle of whoever routes a model.

Shapes: B samples, N tokens, K kept tokens, D width.
"""

import contextlib
import dataclasses
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tread_composer.routing.arguments import ListSettings
from tread_composer.routing.passes import Pass, Stretch
from tread_composer.routing.route import Route, parts_within
from tread_composer.routing.tokens import sample_kept, with_ends

__all__ = ['KeptSampler', 'Routing', 'RoutingSettings']

KeptSampler = Callable[[int, int, int], Tensor]


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
            'token_arguments': [[str(argument) for argument in part.token_arguments] for part in self.lists],
            **{name: [getattr(part, name) for part in self.lists] for name in ('tokens_out', 'always_keep')},
            **{name: getattr(self, name) for name in ('shared', 'ordered', 'float32_after')},
        }


class Routing:
    """What a routed model is armed with: which tokens are kept in the present forward pass.

    ``apply_tread`` makes it. By default each training forward draws its own routes from the global generator. To
    decide yourself, call ``arm`` before the forward pass; to train densely, call ``disarm``. ``settings``, what was
    asked for, does not change.
    """

    def __init__(self, settings: RoutingSettings) -> None:
        self.settings = settings
        # Copied once: what a compiled forward reads are plain attributes.
        self.routes, self.spans, self.shared = settings.routes, settings.spans, settings.shared
        self.paths = tuple(part.path for part in settings.lists)
        self.always_keep = settings.lists[0].always_keep  # number of leading and trailing tokens that never skip
        depths = [part.depth for part in settings.lists]
        # Number of the first block of each list, counted through all of them.
        offsets = list(itertools.accumulate(depths[:-1], initial=0))
        parts = [parts_within(settings.spans, *place) for place in zip(offsets, depths, strict=True)]
        self.stretches = tuple(tuple(Stretch(*part) for part in within) for within in parts)  # list by list
        # The paper's code leaves autocast for the block behind a route, where both kinds of tokens meet again.
        ends = [end for _, end in settings.spans if settings.float32_after]
        self.float32_blocks = tuple(tuple(end + 1 - offset for end in ends) for offset in offsets)
        self.kept: tuple[Tensor, ...] | None = None  # armed ids of each route, [B, K] or [1, K]
        self.num_tokens: int | None = None  # N that they were drawn for
        self.sampler: KeptSampler | None = self.sample
        self.in_evaluation = False

    @property
    def used(self) -> bool:
        """Whether a forward pass has been along all routes, in all lists."""
        return not self.unused_paths

    @property
    def unused_paths(self) -> list[str]:
        """The block lists with a route that no forward pass has been along."""
        parts = zip(self.paths, self.stretches, strict=True)
        return [path for path, stretches in parts if not all(stretch.used for stretch in stretches)]

    @property
    def checked(self) -> bool | None:
        """Whether the blocks were found to be sound: None before a probe, False if rounding hid what they do."""
        verdicts = [stretch.conclusive for stretch in itertools.chain(*self.stretches)]
        return None if None in verdicts else all(verdicts)

    def sample(self, route: int, batch_size: int, num_tokens: int) -> Tensor:
        """Kept ids for ``routes[route]`` from the global generator: the default sampler."""
        rate = self.routes[route].selection_rate
        return sample_kept(1 if self.shared else batch_size, num_tokens, rate, always_keep=self.always_keep)

    def arm(
        self,
        kept: Sequence[Tensor] | None = None,
        *,
        num_tokens: int | None = None,
        sampler: KeptSampler | None = None,
    ) -> None:
        """Route the following training forwards.

        Args:
            kept: For each route the kept ids ``[B, K]``, ascending, drawn out of ``num_tokens``; ``[1, K]`` for all
                samples of a shared route.
            num_tokens: Length of the sequences that ``kept`` was drawn for.
            sampler: ``sampler(route, batch_size, num_tokens) -> ids`` for sequences of any other length. It must
                return the same ids when asked again within one step: a recomputed forward does ask again.
        """
        if kept is not None and (num_tokens is None or len(kept) != len(self.routes)):
            raise ValueError(f'arm() needs num_tokens and one tensor of ids for each of the {len(self.routes)} routes')
        self.kept = None if kept is None else tuple(kept)
        self.num_tokens, self.sampler = num_tokens, sampler

    def disarm(self) -> None:
        """Run the following training forwards densely."""
        self.kept = self.num_tokens = self.sampler = None

    @property
    def armed(self) -> bool:
        """Whether the next training forward is routed."""
        return self.kept is not None or self.sampler is not None

    @contextlib.contextmanager
    def forced(self, kept: Sequence[Tensor], *, num_tokens: int) -> Iterator[None]:
        """Route each forward pass inside of the context, in evaluation mode too, along these ids (see ``arm``).

        Afterwards, and after an exception, all is as it was before. How many tokens are kept is up to ``kept``, not to
        the routes' selection rates.
        """
        # Sampling within training (a callback, sparse guidance) must leave no trace on the armed batch.
        before = self.kept, self.num_tokens, self.sampler, self.in_evaluation
        used = [(stretch, stretch.used) for stretch in itertools.chain(*self.stretches)]
        try:
            self.arm(kept, num_tokens=num_tokens)
            self.in_evaluation = True
            yield
        finally:
            self.kept, self.num_tokens, self.sampler, self.in_evaluation = before
            for stretch, was_used in used:
                stretch.used = was_used

    def kept_ids(self, route: int, x_BND: Tensor, number: int = 0) -> Tensor:
        """The ids kept on ``routes[route]`` for the tokens that enter it: ``[B, K]`` or, of a shared route, ``[1, K]``.

        Ids are armed and sampled for the first list; where list ``number`` has more or fewer tokens that never skip
        (text in front, say), the same of the rest stay in it. Ids for another length or number of samples are refused
        with a ``ValueError``.
        """
        fixed, drawn_fixed = self.settings.lists[number].always_keep, self.settings.lists[0].always_keep
        batch_size, num_tokens = x_BND.shape[0], x_BND.shape[1] - sum(fixed) + sum(drawn_fixed)
        kept = self.kept[route] if self.kept is not None and num_tokens == self.num_tokens else None
        if kept is not None and self.sampler is not None and not torch.compiler.is_compiling():
            # Two views or the frames of a video may be samples of the blocks: their ids are drawn anew.
            kept = kept if kept.shape[0] in (1, batch_size) else None
        if kept is None:  # nothing armed, or ids of another length
            if self.sampler is None:
                raise ValueError(
                    f'the kept ids were drawn for {self.num_tokens} tokens, the block list got {num_tokens}'
                )
            kept = self.sampler(route, batch_size, num_tokens).to(x_BND.device)
        if kept.shape[0] != batch_size and not (self.shared and kept.shape[0] == 1):
            raise ValueError(f'kept ids for {kept.shape[0]} samples, but the block list got {batch_size} samples')
        should_skip = self.routes[route].selection_rate > 0 and not self.in_evaluation
        if kept.shape[1] == num_tokens and should_skip and not torch.compiler.is_compiling():
            warnings.warn(
                f'nothing is skipped on route {route}: the block list got {num_tokens} tokens for each of {batch_size} '
                'samples, and all of them are kept. Tokens must be [B, N, D], samples first (batch_first=True), and '
                'enough of them for the selection rate',
                stacklevel=2,
            )
        if fixed == drawn_fixed:
            return kept
        # Ids of tokens that may skip, moved from behind the first list's leading tokens to behind this one's.
        free = kept[:, drawn_fixed[0] : kept.shape[1] - drawn_fixed[1]] - drawn_fixed[0] + fixed[0]
        return with_ends(free, x_BND.shape[1], *fixed)

    def passes(self, number: int, offset: int, count: int, *, training: bool) -> dict[int, Pass]:
        """The pass through each block on a route, for a walk over ``count`` blocks of a list; with state of its own.

        A slice that ends within a route puts the tokens back at its own end.
        """
        settings, probed = self.settings.lists[number], not self.settings.ordered
        # What only an eager forward can do, and only training needs.
        watched = training and not torch.compiler.is_compiling()
        passes: dict[int, Pass] = {}
        for stretch in self.stretches[number]:
            start, end = max(stretch.start, offset), min(stretch.end, offset + count - 1)
            if start <= end:  # it lies in what is walked
                ids = functools.partial(self.kept_ids, stretch.route, number=number)
                route = Pass(settings, stretch, start, end, ids, probed, watched)
                passes.update(dict.fromkeys(range(start, end + 1), route))
        return passes
