"""What the parts promise each other. Nobody inherits from these; they are for readers and for the type checker.

Shapes: B samples, C channels, H x W latent pixels.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

__all__ = [
    'AlgorithmFacts', 'Autoencoder', 'Backbone', 'Denoiser', 'Drift', 'Objective', 'ReverseChain', 'StepNoise',
    'TimeDistribution', 'Transition', 'Weighting',
]  # fmt: skip

Drift = Callable[[Tensor, Tensor], Tensor]
"""``drift(x_BCHW, time) -> dx/dtime``; ``time`` is a float64 scalar tensor, ``x`` float64, the result float64.

Of an objective with ``continuous_times`` it may be one time for each sample, float64 ``[B]``."""

Transition = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""``transition(x_BCHW, time, next_time) -> mean, std`` of the normal distribution of x at ``next_time``, float64."""

StepNoise = Callable[[int], Tensor]
"""``noise(step) -> [B, C, H, W]``: standard normal numbers for one step of sampling, the same whenever it is asked.

Each sample's numbers depend on its own seed and on ``step`` alone: not on the batch, the rank or the order."""


class Denoiser(Protocol):
    """The network: noisy latents, a number for the noise level, labels -> prediction."""

    num_tokens: int
    """Tokens that its blocks see for one image: lets ``Tread`` draw routes before the forward pass."""

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor, /) -> Tensor:
        """Predict; same shape as ``x_BCHW``, or twice its channels with ``learn_sigma``."""
        ...


class Backbone(Denoiser, Protocol):
    """A denoiser that a configuration can name (``model.name``): an ``nn.Module`` that is built for its data.

    Asked of those that have it, and never missed in the others:

    - ``presets``: class attribute, published sizes by name: constructor arguments that ``model.preset`` stands for;
    - ``token_arguments``: what of its blocks' arguments belongs to tokens (``routing.apply_tread``);
    - ``depth``: the number of its blocks; else its only ``nn.ModuleList`` of blocks is counted;
    - ``fsdp_wrap_fn(module)``, ``activation_checkpointing_fn(module)``: Composer's questions which modules are units;
      blocks are compiled by the first;
    - ``attentions`` and ``use_attention(name, device, dtypes=..., training=...)``: other implementations of attention;
    - ``learn_sigma``, a constructor argument: whether it predicts a variance too.
    """

    def __init__(self, *, latent_size: int, in_channels: int, num_classes: int) -> None:
        """Beside these three, which the data decide, arguments of its own; label ``num_classes`` is the null label."""
        ...


class TimeDistribution(Protocol):
    """How training times are spread over (0, 1); t = 0 is data, t = 1 is noise."""

    def quantile(self, u: Tensor) -> Tensor:
        """The time below which a share ``u`` in (0, 1) of the training times lies."""
        ...

    def density(self, t: Tensor) -> Tensor:
        """Probability density at ``t``."""
        ...


class Weighting(Protocol):
    """A weight on the squared error of what the network predicts, by signal-to-noise ratio."""

    def __call__(self, snr_B: Tensor, prediction: Any, /) -> Tensor:
        """``[B]``; ``prediction`` is ``'x0'``, ``'eps'``, ``'v'`` or ``'flow'`` (``objectives.weighting``)."""
        ...


