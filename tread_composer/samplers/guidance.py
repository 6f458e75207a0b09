"""Guidance: wrappers that make a denoiser out of a denoiser, so that objectives and samplers need not know.

They nest freely. Two of them must know where sampling stands: an interval acts at some times only, and sparse guidance
(``guidance_sparse``) draws new tokens for each evaluation. They look at the ``Clock`` of the ``Equation``.

Shapes: B samples, C channels, H x W latent pixels.
"""

import math

import torch
from torch import Tensor

from tread_composer.core.protocols import Denoiser
from tread_composer.samplers.equation import Clock
from tread_composer.samplers.settings import GuidedChannels

__all__ = ['autoguidance', 'classifier_free', 'guide', 'within_interval', 'without_label']

_FIRST = 3  # the channels that DiT's scripts guide, out of 4
_ROUNDING = 1e-9


def classifier_free(
    denoiser: Denoiser, guidance_scale: float, null_label: int, *, guided_channels: GuidedChannels = 'all'
) -> Denoiser:
    """Guide away from the unconditional prediction (Ho and Salimans 2022, arXiv 2207.12598).

    ``unconditional + guidance_scale * (conditional - unconditional)``, from one call with a doubled batch. See
    ``guide`` for channels. For EDM it makes no difference whether the network's output or the denoised latents are
    guided: the other terms are the same in both.

    Args:
        denoiser: The network, trained with ``label_dropout``.
        guidance_scale: 1 is no guidance and returns ``denoiser`` itself; 0 is unconditional but for the variance.
        null_label: The label that stands for no class.
        guided_channels: ``'all'``, or ``'first3'`` as DiT's scripts do.

    Raises:
        ValueError: ``guidance_scale`` is negative or not finite.
    """
    check_scale(guidance_scale)
    return denoiser if guidance_scale == 1 else _ClassifierFree(denoiser, guidance_scale, null_label, guided_channels)


def autoguidance(
    denoiser: Denoiser, weak: Denoiser, guidance_scale: float, *, guided_channels: GuidedChannels = 'all'
) -> Denoiser:
    """Guide away from a weaker denoiser (Karras et al. 2024, arXiv 2406.02507): an early checkpoint, a smaller model.

    Args:
        denoiser: The strong one.
        weak: The weak one; of the same objective, for the same latents.
        guidance_scale: 1 is no guidance and returns ``denoiser`` itself.
        guided_channels: See ``guide``.

    Raises:
        ValueError: ``guidance_scale`` is negative or not finite.
    """
    check_scale(guidance_scale)
    return denoiser if guidance_scale == 1 else _Auto(denoiser, weak, guidance_scale, guided_channels)


def without_label(denoiser: Denoiser, null_label: int) -> Denoiser:
    """The denoiser without a class, whatever labels it is given: a weak branch for combinations with CFG."""
    return _Unlabelled(denoiser, null_label)


def within_interval(guided: Denoiser, plain: Denoiser, interval: tuple[float, float], clock: Clock) -> Denoiser:
    """Guide only in a band of times (Kynkaanniemi et al. 2024, arXiv 2404.07724).

    Args:
        guided: The denoiser where ``low < time <= high``.
        plain: The denoiser elsewhere.
        interval: ``(low, high)``, in the time of the objective's sampling equation.
        clock: That of the equation.
    """
    return _Within(guided, plain, interval, clock)


