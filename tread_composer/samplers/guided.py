"""From ``SamplingSettings`` to a guided denoiser, and to what it costs.

Shapes: B samples, C channels, H x W latent pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from tread_composer.core.protocols import Denoiser
from tread_composer.core.randomness import KeyedRandom
from tread_composer.routing import Routing, routing_of
from tread_composer.samplers.equation import Clock, Equation
from tread_composer.samplers.guidance import (
    autoguidance,
    check_channels,
    classifier_free,
    within_interval,
    without_label,
)
from tread_composer.samplers.guidance_sparse import rates_of, sparse_guidance
from tread_composer.samplers.registry import check_sampler, integrate
from tread_composer.samplers.settings import SamplingSettings

__all__ = ['SamplingCost', 'check_guidance', 'guidance_cost', 'guided_denoiser']


@dataclass(frozen=True)
class SamplingCost:
    """What one image takes.

    Attributes:
        gmacs: 10^9 multiply-adds of all network calls together (what the DiT paper calls Gflops).
        evaluations: How often the sampler asks for a prediction.
        guided: How many of these are guided.
    """

    gmacs: float
    evaluations: int
    guided: int


def check_guidance(
    settings: SamplingSettings, denoiser: nn.Module, *, channels: int, num_classes: int, weak: nn.Module | None = None
) -> None:
    """Refuse guidance that this network cannot give.

    Args:
        settings: What is asked for.
        denoiser: The network.
        channels: C, of the latents.
        num_classes: 0 for a model without classes.
        weak: The second network.

    Raises:
        ValueError: Classes, routes or the second network are missing, or what is asked for guides backwards.
    """
    kind = settings.guidance
    check_channels(settings.guided_channels, channels)
    if not num_classes and (kind == 'classifier_free' or settings.weak_label == 'null'):
        raise ValueError(f'guidance: {kind!r} without a class needs classes, and this model has none')
    if kind == 'auto' and weak is None:
        raise ValueError("guidance: 'auto' needs a second, weaker network, such as an early checkpoint of the same run")
    if weak is not None and kind not in ('auto', 'sparse'):
        raise ValueError(f"guidance: {kind!r} has no use for a second network; take 'auto' or 'sparse'")
    if kind != 'sparse':
        return
    for name, network in (('network', denoiser), ('weak network', weak)):
        if network is not None and routing_of(network) is None:
            raise ValueError(
                f"guidance: 'sparse' needs the routes that the {name} was trained with, and it has none; call "
                'apply_tread(network, routes) for one that was trained with them'
            )
    if weak is not None or settings.weak_label == 'null':
        return
    if settings.rate_schedule == 'cosine' and settings.strong_rate > 0:
        raise ValueError(
            f"strong_rate: {settings.strong_rate} with rate_schedule 'cosine' makes the strong branch the sparser one "
            'towards the end, which guides backwards; set it to 0, or give a second network or weak_label null'
        )
    if settings.rate_schedule == 'constant' and settings.strong_rate > settings.weak_rate:
        raise ValueError(
            f'strong_rate: {settings.strong_rate} is above weak_rate {settings.weak_rate}, which guides backwards; '
            'more tokens must skip the blocks in the weak branch'
        )


def guided_denoiser(
    denoiser: Any,
    settings: SamplingSettings,
    *,
    null_label: int,
    random: KeyedRandom,
    clock: Clock,
    times: Tensor,
    weak: Any = None,
) -> Denoiser:
    """The denoiser with all that ``settings`` ask for around it, for one run of a sampler on one batch.

    Args:
        denoiser: The network.
        settings: What is asked for, checked by ``check_guidance``.
        null_label: The label that stands for no class.
        random: Keyed by the samples' seeds.
        clock: That of the sampler's ``Equation``.
        times: The objective's sampling times.
        weak: The second network.

    Returns:
        ``denoiser`` itself where there is nothing to guide.
    """
    if not settings.guides:
        return denoiser
    scale, channels = settings.guidance_scale, settings.guided_channels
    if settings.guidance == 'classifier_free':
        guided = classifier_free(denoiser, scale, null_label, guided_channels=channels)
    else:
        second = denoiser if weak is None else weak
        branch = without_label(second, null_label) if settings.weak_label == 'null' else second
        if settings.guidance == 'auto':
            guided = autoguidance(denoiser, branch, scale, guided_channels=channels)
        else:
            pairs = (denoiser, _routing(denoiser)), (branch, _routing(second))
            rates = rates_of(settings, times)
            guided = sparse_guidance(*pairs, scale, rates, random, clock, guided_channels=channels)
    if settings.guidance_interval is None:
        return guided
    return within_interval(guided, denoiser, settings.guidance_interval, clock)


def guidance_cost(
    denoiser: Any,
    objective: Any,
    settings: SamplingSettings,
    *,
    latent_shape: tuple[int, ...],
    null_label: int,
    weak: Any = None,
) -> SamplingCost:
    """Count the multiply-adds of one image, by walking through sampling with shapes alone.

    The guided denoiser is run as it will be, with networks that count in place of the real ones; each distinct call is
    counted once, on torch's meta device. Drawing tokens, guiding and decoding are not counted.

    Args:
        denoiser: The network.
        objective: Has the sampling equation.
        settings: What is asked for.
        latent_shape: C, H and W.
        null_label: The label that stands for no class.
        weak: The second network.

    Raises:
        ValueError: The sampler or its settings do not fit, or the guidance does not fit the network.
    """
    check_sampler(settings.sampler, objective, settings.sampler_settings)
    check_guidance(settings, denoiser, channels=latent_shape[0], num_classes=null_label, weak=weak)
    times, clock, spent = objective.sampling_times(settings.num_steps), Clock(), _Spent()
    learned = objective.learned_variance
    strong = _Counting(denoiser, spent, latent_shape, learned)
    second = None if weak is None else _Counting(weak, spent, latent_shape, learned)
    guided = guided_denoiser(
        strong, settings, null_label=null_label, random=KeyedRandom(0, 0, [0]), clock=clock, times=times, weak=second
    )
    small = torch.zeros(1, latent_shape[0], 1, 1, dtype=torch.float64)  # the equation works on each pixel alone
    equation = Equation(objective, _Noting(guided, strong, spent), torch.zeros(1, dtype=torch.int64), clock)
    integrate(settings.sampler, equation, small, times, lambda step: small, settings.sampler_settings)
    return SamplingCost(spent.macs / 1e9, len(clock.times), spent.guided)


def _routing(denoiser: Any) -> Routing:
    routing = denoiser.routing if isinstance(denoiser, _Counting) else routing_of(denoiser)
    assert routing is not None  # check_guidance was here
    return routing


class _Spent:
    def __init__(self) -> None:
        self.macs = self.calls = self.guided = 0


class _Noting:
    """Notices which predictions were guided: those that were not one dense call of the strong network."""

    def __init__(self, guided: Denoiser, strong: '_Counting', spent: _Spent) -> None:
        self.guided, self.strong, self.spent, self.num_tokens = guided, strong, spent, strong.num_tokens

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor, /) -> Tensor:
        before = self.spent.calls
        out = self.guided(x_BCHW, t_B, labels_B)
        self.spent.guided += self.spent.calls - before > 1
        return out


class _Counting:
    """Stands for a network: adds what a call would cost and predicts 0."""

    def __init__(self, network: Any, spent: _Spent, latent_shape: tuple[int, ...], learned_variance: bool) -> None:
        self.routing, self.num_tokens = routing_of(network), network.num_tokens
        self._spent, self._factor = spent, 2 if learned_variance else 1
        self._macs: Callable[[tuple[int, ...] | None], int] = cache(partial(_macs, network, latent_shape))

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor, /) -> Tensor:
        counts = None
        if self.routing is not None and self.routing.in_evaluation and self.routing.kept is not None:
            counts = tuple(ids.shape[1] for ids in self.routing.kept)
        self._spent.calls += x_BCHW.shape[0]  # a doubled batch is two calls for one image
        self._spent.macs += x_BCHW.shape[0] * self._macs(counts)
        return x_BCHW.repeat(1, self._factor, 1, 1)[:, : self._factor * x_BCHW.shape[1]] * 0


def _macs(network: nn.Module, latent_shape: tuple[int, ...], counts: tuple[int, ...] | None) -> int:
    """Multiply-adds of one call for one image, with so many kept tokens on each route."""
    named = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    tensors = {name: torch.empty_like(value, device='meta') for name, value in named.items()}
    dtype = next(network.parameters()).dtype
    x = torch.empty(1, *latent_shape, device='meta', dtype=dtype)
    inputs = x, x[:, 0, 0, 0], torch.zeros(1, dtype=torch.int64, device='meta')
    routing, modes = routing_of(network), {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            if counts is None or routing is None:
                functional_call(network, tensors, inputs)
            else:
                kept = [torch.empty(1, count, dtype=torch.int64, device='meta') for count in counts]
                with routing.forced(kept, num_tokens=network.num_tokens):  # type: ignore[arg-type]
                    functional_call(network, tensors, inputs)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return counter.get_total_flops() // 2
