"""What guidance is: the formula, and the provider of the weak prediction, which the formula guides away from.

Shapes: B samples, C channels, O output channels, H x W latent pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from tread_composer.core.options import GuidedChannels
from tread_composer.core.protocols import Denoiser
from tread_composer.core.randomness import KeyedRandom
from tread_composer.routing import Route
from tread_composer.routing.tokens import AlwaysKeep
from tread_composer.samplers.equation import Clock

__all__ = [
    'Branches', 'GuidanceProvider', 'SamplingRun', 'Unlabelled', 'WeakLabel', 'check_channels', 'guide',
    'needs_classes',
]  # fmt: skip

WeakLabel = Literal['same', 'null']  # the class of the weak branch

Branches = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""``branches(x_BCHW, t_B, labels_B) -> strong, weak``: both predictions; weak is None where nothing is to be guided."""

_FIRST = 3  # DiT's scripts guide three of the four channels of SD-VAE latents


@dataclass(frozen=True)
class SamplingRun:
    """One run of a sampler on one batch, as a provider sees it."""

    denoiser: Any  # the network
    weak: Any  # the second network, or None
    null_label: int  # stands for no class
    random: KeyedRandom  # keyed by the samples' seeds: one row for each sample of the batch
    clock: Clock  # tells time and number of the present evaluation
    times: Tensor  # the objective's sampling times [num_steps + 1], descending, float64


class GuidanceProvider(Protocol):
    """Where the weak prediction comes from. The constructor's arguments are its settings, checked there.

    Ours inherit what stands here: any model will do, and the settings say all.
    """

    second_network: ClassVar[bool] = False
    """Whether a second network may be given."""

    draws_anew: ClassVar[bool] = False
    """Whether it draws random numbers in each evaluation, so that two at the same place differ."""

    def check(self, network: nn.Module, *, num_classes: int, weak: nn.Module | None) -> None:
        """Refuse, with a ``ValueError`` in words, a model that cannot be guided like this."""

    def prepare(self, network: nn.Module, *, routes: Sequence[Route], always_keep: AlwaysKeep) -> None:
        """Make a trained network ready; ``ValueError`` if its training lacked what the weak prediction needs."""

    def protocol_facts(self, routes: Sequence[Route]) -> dict[str, Any]:
        """What decides the images besides the settings, for the protocol of a number."""
        return {}

    def branches(self, run: SamplingRun) -> Branches:
        """Both predictions of one run. Calls of the networks are its cost: ``guidance_cost`` counts them."""
        ...


def guide(
    strong_BOHW: Tensor, weak_BOHW: Tensor, scale: float, channels: int, guided_channels: GuidedChannels
) -> Tensor:
    """``weak + scale * (strong - weak)`` on the channels that are guided, the strong prediction on the others; float32.

    Scale 1 is no guidance, 0 the weak prediction. ``channels`` is C: the output channels beyond, the variance of a
    model with ``learn_sigma``, are not guided. With ``'first3'`` the fourth latent channel is not guided either: DiT's
    scripts do that (``forward_with_cfg``), and its published figures with guidance were made so. For EDM it makes no
    difference whether the network's output or the denoised latents are guided: the other terms are the same in both.

    Raises:
        ValueError: The shapes differ.
    """
    if strong_BOHW.shape != weak_BOHW.shape:
        raise ValueError(
            f'the weak network predicts {list(weak_BOHW.shape)} where the strong one predicts '
            f'{list(strong_BOHW.shape)}; both must have the same objective, latents and learn_sigma'
        )
    guided = channels if guided_channels == 'all' else _FIRST
    # The difference of two bfloat16 predictions, times the scale, would be mostly rounding.
    strong, weak = strong_BOHW.float(), weak_BOHW.float()
    # Ho and Salimans, eq. 6, with scale = 1 + w.
    # Not strong + (scale - 1) * (strong - weak), which is the same but for rounding: recorded samples are of this form.
    away = weak[:, :guided] + scale * (strong[:, :guided] - weak[:, :guided])
    return torch.cat([away, strong[:, guided:]], dim=1)  # [B, O, H, W]


def check_channels(guided_channels: GuidedChannels, channels: int) -> None:
    """Raise ``ValueError`` for ``'first3'`` where there is no fourth channel to leave alone."""
    if guided_channels == 'first3' and channels <= _FIRST:
        raise ValueError(
            f"guided_channels: 'first3' repeats what DiT does with latents of 4 channels; these have {channels}, take "
            "'all'"
        )


def needs_classes(name: str, num_classes: int) -> None:
    """Raise ``ValueError`` for a weak branch without a class where the model has no classes."""
    if not num_classes:
        raise ValueError(f'guidance: {name!r} without a class needs classes, and this model has none')


class Unlabelled:
    """The denoiser without a class, whatever labels it is given."""

    def __init__(self, denoiser: Denoiser, null_label: int) -> None:
        self.denoiser, self.null_label, self.num_tokens = denoiser, null_label, denoiser.num_tokens

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor, /) -> Tensor:
        """Predict."""
        return self.denoiser(x_BCHW, t_B, torch.full_like(labels_B, self.null_label))
