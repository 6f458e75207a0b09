"""DDPM as DiT trains it: predict the noise, and where in its possible range the variance of a reverse step lies.

Sources: Ho et al. 2020 (arXiv 2006.11239) and Nichol and Dhariwal 2021 (arXiv 2102.09672; "ID" below). The network is
given the timestep 0 .. T - 1 unscaled, so that DiT's published weights work. Sampling knows the noise level instead,
``sigma = sqrt((1 - alpha_bar) / alpha_bar)``, and walks ``x_t / sqrt(alpha_bar)``, which is ``data + sigma noise`` as
in EDM: there DDIM is Euler's method (Song et al. 2020, arXiv 2010.02502, eq. 14), and 0 is data.

Shapes: B samples, C channels, H x W latent pixels, T timesteps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, repeat
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from tread_composer.core.bounds import AtLeast2, Positive
from tread_composer.core.options import Checked
from tread_composer.core.protocols import Denoiser, Drift, Transition, Weighting
from tread_composer.objectives.prediction import predict, squared_error
from tread_composer.objectives.snr import SNRDistribution, from_steps
from tread_composer.objectives.weighting import check_weighting

__all__ = ['DDPM', 'evenly_spaced']

_DEFAULT_BETAS = 1e-4, 0.02
_LEAST_SIGNAL = float(np.finfo(np.float64).tiny)  # of alpha_bar: below it, float64 has no noise level
_COSINE_SHIFT, _LARGEST_BETA = 0.008, 0.999  # ID, section 3.2
_HALF_BIN, _EDGE, _LEAST_PROBABILITY = 1 / 255, 0.999, 1e-12  # 256 grey values over [-1, 1]; ADM's edge and floor


@dataclass(frozen=True)
class DDPM(Checked):
    """Learn the noise in ``x_t = sqrt(alpha_bar_t) x + sqrt(1 - alpha_bar_t) noise`` at T discrete timesteps.

    Args:
        num_timesteps: T, at least 2.
        beta_start: First beta of the linear schedule. (ADM's code scales both by 1000 / T; here they stay as given.)
        beta_end: Last beta of the linear schedule.
        schedule: ``'linear'`` betas, or ``'cosine'``: ``alpha_bar`` is a squared cosine (ID, eq. 17).
        learned_variance: The network has 2C output channels: the noise, then v, which places the logarithm of a
            reverse step's variance between that of the true posterior (v = -1) and that of the forward step (v = 1;
            ID, eq. 15). v is not clamped. Without it sampling takes the forward step's variance, as ADM does.
        weighting: Weight on the squared error of the noise; none if None.

    Raises:
        ValueError: A setting is out of range, betas leave no signal, or are given to the cosine schedule.
    """

    name: ClassVar[str] = 'ddpm'
    time_convention: ClassVar[str] = (
        't=0 data, t=1 noise; the network is told the timestep, 0 .. T - 1 from data to noise'
    )

    drift_at_zero: ClassVar[bool] = False  # no timestep is without noise, so the network has seen none

    num_timesteps: AtLeast2 = 1000
    beta_start: Positive = _DEFAULT_BETAS[0]
    beta_end: Positive = _DEFAULT_BETAS[1]
    schedule: Literal['linear', 'cosine'] = 'linear'
    learned_variance: bool = True
    weighting: Weighting | None = None
    alphas_cumprod: Tensor = field(init=False, repr=False, compare=False)
    """``alpha_bar``, float64 ``[T]`` on the CPU; the signal-to-noise ratio is ``alpha_bar / (1 - alpha_bar)``."""
    _table: Tensor = field(init=False, repr=False, compare=False)  # float32 [T, 6], see `__post_init__`
    _levels: np.ndarray = field(init=False, repr=False, compare=False)  # sigma, float64 [T], rising

    def __post_init__(self) -> None:
        """Check the settings, and tabulate what depends on the timestep alone."""
        super().__post_init__()
        check_weighting('DDPM: weighting', self.weighting)
        self._check_betas()
        betas = self._betas()
        alpha_bar = np.cumprod(1 - betas)  # [T], float64: float32 products of 1000 factors would drift
        if alpha_bar[-1] < _LEAST_SIGNAL:
            raise ValueError(
                f'DDPM: beta_start={self.beta_start}, beta_end={self.beta_end} at num_timesteps={self.num_timesteps} '
                'leave nothing of the data at the last timestep, where sampling begins, so that its noise level is '
                'infinite; lower beta_end'
            )
        # beta-tilde, the variance of q(x_(t-1) | x_t, x) (Ho et al., eq. 7), for t >= 1.
        posterior = betas[1:] * (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:])
        columns = (
            np.sqrt(alpha_bar),  # factor of the data in x_t
            np.sqrt(1 - alpha_bar),  # factor of the noise in x_t
            betas / np.sqrt((1 - betas) * (1 - alpha_bar)),  # error of the mean for an error of the noise (eq. 11)
            np.log(np.append(posterior[0], posterior)),  # the last step's is 0; ADM lends it its neighbour's
            np.log(betas),  # log-variance of the forward step, the upper end (ID, eq. 15)
            alpha_bar / (1 - alpha_bar),  # signal-to-noise ratio
        )
        # From numpy: a model that is planned on torch's meta device still has real tables.
        object.__setattr__(self, 'alphas_cumprod', torch.from_numpy(alpha_bar))
        object.__setattr__(self, '_table', torch.from_numpy(np.stack(columns, axis=1).astype(np.float32)))
        object.__setattr__(self, '_levels', np.sqrt((1 - alpha_bar) / alpha_bar))

    @property
    def prediction(self) -> str:
        """See ``protocols.Objective``."""
        return 'noise' + (', then where the variance of a reverse step lies' if self.learned_variance else '')

    def time_grid(self) -> dict[str, Any]:
        """See ``protocols.Objective``; the cosine schedule has no betas to choose."""
        betas = {'beta_start': self.beta_start, 'beta_end': self.beta_end} if self.schedule == 'linear' else {}
        return {'num_timesteps': self.num_timesteps, 'schedule': self.schedule, **betas}

    def target(self) -> dict[str, Any]:
        """See ``protocols.Objective``: the network is given timesteps, which mean other noise in another schedule."""
        names = ('num_timesteps', 'schedule', 'beta_start', 'beta_end', 'learned_variance')
        return {name: getattr(self, name) for name in names}

    def check_latents(self, latent_shape: Sequence[int]) -> None:
        """Any will do."""

    def __call__(
        self, denoiser: Denoiser, latents_BCHW: Tensor, labels_B: Tensor, noise_BCHW: Tensor, quantiles_B: Tensor, /
    ) -> dict[str, Tensor]:
        """Per-sample losses ``[B]``, float32; see ``protocols.Objective``. The timestep is ``floor(quantile T)``.

        ``loss = weight mse + vlb`` is what is minimised. ``mse`` is the plain squared error of the noise, which is also
        what evaluation reports. ``vlb``, with learned variance only, is the timestep's term of the variational bound in
        bits per latent value (`_bound_in_bits`). Without weighting and learned variance there is only ``loss``.

        The bound is added as it is. Its mean over timesteps is 1/T of the whole bound, so at T = 1000 this is the
        hybrid loss of ID (eq. 16, lambda = 0.001), and the same as ADM's rescaled form (a factor of T / 1000).
        """
        x, noise = latents_BCHW.float(), noise_BCHW.float()
        # Timesteps [B], and each column of the table at them, [B, 1, 1, 1].
        t_B = self._timestep(quantiles_B)
        signal, spread, gain, log_least, log_most, snr = self._table.to(x.device)[t_B].T[:, :, None, None, None]
        out = predict(denoiser, signal * x + spread * noise, t_B, labels_B, learn_sigma=self.learned_variance)
        eps = out[:, : x.shape[1]]  # the first C channels
        mse_B = squared_error(eps, noise)
        if self.weighting is None and not self.learned_variance:
            return {'loss': mse_B}
        terms = {'loss': mse_B, 'mse': mse_B}
        if self.weighting is not None:
            terms['loss'] = self.weighting(snr.flatten(), 'eps') * mse_B
        if self.learned_variance:
            # The mean is detached: the bound trains the variance only (ID, section 3.1).
            error = gain * (eps.detach() - noise)
            log_variance = _between(log_least, log_most, out[:, x.shape[1] :])
            terms['vlb'] = _bound_in_bits(x, error, log_least, log_variance, t_B == 0)
            terms['loss'] = terms['loss'] + terms['vlb']
        return terms

    def noise_level(self, time: float) -> float:
        """``sqrt((1 - alpha_bar) / alpha_bar)`` of timestep ``floor(t T)``."""
        alpha_bar = self.alphas_cumprod[self._timestep(torch.tensor(time, dtype=torch.float64))]
        return float(((1 - alpha_bar) / alpha_bar).sqrt())

    def noised(self, latents_BCHW: Tensor, noise_BCHW: Tensor, time: float) -> tuple[Tensor, float]:
        """``x + sigma noise``, and sigma, which is the time of the sampling equation."""
        sigma = self.noise_level(time)
        return latents_BCHW + sigma * noise_BCHW, sigma

    def snr(self, data_std: float) -> SNRDistribution:
        """What signal-to-noise ratios it trains on, for latents of this standard deviation."""
        alpha_bar = self.alphas_cumprod  # float64 [T]; every step is equally likely
        weights = None if self.weighting is None else self.weighting(alpha_bar / (1 - alpha_bar), 'eps')
        return from_steps(alpha_bar, data_std=data_std, weights=weights)

    def drift(self, denoiser: Denoiser, labels_B: Tensor) -> Drift:
        """``dx/dsigma = eps``, float64, for x scaled to ``data + sigma noise``.

        A noise level between two timesteps reaches the network as a fraction; `sampling_times` has none of those.
        """

        def slope(x_BCHW: Tensor, time: Tensor) -> Tensor:
            return self._predict(denoiser, x_BCHW, float(time), labels_B)[:, : x_BCHW.shape[1]]

        return slope

    def transition(self, denoiser: Denoiser, labels_B: Tensor) -> Transition:
        """One reverse step of the chain that visits only the noise levels asked for; see ``protocols.ReverseChain``.

        The mean is that of the posterior ``q(x_next | x, data)`` for the predicted data, which are not clipped (DiT
        samples latents with ``clip_denoised=False``). The variance is that of the shortened chain, fixed or learned.
        """

        def step(x_BCHW: Tensor, time: Tensor, next_time: Tensor) -> tuple[Tensor, Tensor]:
            sigma, next_sigma = float(time), float(next_time)
            out = self._predict(denoiser, x_BCHW, sigma, labels_B)
            # Variance of the noise that the step removes; data x0 = x - sigma eps, and the posterior mean lies between.
            channels, removed = x_BCHW.shape[1], sigma**2 - next_sigma**2
            mean = x_BCHW - removed / sigma * out[:, :channels]
            if next_sigma == 0:  # the data themselves
                return mean, torch.zeros_like(mean)
            # beta-tilde and beta of the step from `sigma` to `next_sigma`, both over the alpha_bar of `next_sigma`.
            least = removed * (next_sigma / sigma) ** 2
            most = removed * (1 + next_sigma**2) / (1 + sigma**2)
            if not self.learned_variance:
                return mean, torch.full_like(mean, math.sqrt(most))
            return mean, torch.exp(_between(math.log(least), math.log(most), out[:, channels:]) / 2)

        return step

    def sampling_times(self, num_steps: int) -> Tensor:
        """Noise levels of ``num_steps`` evenly spaced timesteps, highest first, then 0; float64.

        Raises:
            ValueError: ``num_steps`` is not between 1 and T.
        """
        kept = evenly_spaced(self.num_timesteps, num_steps)
        return torch.from_numpy(np.append(self._levels[kept[::-1]], 0.0))

    def prior(self, noise_BCHW: Tensor) -> Tensor:
        """At the last timestep x counts as pure noise; scaled, that is ``noise / sqrt(alpha_bar_T-1)``, float64."""
        # 1 / alpha_bar = 1 + sigma^2.
        return noise_BCHW.double() * math.sqrt(1 + float(self._levels[-1]) ** 2)

    def _timestep(self, u: Tensor) -> Tensor:
        # In float64: in float32, the largest quantile below 1 times T would round up to T.
        return (u.double() * self.num_timesteps).long().clamp(0, self.num_timesteps - 1)

    def _predict(self, denoiser: Denoiser, x_BCHW: Tensor, level: float, labels_B: Tensor) -> Tensor:
        t = float(np.interp(level, self._levels, np.arange(self.num_timesteps)))
        # An integer is what `predict` can hand over unrounded.
        t_B = torch.full_like(labels_B, t, dtype=torch.int64 if t.is_integer() else torch.float32)
        noisy = x_BCHW / math.sqrt(1 + level**2)  # back to x_t: sqrt(alpha_bar) = 1 / sqrt(1 + sigma^2)
        return predict(denoiser, noisy, t_B, labels_B, learn_sigma=self.learned_variance).double()

    def _betas(self) -> np.ndarray:
        if self.schedule == 'linear':
            return np.linspace(self.beta_start, self.beta_end, self.num_timesteps)
        angle = (np.linspace(0, 1, self.num_timesteps + 1) + _COSINE_SHIFT) / (1 + _COSINE_SHIFT) * np.pi / 2
        alpha_bar = np.cos(angle) ** 2  # up to a constant, which the quotients do not see (ID, eq. 17)
        return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], _LARGEST_BETA)

    def _check_betas(self) -> None:
        betas = self.beta_start, self.beta_end
        values = f'DDPM: beta_start={betas[0]}, beta_end={betas[1]}'
        if self.schedule == 'cosine' and betas != _DEFAULT_BETAS:
            raise ValueError(f"{values} belong to schedule 'linear'; remove them or take it")
        if not 0 < betas[0] <= betas[1] < 1:
            raise ValueError(f'{values} must be 0 < beta_start <= beta_end < 1')


def evenly_spaced(num_timesteps: int, num_steps: int) -> list[int]:
    """The timesteps of a shortened chain: ADM's rule for one section, which DiT samples with.

    The first and the last are kept, and ``num_steps - 2`` at equal strides between, rounded to the nearest (halves to
    even). One step is the last timestep, where sampling begins: ADM's rule gives the first, which takes noise for data.

    Raises:
        ValueError: ``num_steps`` is not between 1 and ``num_timesteps``.
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(
            f'num_steps={num_steps}: this objective has {num_timesteps} timesteps; take 1 to {num_timesteps} steps'
        )
    if num_steps == 1:
        return [num_timesteps - 1]
    # Added up in float64, as it is there: a product would round 283 of the 999 lists for T = 1000 otherwise.
    strides = repeat((num_timesteps - 1) / (num_steps - 1), num_steps - 1)
    return [round(position) for position in accumulate(strides, initial=0.0)]


