"""From ``SamplingSettings`` to a guided denoiser, and to what it costs.

Shapes: B samples, C channels, H x W latent pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from tread_composer.core.inference import evaluating
from tread_composer.core.named import part_named
from tread_composer.core.protocols import Denoiser
from tread_composer.core.randomness import KeyedRandom
from tread_composer.routing import routing_of
from tread_composer.samplers.equation import Clock, Equation
from tread_composer.samplers.guidance import GUIDANCE
from tread_composer.samplers.guidance.provider import Branches, SamplingRun, check_channels, guide
from tread_composer.samplers.registry import SAMPLERS, check_sampler
from tread_composer.samplers.settings import SamplingSettings

__all__ = ['SamplingCost', 'check_guidance', 'guidance_cost', 'guided_denoiser']

_ROUNDING = 1e-9  # a step that is meant to lie on a bound of the interval (0.6 of a grid) may be off by this share


@dataclass(frozen=True)
class SamplingCost:
    """What one image takes; with an adaptive sampler, what one of its evaluations takes: their number shows later."""

    gmacs: float  # 10^9 multiply-adds of all network calls together (what the DiT paper calls Gflops)
    evaluations: int | None  # how often the sampler asks for a prediction; None: as often as it needs
    guided: int | None  # how many of these are guided


def check_guidance(
    settings: SamplingSettings, denoiser: nn.Module, *, channels: int, num_classes: int, weak: nn.Module | None = None
) -> None:
    """Refuse guidance that this network, for latents of C ``channels``, cannot give.

    Raises:
        ValueError: Classes, routes or the second network ``weak`` are missing, or the settings guide backwards.
    """
    provider, kind = settings.provider, settings.guidance
    check_channels(settings.guided_channels, channels)
    if weak is not None and not (provider and provider.second_network):
        takers = ' or '.join(repr(name) for name, taker in GUIDANCE.items() if taker.second_network)
        raise ValueError(f'guidance: {kind!r} has no use for a second network; take {takers}')
    if provider is not None and settings.is_adaptive and getattr(provider, 'draws_anew', False):
        raise ValueError(
            f'guidance: {kind!r} draws other tokens in each evaluation, and {settings.sampler!r} finds its steps by '
            "comparing evaluations; take the sampler 'heun', or another guidance"
        )
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

    The denoiser itself where there is nothing to guide. ``settings`` have passed ``check_guidance``; ``random`` is
    keyed by the samples' seeds, ``clock`` that of the sampler's ``Equation``, ``times`` are the objective's.
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
    """Count the multiply-adds of one image with latents C x H x W, by walking through sampling with shapes alone.

    The guided denoiser is run as it will be, with networks that count in place of the real ones; each distinct call is
    counted once, on torch's meta device. Drawing tokens, guiding and decoding are not counted.

    Raises:
        ValueError: The sampler or its settings do not fit, or the guidance does not fit the network.
    """
    check_sampler(settings.sampler, objective, settings.sampler_settings)
    check_guidance(settings, denoiser, channels=latent_shape[0], num_classes=null_label, weak=weak)
    adaptive = settings.is_adaptive
    if adaptive:  # its one evaluation counts as guided, wherever the interval lies
        settings = replace(settings, guidance_interval=None)
    times, clock = objective.sampling_times(1 if adaptive else settings.num_steps), Clock()
    strong = _Counting(denoiser, latent_shape, objective.learned_variance)
    second = None if weak is None else _Counting(weak, latent_shape, objective.learned_variance)
    guided = guided_denoiser(
        strong, settings, null_label=null_label, random=KeyedRandom(0, 0, [0]), clock=clock, times=times, weak=second
    )
    small = torch.zeros(1, latent_shape[0], 1, 1, dtype=torch.float64)  # the equation works on each pixel alone
    equation = Equation(objective, guided, torch.zeros(1, dtype=torch.int64), clock)
    # Drift and step noise are zeros of one pixel: only the calls count.
    if adaptive:
        equation.drift(small, times[0])
    else:
        sampler = part_named(settings.sampler, SAMPLERS)
        sampler(equation, small, times, lambda step: small, **settings.sampler_settings)
    macs = strong.macs + (second.macs if second else 0)
    if adaptive:
        return SamplingCost(macs / 1e9, None, None)
    return SamplingCost(macs / 1e9, len(clock.times), guided.num_guided if isinstance(guided, _Guided) else 0)


class _Guided:
    """A denoiser that guides where the interval says so, and counts how often."""

    def __init__(self, run: SamplingRun, branches: Branches, settings: SamplingSettings) -> None:
        self.run, self.branches, self.settings = run, branches, settings
        self.num_tokens, self.num_guided = run.denoiser.num_tokens, 0  # N of one image; evaluations

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor, /) -> Tensor:
        settings = self.settings
        if settings.guidance_interval is not None:
            low, high = (end * (1 + _ROUNDING) for end in settings.guidance_interval)
            time = torch.as_tensor(self.run.clock.time, dtype=torch.float64)  # of the batch, or [B]
            # (low, high], as in Kynkaanniemi et al., section 3; from 0 on it holds the end of a step to 0.
            inside = (time <= high) & ((time > low) | (low <= 0))
            if not inside.any():
                return self.run.denoiser(x_BCHW, t_B, labels_B)
            if not inside.all():  # samples at times of their own
                plain, guided = self.run.denoiser(x_BCHW, t_B, labels_B), self._guided(x_BCHW, t_B, labels_B)
                return torch.where(inside.to(x_BCHW.device).view(-1, 1, 1, 1), guided, plain.float())
        return self._guided(x_BCHW, t_B, labels_B)

    def _guided(self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor) -> Tensor:
        settings = self.settings
        strong, weak = self.branches(x_BCHW, t_B, labels_B)
        if weak is None:  # the provider found both branches alike
            return strong
        self.num_guided += 1
        return guide(strong, weak, settings.guidance_scale, x_BCHW.shape[1], settings.guided_channels)


class _Counting(nn.Module):
    """Stands for a network: adds up what its calls would cost and predicts 0. The network is inside, routes and all."""

    def __init__(self, network: Any, latent_shape: tuple[int, ...], learned_variance: bool) -> None:
        super().__init__()
        self.network, self.routing, self.num_tokens = network, routing_of(network), network.num_tokens
        self.macs, self._factor = 0, 2 if learned_variance else 1  # O = C, or 2C with a variance
        self._macs_of: Callable[[tuple[int, ...] | None], int] = cache(partial(_macs, network, latent_shape))

    def forward(self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor, /) -> Tensor:
        counts = None
        if self.routing is not None and self.routing.in_evaluation and self.routing.kept is not None:
            counts = tuple(ids.shape[1] for ids in self.routing.kept)  # K kept tokens of each route, ids [B, K]
        self.macs += x_BCHW.shape[0] * self._macs_of(counts)  # a doubled batch is two calls for one image
        return x_BCHW.repeat(1, self._factor, 1, 1) * 0


def _macs(network: nn.Module, latent_shape: tuple[int, ...], counts: tuple[int, ...] | None) -> int:
    """Multiply-adds of one call for one image, with so many kept tokens on each route."""
    named = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    tensors = {name: torch.empty_like(value, device='meta') for name, value in named.items()}
    dtype = next(network.parameters()).dtype
    x = torch.empty(1, *latent_shape, device='meta', dtype=dtype)
    inputs = x, x[:, 0, 0, 0], torch.zeros(1, dtype=torch.int64, device='meta')  # x [1, C, H, W], t [1], label [1]
    routing = routing_of(network)
    with evaluating(network), torch.no_grad(), FlopCounterMode(display=False) as counter:
        if counts is None or routing is None:
            functional_call(network, tensors, inputs)
        else:
            kept = [torch.empty(1, count, dtype=torch.int64, device='meta') for count in counts]
            with routing.forced(kept, num_tokens=network.num_tokens):  # type: ignore[arg-type]
                functional_call(network, tensors, inputs)
    return counter.get_total_flops() // 2  # torch counts a multiply-add as two
