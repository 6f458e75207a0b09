"""What ``sweep`` was asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from tread_composer.core.bounds import MeasuredCount, Seed, Steps
from tread_composer.core.options import Device, Flag, Weights, check_request
from tread_composer.metrics.measurement import Measurement
from tread_composer.sample.request import Overrides, check_overrides

__all__ = ['SweepRequest']

Pair = tuple[float, float]


@dataclass(frozen=True)
class SweepRequest:
    """One call of ``sweep``.

    Args:
        path: A run folder, a checkpoint in one, or an exported .safetensors.
        out: Folder for the rows; after an interruption the same command continues.
        measurement: What is measured; its ``batch_size`` is that of drawing, too.
        guidance_scales: 1 is no guidance.
        intervals: Where to guide, in the objective's time; ``none`` for everywhere.
        guidances: Kinds of guidance, e.g. classifier_free sparse.
        guidance_settings: Settings of these kinds, e.g. weak_rate=0.8.
        weights: Which weights; ``posthoc:0.13`` of a run with ``algorithms.power_ema``.
        sampler: Name of the sampler.
        num_steps: Steps of the sampler.
        num_samples: Images for each row, equally many of each class.
        seed: Image i has the seed ``seed + i``, in every row, as in ``sample``.
        device: Where to compute (a GPU if there is one).
        overrides: Changes to the run's configuration, e.g. ``autoencoder.path=/data/vae``.

    Raises:
        UserError: A value is out of range.
    """

    path: Annotated[str, Flag('RUN')]
    out: Annotated[str, Flag(metavar='FOLDER')]
    measurement: Measurement
    guidance_scales: Annotated[tuple[float, ...], Flag('--guidance-scale', metavar='SCALE')] = (1.0,)
    intervals: Annotated[tuple[Pair | None, ...], Flag('--guidance-interval', '--interval', metavar='LOW:HIGH')] = (
        None,
    )
    guidances: Annotated[tuple[str, ...], Flag('--guidance', metavar='KIND')] = ('classifier_free',)
    guidance_settings: Mapping[str, Any] = field(default_factory=dict)
    weights: tuple[Weights, ...] = ('ema',)
    sampler: str = 'heun'
    num_steps: Annotated[Steps, Flag('--steps')] = 50
    num_samples: Annotated[MeasuredCount, Flag('--count', '--samples')] = 10_000
    seed: Seed = 0
    device: Device | None = None
    overrides: Overrides = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_request(self)
        check_overrides(self.overrides)
