"""Sparse guidance (arXiv 2601.01608): the weak branch sees fewer tokens in the routed blocks than the strong one.

Shapes: B samples, C channels, H x W latent pixels, N tokens, K kept tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from annotated_types import Ge, Lt
from torch import Tensor, nn

from tread_composer.core.options import Checked
from tread_composer.core.protocols import Denoiser
from tread_composer.routing import Route, Routing, apply_tread, keep_lowest, routing_of
from tread_composer.routing.tokens import AlwaysKeep
from tread_composer.samplers.guidance.provider import (
    Branches,
    GuidanceProvider,
    SamplingRun,
    Unlabelled,
    WeakLabel,
    needs_classes,
)

__all__ = ['RateSchedule', 'SparseGuidance']

RateSchedule = Literal['constant', 'cosine']
_Rates = Callable[[float], tuple[float, float]]  # rates(time) -> strong, weak; shares of the tokens that skip


@dataclass(frozen=True)
class SparseGuidance(Checked, GuidanceProvider):
    """Another selection rate in each branch; the same network, or a second one in the weak branch.

    Where both branches are one denoiser and keep equally many tokens there is nothing to guide by: the network is
    called as it is, densely, and the result is plain conditional sampling.

    Args:
        strong_rate: Share of the tokens that skip the routed blocks in the strong branch.
        weak_rate: The same of the weak branch. (Defaults: the paper's SG_FLOPS.)
        rate_schedule: ``'constant'``; or ``'cosine'``: over the steps the weak branch goes from ``weak_rate`` to 0 and
            the strong one from 0 to ``strong_rate``.
        weak_label: ``'null'`` takes the class away from the weak branch, too.
    """

    second_network: ClassVar[bool] = True
    draws_anew: ClassVar[bool] = True  # its tokens

    # At 1 a routed block would get no token.
    strong_rate: Annotated[float, Ge(0), Lt(1)] = 0.5
    weak_rate: Annotated[float, Ge(0), Lt(1)] = 0.9
    rate_schedule: RateSchedule = 'constant'
    weak_label: WeakLabel = 'same'

    def check(self, network: nn.Module, *, num_classes: int, weak: nn.Module | None) -> None:
        """It needs routes in each network, and a weak branch that is the weaker one."""
        if self.weak_label == 'null':
            needs_classes('sparse', num_classes)
        for name, denoiser in (('network', network), ('weak network', weak)):
            if denoiser is not None and routing_of(denoiser) is None:
                raise ValueError(
                    f"guidance: 'sparse' needs the routes that the {name} was trained with, and it has none; call "
                    'apply_tread(network, routes) for one that was trained with them'
                )
        if weak is not None or self.weak_label == 'null':
            return  # weaker for another reason: the rates may be anything
        if self.rate_schedule == 'cosine' and self.strong_rate > 0:
            raise ValueError(
                f"strong_rate: {self.strong_rate} with rate_schedule 'cosine' makes the strong branch the sparser one "
                'towards the end, which guides backwards; set it to 0, or give a second network or weak_label null'
            )
        if self.rate_schedule == 'constant' and self.strong_rate > self.weak_rate:
            raise ValueError(
                f'strong_rate: {self.strong_rate} is above weak_rate {self.weak_rate}, which guides backwards; '
                'more tokens must skip the blocks in the weak branch'
            )

    def prepare(self, network: nn.Module, *, routes: Sequence[Route], always_keep: AlwaysKeep) -> None:
        """Give the blocks the routes that they were trained with."""
        if not routes:
            raise ValueError(
                'was trained without routes (no tread under algorithms), so its blocks do not know what to do with '
                "fewer tokens: guidance 'sparse' needs a model trained with them; take 'classifier_free'"
            )
        apply_tread(network, routes, always_keep=always_keep)

    def protocol_facts(self, routes: Sequence[Route]) -> dict[str, Any]:
        """Which blocks are routed decides the images."""
        return {'routes': [[route.start, route.end] for route in routes]}

    def branches(self, run: SamplingRun) -> Branches:
        """See ``GuidanceProvider``."""
        network, num_tokens, rates = run.denoiser, run.denoiser.num_tokens, self._rates(run.times)
        second = network if run.weak is None else run.weak
        branch = Unlabelled(second, run.null_label) if self.weak_label == 'null' else second
        routing = _routing(network)
        present = lambda: rates(float(run.clock.time))  # noqa: E731
        strong = _Routed(network, routing, lambda: present()[0], 'strong', run)
        weak = _Routed(branch, _routing(second), lambda: present()[1], 'weak', run)

        def branches_at(x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor | None]:
            counts = [_kept_counts(routing, rate, num_tokens) for rate in present()]
            # The same network with as many tokens: two draws of one distribution, whose difference guides nowhere.
            if branch is network and counts[0] == counts[1]:
                return network(x_BCHW, t_B, labels_B), None
            return strong(x_BCHW, t_B, labels_B), weak(x_BCHW, t_B, labels_B)

        return branches_at

    def _rates(self, times: Tensor) -> _Rates:
        """The rates of the two branches over the sampling times.

        ``'cosine'``: at share u of the steps the weak branch has ``weak_rate (1 + cos(pi u)) / 2`` and the strong one
        ``strong_rate (1 - cos(pi u)) / 2``; u is 0 at the first step and 1 at the last. (The paper's SG_FID lets the
        weak branch fall from 0.6 to 0 and "applies the inverse" to the strong one; this reads it as rising to 0.6.)
        """
        if self.rate_schedule == 'constant':
            return lambda time: (self.strong_rate, self.weak_rate)
        ascending = times[:-1].flip(0).numpy()  # np.interp wants rising places; no step begins at the last time
        steps = np.arange(len(ascending))[::-1]

        def rates(time: float) -> tuple[float, float]:
            # u: the second evaluation of a Heun step lies at the next step's time, so it counts as that step.
            share = float(np.interp(time, ascending, steps)) / max(len(ascending) - 1, 1)
            falling = (1 + math.cos(math.pi * share)) / 2  # from 1 to 0
            return self.strong_rate * (1 - falling), self.weak_rate * falling

        return rates


def _kept_counts(routing: Routing, rate: float, num_tokens: int) -> list[int]:
    """How many tokens stay on each route at this rate."""
    return [replace(route, selection_rate=rate).num_kept(num_tokens, routing.always_keep) for route in routing.routes]


def _routing(network: nn.Module) -> Routing:
    routing = routing_of(network)
    assert routing is not None  # SparseGuidance.check has refused such a network
    return routing


class _Routed:
    """A denoiser whose blocks see some of the tokens only, others in each evaluation.

    The tokens of a sample depend on its own seed, on the branch and on the evaluation's number alone: not on the batch.
    """

    def __init__(
        self, denoiser: Denoiser, routing: Routing, rate: Callable[[], float], branch: str, run: SamplingRun
    ) -> None:
        self.denoiser, self.routing, self.rate, self.branch, self.run = denoiser, routing, rate, branch, run
        self.num_tokens = denoiser.num_tokens

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor, /) -> Tensor:
        counts = _kept_counts(self.routing, self.rate(), self.num_tokens)
        if all(count == self.num_tokens for count in counts):  # dense: no gather, no other kernel
            return self.denoiser(x_BCHW, t_B, labels_B)
        kept = []
        for route, count in enumerate(counts):
            # Branch, evaluation and route in the purpose: each draws numbers of its own from the sample's seed.
            purpose = f'sparse_guidance/{self.branch}/{self.run.clock.evaluation}/{route}'
            scores = self.run.random.uniform(purpose, self.num_tokens)  # [B, N]; the lowest of each row stay
            # [B, K] ascending ids, as in training.
            kept.append(keep_lowest(scores, count, always_keep=self.routing.always_keep).to(x_BCHW.device))
        with self.routing.forced(kept, num_tokens=self.num_tokens):
            return self.denoiser(x_BCHW, t_B, labels_B)