class Objective(Protocol):
    """What is learnt, and the differential equation that turns noise into data with it.

    Everything that others want to know about an objective is asked of it: nobody else keeps a list of objectives.
    Asked of those that have it, and False of the others: ``drift_at_zero``, whether its drift exists at time 0, so that
    a sampler of second order may correct its last step; ``continuous_times``, whether its drift may be asked for at any
    time, one for each sample, so that a sampler may choose its own steps.
    """

    name: str
    """As configurations, protocols and exported files call it."""

    @property
    def prediction(self) -> str:
        """What the network puts out, in words: for whoever reads an exported file."""
        ...

    @property
    def time_convention(self) -> str:
        """Which end of the time is data, and what the network is given as its time, in words."""
        ...

    @property
    def learned_variance(self) -> bool:
        """Whether the network needs twice the channels of the latents: the second half for a variance."""
        ...

    def time_grid(self) -> Mapping[str, Any]:
        """The settings that decide, besides the number of steps, at which times it is sampled: part of a protocol."""
        ...

    def target(self) -> Mapping[str, Any]:
        """The settings that decide what the network predicts: two networks that share them may guide each other."""
        ...

    def check_latents(self, latent_shape: Sequence[int]) -> None:
        """Raise ``ValueError`` for latents (C, H, W) that it cannot work with."""
        ...

    def noised(self, latents_BCHW: Tensor, noise_BCHW: Tensor, time: float) -> tuple[Tensor, float]:
        """The point of the sampling equation at ``time`` in (0, 1), 0 being data: x and the equation's own time."""
        ...

    def noise_level(self, time: float) -> float:
        """Standard deviation of the noise over the factor of the data, at ``time`` in (0, 1)."""
        ...

    def __call__(
        self, denoiser: Denoiser, latents_BCHW: Tensor, labels_B: Tensor, noise_BCHW: Tensor, quantiles_B: Tensor, /
    ) -> dict[str, Tensor]:
        """Per-sample losses ``[B]``: ``'loss'`` is what is minimised, other entries are terms worth logging.

        An entry ``'mse'``, where there is one, is the plain error, without weights and further terms: what evaluation
        reports as its loss, so that runs with and without those compare.

        ``quantiles_B`` in (0, 1) is uniform noise for the time draw: the objective owns the distribution.
        """
        ...

    def drift(self, denoiser: Denoiser, labels_B: Tensor) -> Drift:
        """The right-hand side of the sampling equation for these labels."""
        ...

    def sampling_times(self, num_steps: int) -> Tensor:
        """``num_steps + 1`` descending times, float64, from pure noise to 0."""
        ...

    def prior(self, noise_BCHW: Tensor) -> Tensor:
        """The start of sampling made from standard normal noise, float64."""
        ...


class ReverseChain(Objective, Protocol):
    """An objective that can also be sampled as a chain of random steps between noise levels.

    Its times are noise levels: x at time ``sigma`` is ``data + sigma noise``, and its drift is the predicted noise.
    """

    def transition(self, denoiser: Denoiser, labels_B: Tensor) -> Transition:
        """The chain's step for these labels; to time 0 its standard deviation is 0."""
        ...


class AlgorithmFacts(Protocol):
    """What a Composer ``Algorithm`` may say of itself. Each method is optional.

    The configuration asks for ``problems``, of callbacks too; ``plan`` and ``compare`` for the others. Besides these:
    ``incompatible_with``, a class attribute (see ``algorithms.rules``); ``num_averages``, the copies of the trainable
    weights that it keeps in float32; ``default_folder`` and ``folder``, where it writes within the run's folder;
    ``settings_digest``, None until the run fills it in; ``active``, whether it saves work of the batch in hand.
    """

    def problems(self, config: Any) -> Iterable[tuple[str, str]]:
        """What speaks against it in a run: pairs of one of its settings (``''`` for the algorithm) and a text."""
        ...

    def cost_window(self) -> tuple[str | None, str | None]:
        """Composer time strings from and until which it saves work; None for the begin and the end of the run."""
        ...

    def rehearse(self, denoiser: nn.Module, batch_size: int) -> AbstractContextManager[None]:
        """A context in which a training forward on the meta device costs what it costs while the algorithm is on."""
        ...

    def tokens_per_block(self, depth: int, num_tokens: int) -> Sequence[int]:
        """The tokens that each block then sees; an algorithm that leaves all of them in place needs no such method."""
        ...

    def plan_rows(self, plan: Mapping[str, Any]) -> Mapping[str, str]:
        """Rows of ``plan``: a word or two, and the text beside it."""
        ...

    def average_afterwards(self, saved: Mapping[str, Any], folder: Path, width: float, *, allow_inexact: bool) -> Any:
        """An average of the weights (``tensors``, ``facts``) made of its files: for ``--weights posthoc:WIDTH``."""
        ...


class Autoencoder(Protocol):
    """Pixels in [-1, 1] <-> raw latents."""

    @property
    def id(self) -> str | None:
        """What the manifest of its data calls it."""
        ...

    def decode(self, raw_latents_BCHW: Tensor) -> Tensor:
        """``[B, C, H, W]`` raw latents to pixels ``[B, 1 or 3, H', W']`` in about [-1, 1]."""
        ...