def _between(log_least: Tensor | float, log_most: Tensor | float, v: Tensor) -> Tensor:
    """The logarithm of the variance that v in [-1, 1] stands for (ID, eq. 15)."""
    share = (v + 1) / 2  # 0 at the posterior's variance, 1 at the forward step's
    return share * log_most + (1 - share) * log_least


def _bound_in_bits(x: Tensor, error: Tensor, log_least: Tensor, log_variance: Tensor, is_first_B: Tensor) -> Tensor:
    """The bound's term of each sample's timestep, mean over its values, in bits: ``[B]``.

    For t > 0 the divergence of the true posterior ``N(mean + error, exp(log_least))`` from the model's
    ``N(mean, exp(log_variance))``; at t = 0 minus the log-likelihood of x in bins of width 2/255 (Ho et al., eq. 13).
    Latents have no bins: DiT keeps this term as it was made for pixels, and so does this baseline.
    """
    # Twice the divergence of two normal distributions, value by value, in nats.
    divergence = (
        log_variance - log_least - 1 + torch.exp(log_least - log_variance) + error**2 * torch.exp(-log_variance)
    )
    nats = torch.where(is_first_B.view(-1, 1, 1, 1), -_log_bin(x, error, log_variance), divergence / 2)
    return nats.flatten(1).mean(dim=1) / math.log(2)  # nats to bits


def _log_bin(x: Tensor, error: Tensor, log_variance: Tensor) -> Tensor:
    """Logarithm of the probability of x's bin under a normal distribution whose mean lies ``error`` below x.

    The outermost bins (beyond 0.999) are open, and no probability counts as less than 1e-12, as in ADM's code.
    """
    per_std, distance = torch.exp(-log_variance / 2), error.abs()
    # Mirrored to the left tail, where the difference of two small numbers is exact.
    inner = _cdf((_HALF_BIN - distance) * per_std) - _cdf((-_HALF_BIN - distance) * per_std)
    lowest, highest = _cdf((_HALF_BIN + error) * per_std), _cdf((_HALF_BIN - error) * per_std)
    probability = torch.where(x < -_EDGE, lowest, torch.where(x > _EDGE, highest, inner))
    return probability.clamp(min=_LEAST_PROBABILITY).log()


def _cdf(x: Tensor) -> Tensor:
    """That of N(0, 1); ADM's is a tanh, off by up to 2e-4."""
    # Not `ndtr`, which is 1 + erf(x / sqrt(2)) over 2: in float32 nothing is left of it below -5.5.
    return torch.special.erfc(x * -math.sqrt(0.5)) / 2
