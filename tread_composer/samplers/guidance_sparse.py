"""Sparse guidance (arXiv 2601.01608): the weak branch sees fewer tokens in the routed blocks than the strong one.

Shapes: B samples, C channels, H x W latent pixels, N tokens, K kept tokens.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from torch import Tensor

from tread_composer.core.protocols import Denoiser
from tread_composer.core.randomness import KeyedRandom
from tread_composer.routing import Routing, keep_lowest
from tread_composer.samplers.equation import Clock
from tread_composer.samplers.guidance import autoguidance
from tread_composer.samplers.settings import GuidedChannels, SamplingSettings

__all__ = ['Rates', 'kept_counts', 'rates_of', 'routed', 'sparse_guidance']

Rates = Callable[[float], tuple[float, float]]
"""``rates(time) -> strong, weak``: the shares of tokens that skip the routed blocks in the two branches."""


def rates_of(settings: SamplingSettings, times: Tensor) -> Rates:
    """The rates of the two branches over the sampling times.

    ``'cosine'``: at share u of the steps the weak branch has ``weak_rate (1 + cos(pi u)) / 2`` and the strong one
    ``strong_rate (1 - cos(pi u)) / 2``; u is 0 at the first step and 1 at the last. (The paper's SG_FID lets the weak
    branch fall from 0.6 to 0 and "applies the inverse" to the strong one; this reads it as rising to 0.6.)

    Args:
        settings: Rates and their schedule.
        times: The objective's sampling times ``[num_steps + 1]``, descending.
    """
    if settings.rate_schedule == 'constant':
        return lambda time: (settings.strong_rate, settings.weak_rate)
    ascending = times[:-1].flip(0).numpy()
    steps = np.arange(len(ascending))[::-1]

    def rates(time: float) -> tuple[float, float]:
        share = float(np.interp(time, ascending, steps)) / max(len(ascending) - 1, 1)
        falling = (1 + math.cos(math.pi * share)) / 2
        return settings.strong_rate * (1 - falling), settings.weak_rate * falling

    return rates


def kept_counts(routing: Routing, rate: float, num_tokens: int) -> list[int]:
    """How many tokens stay on each route at this rate."""
    return [replace(route, selection_rate=rate).num_kept(num_tokens, routing.always_keep) for route in routing.routes]


def routed(
    denoiser: Denoiser, routing: Routing, rate: Callable[[], float], random: KeyedRandom, branch: str, clock: Clock
) -> Denoiser:
    """A denoiser whose blocks see some of the tokens only, others in each evaluation.

    The tokens of a sample depend on its own seed, on the branch and on the evaluation's number alone: not on the batch.

    Args:
        denoiser: What to call.
        routing: Of the block list inside of it.
        rate: Share of the tokens that skip the blocks now.
        random: Keyed by the samples' seeds, one row for each sample of the batch.
        branch: Sets the tokens of several branches apart.
        clock: Counts evaluations.
    """
    return _Routed(denoiser, routing, rate, random, branch, clock)


def sparse_guidance(
    strong: tuple[Denoiser, Routing],
    weak: tuple[Denoiser, Routing],
    guidance_scale: float,
    rates: Rates,
    random: KeyedRandom,
    clock: Clock,
    *,
    guided_channels: GuidedChannels = 'all',
) -> Denoiser:
    """``D_weak + guidance_scale * (D_strong - D_weak)`` with another selection rate in each branch (arXiv 2601.01608).

    Where both branches are one denoiser and keep equally many tokens there is nothing to guide by: the strong denoiser
    is called as it is, densely, and the result is plain conditional sampling.

    Args:
        strong: Denoiser and the routing inside of it.
        weak: Likewise; the same pair, the same network without a class, or an early checkpoint.
        guidance_scale: 1 is no guidance: the dense strong denoiser itself.
        rates: See ``rates_of``.
        random: Keyed by the samples' seeds.
        clock: Tells time and number of the evaluation.
        guided_channels: See ``guidance.guide``.
    """
    return strong[0] if guidance_scale == 1 else _Sparse(
        strong, weak, guidance_scale, rates, random, clock, guided_channels
    )  # fmt: skip


class _Routed:
    def __init__(
        self,
        denoiser: Denoiser,
        routing: Routing,
        rate: Callable[[], float],
        random: KeyedRandom,
        branch: str,
        clock: Clock,
    ) -> None:
        self.denoiser, self.routing, self.rate = denoiser, routing, rate
        self.random, self.branch, self.clock = random, branch, clock
        self.num_tokens = denoiser.num_tokens

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor, /) -> Tensor:
        counts = kept_counts(self.routing, self.rate(), self.num_tokens)
        if all(count == self.num_tokens for count in counts):
            return self.denoiser(x_BCHW, t_B, labels_B)
        kept = []
        for route, count in enumerate(counts):
            purpose = f'sparse_guidance/{self.branch}/{self.clock.evaluation}/{route}'
            scores = self.random.uniform(purpose, self.num_tokens)
            kept.append(keep_lowest(scores, count, always_keep=self.routing.always_keep).to(x_BCHW.device))
        with self.routing.forced(kept, num_tokens=self.num_tokens):
            return self.denoiser(x_BCHW, t_B, labels_B)


class _Sparse:
    def __init__(
        self,
        strong: tuple[Denoiser, Routing],
        weak: tuple[Denoiser, Routing],
        guidance_scale: float,
        rates: Rates,
        random: KeyedRandom,
        clock: Clock,
        guided_channels: GuidedChannels,
    ) -> None:
        self.strong, self.rates, self.clock = strong, rates, clock
        self.same_denoiser = strong[0] is weak[0]
        self.num_tokens = strong[0].num_tokens
        branches = (
            routed(*strong, lambda: rates(clock.time)[0], random, 'strong', clock),
            routed(*weak, lambda: rates(clock.time)[1], random, 'weak', clock),
        )
        self.guided = autoguidance(*branches, guidance_scale, guided_channels=guided_channels)

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor, /) -> Tensor:
        denoiser, routing = self.strong
        strong, weak = (kept_counts(routing, rate, self.num_tokens) for rate in self.rates(self.clock.time))
        no_gap = self.same_denoiser and strong == weak
        return (denoiser if no_gap else self.guided)(x_BCHW, t_B, labels_B)