def guide(
    strong_BOHW: Tensor, weak_BOHW: Tensor, scale: float, channels: int, guided_channels: GuidedChannels
) -> Tensor:
    """``weak + scale * (strong - weak)`` on the channels that are guided, the strong prediction on the others; float32.

    Not guided is the variance of a model with ``learn_sigma``: its output channels beyond those of the latents. With
    ``'first3'`` the fourth latent channel is not guided either: DiT's scripts do that (``forward_with_cfg``), and its
    published figures with guidance were made so.

    Args:
        strong_BOHW: Prediction of the strong branch.
        weak_BOHW: Of the weak branch, same shape.
        scale: The guidance scale.
        channels: C, of the latents.
        guided_channels: ``'all'`` or ``'first3'``.

    Raises:
        ValueError: ``'first3'`` for latents of fewer than four channels.
    """
    check_channels(guided_channels, channels)
    guided = channels if guided_channels == 'all' else _FIRST
    # The difference of two bfloat16 predictions, times the scale, would be mostly rounding.
    strong, weak = strong_BOHW.float(), weak_BOHW.float()
    away = weak[:, :guided] + scale * (strong[:, :guided] - weak[:, :guided])
    return torch.cat([away, strong[:, guided:]], dim=1)


def check_scale(guidance_scale: float) -> None:
    """Refuse a scale that means nothing.

    Raises:
        ValueError: It is negative or not finite.
    """
    if not (math.isfinite(guidance_scale) and guidance_scale >= 0):
        raise ValueError(f'guidance_scale={guidance_scale}: must be 0 or more; 1 is no guidance, above 1 guides')


def check_channels(guided_channels: GuidedChannels, channels: int) -> None:
    """Refuse ``'first3'`` where there is no fourth channel to leave alone.

    Raises:
        ValueError: The latents have fewer than four channels.
    """
    if guided_channels == 'first3' and channels <= _FIRST:
        raise ValueError(
            f"guided_channels: 'first3' repeats what DiT does with latents of 4 channels; these have {channels}, take "
            "'all'"
        )


class _ClassifierFree:
    def __init__(
        self, denoiser: Denoiser, guidance_scale: float, null_label: int, guided_channels: GuidedChannels
    ) -> None:
        self.denoiser, self.guidance_scale, self.null_label = denoiser, guidance_scale, null_label
        self.guided_channels: GuidedChannels = guided_channels
        self.num_tokens = denoiser.num_tokens

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor, /) -> Tensor:
        labels = torch.cat([labels_B, torch.full_like(labels_B, self.null_label)])
        both = self.denoiser(torch.cat([x_BCHW, x_BCHW]), torch.cat([t_B, t_B]), labels)
        conditional, unconditional = both.chunk(2)
        return guide(conditional, unconditional, self.guidance_scale, x_BCHW.shape[1], self.guided_channels)


class _Auto:
    def __init__(
        self, strong: Denoiser, weak: Denoiser, guidance_scale: float, guided_channels: GuidedChannels
    ) -> None:
        self.strong, self.weak, self.guidance_scale = strong, weak, guidance_scale
        self.guided_channels: GuidedChannels = guided_channels
        self.num_tokens = strong.num_tokens

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor, /) -> Tensor:
        strong, weak = (denoiser(x_BCHW, t_B, labels_B) for denoiser in (self.strong, self.weak))
        if strong.shape != weak.shape:
            raise ValueError(
                f'the weak network predicts {list(weak.shape)} where the strong one predicts {list(strong.shape)}; '
                'both must have the same objective, latents and learn_sigma'
            )
        return guide(strong, weak, self.guidance_scale, x_BCHW.shape[1], self.guided_channels)


class _Unlabelled:
    def __init__(self, denoiser: Denoiser, null_label: int) -> None:
        self.denoiser, self.null_label, self.num_tokens = denoiser, null_label, denoiser.num_tokens

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor, /) -> Tensor:
        return self.denoiser(x_BCHW, t_B, torch.full_like(labels_B, self.null_label))


class _Within:
    def __init__(self, guided: Denoiser, plain: Denoiser, interval: tuple[float, float], clock: Clock) -> None:
        self.guided, self.plain, self.interval, self.clock = guided, plain, interval, clock
        self.num_tokens = plain.num_tokens

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor, /) -> Tensor:
        # Both ends a hair later: a step that is meant to lie on one (0.6 of a grid) may be off by rounding.
        low, high = (end * (1 + _ROUNDING) for end in self.interval)
        return (self.guided if low < self.clock.time <= high else self.plain)(x_BCHW, t_B, labels_B)
