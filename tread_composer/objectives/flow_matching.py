"""Flow matching on the straight path between data and noise (Lipman et al. 2022, arXiv 2210.02747; SiT, 2401.08740).

t = 0 is data and t = 1 is noise, so the velocity to learn is ``noise - data``. SiT writes it the other way round.
FasterDiT (arXiv 2410.10356) is this objective with logit-normal times and the velocity-direction loss.

Shapes: B samples, C channels, H x W latent pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from tread_composer.core.bounds import AtLeast1, NonNegative, Positive
from tread_composer.core.options import Checked
from tread_composer.core.protocols import Denoiser, Drift, TimeDistribution, Weighting
from tread_composer.objectives.prediction import predict, squared_error
from tread_composer.objectives.snr import SNRDistribution, from_times
from tread_composer.objectives.timesteps import LogitNormal, Shifted, check_distribution, shift_times
from tread_composer.objectives.weighting import check_weighting

__all__ = ['FlowMatching', 'direction_error']

_SHORTEST = 0.01  # a vector shorter than this counts as this long; velocities are about as long as their noise


@dataclass(frozen=True)
class FlowMatching(Checked):
    """Learn the velocity of ``x_t = (1 - t) x + t noise``; the denoiser is given ``t``, unscaled.

    Args:
        time_distribution: How training times are spread. The default is that of TREAD's code (logit-normal, 0 and 1).
        time_shift: Moves the training times, above 1 towards noise (SD3, arXiv 2403.03206, eq. 23); 1 leaves them.
        sampling_shift: Moves the equidistant times of sampling in the same way; 1 leaves them.
        weighting: Weight on the squared error; none if None.
        direction_weight: Weight of FasterDiT's velocity-direction loss beside the squared error; 1 in the paper, 0
            without it.
        direction_patch: Side of the square of latent pixels whose values are one vector of the direction loss. 1, the
            paper's, compares over the channels of each pixel; more is ours, for latents of one channel, whose
            "direction" would be a mere sign that no gradient moves.
    """

    name: ClassVar[str] = 'flow_matching'
    prediction: ClassVar[str] = 'velocity: noise - data'
    time_convention: ClassVar[str] = 't=0 data, t=1 noise; the network is told t'
    learned_variance: ClassVar[bool] = False
    drift_at_zero: ClassVar[bool] = True  # a velocity, which no time divides
    continuous_times: ClassVar[bool] = True

    time_distribution: TimeDistribution = field(default_factory=LogitNormal)
    time_shift: Positive = 1.0
    sampling_shift: Positive = 1.0
    weighting: Weighting | None = None
    direction_weight: NonNegative = 0.0
    direction_patch: AtLeast1 = 1
    times: TimeDistribution = field(init=False, repr=False, compare=False)
    """The distribution of the training times, after ``time_shift``."""

    def __post_init__(self) -> None:
        """Check the settings, and shift the times: here, as ``torch.compile`` cannot trace a constructor's checks."""
        super().__post_init__()
        check_distribution('FlowMatching: time_distribution', self.time_distribution)
        check_weighting('FlowMatching: weighting', self.weighting)
        times = self.time_distribution if self.time_shift == 1 else Shifted(self.time_distribution, self.time_shift)
        object.__setattr__(self, 'times', times)

    def time_grid(self) -> dict[str, Any]:
        """See ``protocols.Objective``."""
        return {'sampling_shift': self.sampling_shift}

    def target(self) -> dict[str, Any]:
        """See ``protocols.Objective``: a velocity is the same whatever the settings."""
        return {}

    def check_latents(self, latent_shape: Sequence[int]) -> None:
        """Refuse latents (C, H and W) that the direction loss cannot work with.

        Raises:
            ValueError: Each vector would be one number, or the pixels do not divide into patches.
        """
        channels, height, width = latent_shape
        patch = self.direction_patch
        if not self.direction_weight:
            return
        if channels * patch**2 < 2:
            raise ValueError(
                'direction_weight: the latents have one channel, and the direction of one number is its sign: the loss '
                'would have no gradient. Set direction_patch to 2 (compares squares of 2 x 2 pixels; not in the '
                'paper), or direction_weight to 0'
            )
        if height % patch or width % patch:
            raise ValueError(
                f'direction_patch: {patch} does not divide latents of {height} x {width}; take a divisor, or 1'
            )

    def __call__(
        self,
        denoiser: Denoiser,
        latents_BCHW: Tensor,
        labels_B: Tensor,
        noise_BCHW: Tensor,
        quantiles_B: Tensor,
        /,
        *,
        direction_switch_B: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses per sample ``[B]`` in float32; see ``protocols.Objective``.

        ``'loss'`` is the squared error of the velocity. With a weighting or the direction loss it is the sum that is
        minimised, ``'mse'`` the plain squared error and ``'direction'`` the direction loss, unweighted and also while
        it is off: ``direction_switch_B`` multiplies it, 0 turns it off.
        """
        x, noise = latents_BCHW.float(), noise_BCHW.float()
        t_B = self.times.quantile(quantiles_B.float())
        t = t_B.view(-1, 1, 1, 1)  # one time for all values of a sample
        # d/dt of (1 - t) x + t noise is noise - x, at every t.
        velocity, target = predict(denoiser, (1 - t) * x + t * noise, t_B, labels_B), noise - x
        mse_B = squared_error(velocity, target)
        if self.weighting is None and not self.direction_weight:
            return {'loss': mse_B}
        losses = {'loss': mse_B, 'mse': mse_B}
        if self.weighting is not None:
            # SNR of the path: (1 - t)^2 / t^2.
            losses['loss'] = self.weighting(((1 - t_B) / t_B).square(), 'flow') * mse_B
        if self.direction_weight:
            # FasterDiT, section 4: 1 - cosine, unweighted in the log.
            losses['direction'] = direction_error(velocity, target, self.direction_patch)
            weight = self.direction_weight if direction_switch_B is None else self.direction_weight * direction_switch_B
            losses['loss'] = losses['loss'] + weight * losses['direction']
        return losses

    def noise_level(self, time: float) -> float:
        """``t / (1 - t)``."""
        return time / (1 - time)  # x_t / (1 - t) = data + t / (1 - t) noise

    def noised(self, latents_BCHW: Tensor, noise_BCHW: Tensor, time: float) -> tuple[Tensor, float]:
        """``(1 - t) x + t noise``, and t."""
        # The equation's own time is t itself.
        return (1 - time) * latents_BCHW + time * noise_BCHW, time

    def snr(self, data_std: float) -> SNRDistribution:
        """What signal-to-noise ratios it trains on, for latents of this standard deviation."""
        return from_times(self.times, data_std=data_std, weighting=self.weighting)

    def drift(self, denoiser: Denoiser, labels_B: Tensor) -> Drift:
        """``dx/dt = velocity``: what the denoiser predicts, in float64."""

        def velocity(x_BCHW: Tensor, time: Tensor) -> Tensor:
            t_B = time.to(x_BCHW.device).expand(x_BCHW.shape[0])  # of the whole batch, or of each sample
            return predict(denoiser, x_BCHW, t_B, labels_B).double()

        return velocity

    def score(self, x_BCHW: Tensor, velocity_BCHW: Tensor, time: Tensor) -> Tensor:
        """Gradient of the log density at ``time`` > 0: ``-(x + (1 - t) velocity) / t``.

        The bracket is the expected noise. SiT (arXiv 2401.08740, eq. 9) with time turned round.
        """
        t = time.to(x_BCHW.device)
        # x = (1 - t) data + t noise and velocity = noise - data: x + (1 - t) velocity = noise; score = -noise / t.
        return -(x_BCHW + (1 - t) * velocity_BCHW) / t

    def sampling_times(self, num_steps: int) -> Tensor:
        """``num_steps + 1`` times from 1 to 0, equidistant before ``sampling_shift``, float64.

        Raises:
            ValueError: ``num_steps`` is below 1.
        """
        if num_steps < 1:
            raise ValueError(f'num_steps={num_steps}: sampling takes at least 1 step')
        return shift_times(torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64), self.sampling_shift)

    def prior(self, noise_BCHW: Tensor) -> Tensor:
        """At t = 1 there is nothing but noise: the noise itself, float64."""
        return noise_BCHW.double()


def direction_error(a_BCHW: Tensor, b_BCHW: Tensor, patch: int = 1) -> Tensor:
    """One minus the cosine between the two over the channels of a pixel, averaged over the pixels: ``[B]``, 0 to 2.

    FasterDiT's velocity-direction loss (arXiv 2410.10356, section 4). A ``patch`` above 1 takes the values of
    ``patch x patch`` pixels as one vector.
    """
    # [B, C, H, W] -> [B, C p^2, H / p, W / p]: the values of a patch become channels.
    a, b = functional.pixel_unshuffle(a_BCHW, patch), functional.pixel_unshuffle(b_BCHW, patch)
    return 1 - (_unit(a) * _unit(b)).sum(dim=1).flatten(1).mean(dim=1)


def _unit(x_BCHW: Tensor) -> Tensor:
    # DiT begins with an output of exactly 0, where torch's cosine_similarity (eps 1e-8) has gradients of 10^8: Adam's
    # second moment would remember them for tens of thousands of steps, and the last layer would hardly move.
    squares = x_BCHW.square().sum(dim=1, keepdim=True)
    return x_BCHW / squares.clamp(min=_SHORTEST**2).sqrt()
