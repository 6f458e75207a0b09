"""``LatentDiffusion``: denoiser, objective, autoencoder and sampler joined into a ``ComposerModel``.

It has no mathematics of its own. Shapes: B samples, C channels, H x W latent pixels.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from composer.models import ComposerModel
from torch import Tensor, nn
from torchmetrics import Metric

from tread_composer import samplers
from tread_composer.autoencoders import sample_moments
from tread_composer.core import batch as keys
from tread_composer.core.inference import evaluating
from tread_composer.core.named import part_named
from tread_composer.core.protocols import Autoencoder, Objective
from tread_composer.core.randomness import KeyedRandom

__all__ = ['LatentDiffusion']


class LatentDiffusion(ComposerModel):
    """A latent diffusion model that Composer can train.

    Its batches are dicts (see ``tread_composer.core.batch``) with noise, times and label dropout in them, where the
    callback ``KeyedDraws`` puts them. ``latents = (raw_latents - latent_shift) * latent_scale``.

    Args:
        denoiser: The network, ``(x_BCHW, t_B, labels_B) -> prediction``.
        objective: What it learns (``tread_composer.objectives``).
        latent_shape: C, H and W of a latent.
        num_classes: Number of classes; 0 for an unconditional model. The null label is ``num_classes``.
        class_names: Their names in pictures and tables; their numbers if empty.
        label_dropout: Share of training labels replaced by the null label.
        latent_scale: One number, or one for each channel.
        latent_shift: One number, or one for each channel.
        autoencoder: Turns raw latents into pixels; needed by ``decode`` only.

    Raises:
        ValueError: A value is out of range.
    """

    incompatible_with: ClassVar[Mapping[str, str]] = {
        'ProgressiveResizing': 'it interpolates the latents, while noise and positions stay those of one size, and a '
        'mean of neighbouring latents is no latent of a smaller image',
    }
    """Algorithms of Composer that cannot work on this model, by class name, each with the reason."""

    latent_scale: Tensor
    latent_shift: Tensor

    def __init__(
        self,
        denoiser: nn.Module,
        objective: Objective,
        *,
        latent_shape: Sequence[int],
        num_classes: int,
        class_names: Sequence[str] = (),
        label_dropout: float = 0.1,
        latent_scale: float | Sequence[float] = 1.0,
        latent_shift: float | Sequence[float] = 0.0,
        autoencoder: Autoencoder | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= label_dropout < 1:
            raise ValueError(f'label_dropout: {label_dropout!r} is not in [0, 1)')
        objective.check_latents(latent_shape)
        self.denoiser = denoiser
        self.objective = objective
        self.latent_shape = tuple(latent_shape)
        self.num_classes, self.null_label = num_classes, num_classes
        self.class_names = tuple(class_names)
        self.label_dropout = label_dropout if num_classes else 0.0
        # Not persistent: a checkpoint of the network alone keeps the keys of the network.
        for name, value in (('latent_scale', latent_scale), ('latent_shift', latent_shift)):
            self.register_buffer(name, self._per_channel(value, name), persistent=False)
        self._autoencoder = (autoencoder,)  # in a tuple: its weights are no parameters of this model
        quarters = {f'loss_time_quarter_{k + 1}': MeanLoss(k / 4, (k + 1) / 4) for k in range(4)}
        self._metrics = {'loss': MeanLoss(), **quarters}

    @property
    def autoencoder(self) -> Autoencoder | None:
        """What decodes; no part of the model's parameters."""
        return self._autoencoder[0]

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Losses ``[B]`` under ``'loss'``, and the objective's further terms; ``ValueError`` without draws."""
        missing = [key for key in (keys.NOISE, keys.TIME_QUANTILES, keys.LABEL_DROPPED) if key not in batch]
        if missing:
            raise ValueError(f'the batch has no {missing}: add KeyedDraws() to the callbacks of the Trainer')
        labels_B = torch.where(batch[keys.LABEL_DROPPED], self.null_label, batch[keys.LABELS])
        latents_BCHW = self.latents(batch)
        # Only FasterDiT's schedule puts a switch into the batch; other objectives do not know the argument.
        switch = {'direction_switch_B': batch[keys.DIRECTION_SWITCH]} if keys.DIRECTION_SWITCH in batch else {}
        draws = batch[keys.NOISE], batch[keys.TIME_QUANTILES]
        return self.objective(self.denoiser, latents_BCHW, labels_B, *draws, **switch)  # type: ignore[arg-type]

    def loss(self, outputs: dict[str, Tensor], batch: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """The mean loss; a dict with ``total`` if the objective names further terms, so that Composer logs them."""
        terms = {name: value.mean() for name, value in outputs.items()}
        total = terms.pop('loss')
        return {'total': total, **terms} if terms else total

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        """``loss``: mean over the evaluation set at fixed times and noise; and over each quarter of the times."""
        return {} if is_train else self._metrics  # type: ignore[return-value]

    def update_metric(self, batch: Mapping[str, Tensor], outputs: dict[str, Tensor], metric: Metric) -> None:
        """Add one batch."""
        # Where weights and further terms make up the loss, runs with and without them compare by the plain error,
        # which the objective then names 'mse'.
        metric.update(outputs.get('mse', outputs['loss']), batch[keys.TIME_QUANTILES])

    def latents(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Latents as the denoiser sees them, float32 ``[B, C, H, W]``; samples the posterior of stored moments."""
        raw = batch[keys.RAW_LATENTS].float()
        if keys.POSTERIOR_NOISE in batch:
            raw = sample_moments(raw, batch[keys.POSTERIOR_NOISE])  # [B, 2C, H, W] -> [B, C, H, W]
        return (raw - self.latent_shift) * self.latent_scale  # a number, or [C, 1, 1]

    def sample(
        self,
        labels: Sequence[int],
        seeds: Sequence[int],
        *,
        sampler: str = 'heun',
        num_steps: int = 25,
        guidance_scale: float = 1.0,
        batch_size: int = 256,
        sampler_settings: Mapping[str, Any] | None = None,
        evaluations: samplers.Evaluations | None = None,
    ) -> Tensor:
        """``draw`` with the settings that are asked for most, which has the others, the promises and the refusals.

        Args:
            sampler: Name of a sampler that fits the objective (``tread_composer.samplers.check_sampler``).
            guidance_scale: Classifier-free guidance on all channels; 1 is none.
            sampler_settings: Keyword arguments of the sampler, such as ``{'eta': 0.5}`` for ``'ddim'``.
        """
        if guidance_scale != 1 and not self.num_classes:
            raise ValueError(f'guidance_scale: {guidance_scale} needs classes, and this model has none; use 1')
        settings = samplers.SamplingSettings(
            sampler=sampler,
            num_steps=num_steps,
            sampler_settings=sampler_settings or {},
            guidance=samplers.default_guidance(guidance_scale),
            guidance_scale=guidance_scale,
        )
        return self.draw(labels, seeds, settings, batch_size=batch_size, evaluations=evaluations)

    @torch.no_grad()
    def draw(
        self,
        labels: Sequence[int],
        seeds: Sequence[int],
        settings: samplers.SamplingSettings,
        *,
        weak: nn.Module | None = None,
        batch_size: int = 256,
        evaluations: samplers.Evaluations | None = None,
    ) -> Tensor:
        """Draw latents, in evaluation mode. Each depends on weights, settings, its own label and its own seed alone.

        Up to rounding: a matrix product of another batch size may add up in another order, and sampling carries that
        on (in float32 about 1e-5 of a latent value; now and then a byte of an image differs by 1).

        Args:
            labels: One class each; ``null_label`` samples without a class.
            seeds: One non-negative seed each.
            settings: Sampler, steps and guidance.
            weak: The second network, for guidance that takes one: same objective, latents and device.
            batch_size: Samples in one network call (guidance may double them).
            evaluations: Learns of each evaluation, and how many each sample took.

        Returns:
            Latents, float32 ``[len(labels), C, H, W]`` on the model's device.

        Raises:
            ValueError: The settings do not fit the model, a label is out of range, or lengths differ.
        """
        try:
            samplers.check_sampler(settings.sampler, self.objective, settings.sampler_settings)
        except ValueError as error:
            raise ValueError(f'sampler: {error}') from None
        sampler, channels = part_named(settings.sampler, samplers.SAMPLERS), self.latent_shape[0]
        samplers.check_guidance(settings, self.denoiser, channels=channels, num_classes=self.num_classes, weak=weak)
        if len(labels) != len(seeds):
            raise ValueError(f'{len(labels)} labels but {len(seeds)} seeds: give one seed for each label')
        wrong = [label for label in labels if not 0 <= label <= self.null_label]
        if wrong:
            raise ValueError(f'labels {wrong[:5]} are not between 0 and {self.null_label} (the null label)')
        device, results, evaluations = self.latent_scale.device, [], evaluations or samplers.Evaluations()
        with evaluating(self, *([] if weak is None else [weak])):
            times = self.objective.sampling_times(settings.grid_steps)  # on the CPU: the samplers look at their values
            for offset in range(0, len(labels), batch_size):
                chunk = slice(offset, offset + batch_size)
                random, clock = KeyedRandom(0, 0, seeds[chunk]), samplers.Clock(evaluations.begun)
                start = self.objective.prior(random.normal('sampling', *self.latent_shape).to(device))
                labels_B = torch.tensor(labels[chunk], device=device)
                denoiser = samplers.guided_denoiser(
                    self.denoiser, settings, null_label=self.null_label, random=random, clock=clock, times=times,
                    weak=weak,
                )  # fmt: skip
                equation = samplers.Equation(self.objective, denoiser, labels_B, clock)

                def noise(step: int, random: KeyedRandom = random) -> Tensor:
                    return random.normal(f'sampling_step_{step}', *self.latent_shape).to(device)

                x = sampler(equation, start, times, noise, **settings.sampler_settings)
                results.append(x.float())  # the equation is solved in float64
                evaluations.taken += clock.taken(len(x))
        return torch.cat(results)

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Pixels ``[B, 1 or 3, H', W']`` in about [-1, 1], of latents as the denoiser sees them.

        ``dtype`` is the precision of the decoder; ``ValueError`` if there is none, or it cannot compute so.
        """
        if self.autoencoder is None:
            raise ValueError('this LatentDiffusion has no autoencoder, so it cannot decode; give it one')
        raw = latents_BCHW / self.latent_scale + self.latent_shift
        if dtype == torch.float32:
            return self.autoencoder.decode(raw)
        if 'dtype' not in inspect.signature(self.autoencoder.decode).parameters:
            raise ValueError(f'{type(self.autoencoder).__name__} decodes in float32 only, not in {dtype}')
        return self.autoencoder.decode(raw, dtype=dtype)  # type: ignore[call-arg]

    def _per_channel(self, value: float | Sequence[float], name: str) -> Tensor:
        tensor = torch.as_tensor(value, dtype=torch.float32)
        if tensor.dim() == 1 and len(tensor) == self.latent_shape[0]:
            return tensor.view(-1, 1, 1)
        if tensor.dim() != 0:
            raise ValueError(f'{name}: give one number or {self.latent_shape[0]}, one for each channel; got {value}')
        return tensor


class MeanLoss(Metric):
    """Mean of per-sample losses whose time quantile lies in ``[low, high)``; nan where there is none."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, low: float = 0.0, high: float = 1.0) -> None:
        super().__init__()
        self.low, self.high = low, high
        self.add_state('total', torch.zeros((), dtype=torch.float64), dist_reduce_fx='sum')
        self.add_state('count', torch.zeros((), dtype=torch.float64), dist_reduce_fx='sum')

    def update(self, losses_B: Tensor, quantiles_B: Tensor) -> None:
        """Add the losses of one batch."""
        inside = (quantiles_B >= self.low) & (quantiles_B < self.high)
        self.total += losses_B.double()[inside].sum()
        self.count += inside.sum()

    def compute(self) -> Tensor:
        """The mean, float32."""
        return (self.total / self.count).float()
