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
from tread_composer.routing import routing_of
from tread_composer.samplers.equation import Clock, Equation
from tread_composer.samplers.guidance import GUIDANCE
from tread_composer.samplers.guidance.provider import Branches, SamplingRun, check_channels, guide
from tread_composer.samplers.registry import check_sampler, integrate
from tread_composer.samplers.settings import SamplingSettings

__all__ = ['SamplingCost', 'check_guidance', 'guidance_cost', 'guided_denoiser']

_ROUNDING = 1e-9


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
    provider, kind = settings.provider, settings.guidance
    check_channels(settings.guided_channels, channels)
    if weak is not None and not (provider and provider.second_network):
        takers = ' or '.join(repr(name) for name, taker in GUIDANCE.items() if taker.second_network)
        raise ValueError(f'guidance: {kind!r} has no use for a second network; take {takers}')
    if provider is not None:
        provider.check(denoiser, num_classes=num_classes, weak=weak)


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
    if settings.provider is None or not settings.guides:
        return denoiser
    run = SamplingRun(denoiser, weak, null_label, random, clock, times)
    return _Guided(run, settings.provider.branches(run), settings)


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
    equation = Equation(objective, guided, torch.zeros(1, dtype=torch.int64), clock)
    integrate(settings.sampler, equation, small, times, lambda step: small, settings.sampler_settings)
    num_guided = guided.num_guided if isinstance(guided, _Guided) else 0
    return SamplingCost(spent.macs / 1e9, len(clock.times), num_guided)


class _Guided:
    """A denoiser that guides where the interval says so, and counts how often."""

    def __init__(self, run: SamplingRun, branches: Branches, settings: SamplingSettings) -> None:
        self.run, self.branches, self.settings = run, branches, settings
        self.num_tokens, self.num_guided = run.denoiser.num_tokens, 0

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor, /) -> Tensor:
        if not self._is_inside():
            return self.run.denoiser(x_BCHW, t_B, labels_B)
        strong, weak = self.branches(x_BCHW, t_B, labels_B)
        if weak is None:
            return strong
        self.num_guided += 1
        settings = self.settings
        return guide(strong, weak, settings.guidance_scale, x_BCHW.shape[1], settings.guided_channels)

    def _is_inside(self) -> bool:
        if self.settings.guidance_interval is None:
            return True
        # Relax both bounds by a rounding tolerance: a step that is meant to lie on one (0.6 of a grid) may be off.
        low, high = (end * (1 + _ROUNDING) for end in self.settings.guidance_interval)
        return low < self.run.clock.time <= high


class _Spent:
    def __init__(self) -> None:
        self.macs = 0


class _Counting(nn.Module):
    """Stands for a network: adds what a call would cost and predicts 0. The network is inside, routes and all."""

    def __init__(self, network: Any, spent: _Spent, latent_shape: tuple[int, ...], learned_variance: bool) -> None:
        super().__init__()
        self.network, self.routing, self.num_tokens = network, routing_of(network), network.num_tokens
        self._spent, self._factor = spent, 2 if learned_variance else 1
        self._macs: Callable[[tuple[int, ...] | None], int] = cache(partial(_macs, network, latent_shape))

    def forward(self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor, /) -> Tensor:
        counts = None
        if self.routing is not None and self.routing.in_evaluation and self.routing.kept is not None:
            counts = tuple(ids.shape[1] for ids in self.routing.kept)
        self._spent.macs += x_BCHW.shape[0] * self._macs(counts)  # a doubled batch is two calls for one image
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
