"""What ``sample`` was asked for, and which labels and seeds that makes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge

from tread_composer.core.bounds import ImageCount, Seed
from tread_composer.core.errors import UserError
from tread_composer.core.options import Device, Flag, Weights, check_request
from tread_composer.samplers.settings import SamplingSettings

if TYPE_CHECKING:
    from tread_composer.metrics.drawing import Draws

__all__ = ['Overrides', 'SamplesRequest', 'check_overrides', 'draws_of']

Overrides = Annotated[Mapping[str, Any], Flag('autoencoder.key=value')]
_OF_SAMPLING = ('model.attention', 'objective.sampling_shift')  # no part of what the weights learnt
_COUNT = 64  # images, if nobody says how many


@dataclass(frozen=True)
class SamplesRequest:
    """One call of ``sample``.

    Args:
        path: A run folder, a checkpoint in one, or an exported .safetensors.
        out: Folder for the images; after an interruption the same command continues.
        weights: Which weights; ``posthoc:0.13`` of a run with ``algorithms.power_ema``.
        sampling: How to draw.
        weak: The second network for guidance that takes one, e.g. an early checkpoint.
        weak_weights: Weights of the second network.
        classes: Classes to draw (all). Image i is of class ``classes[i % len(classes)]``.
        count: Images in total, classes in turn (64); published numbers use 50000.
        seed: Image i has the seed ``seed + i``.
        formats: Files to write; ``npz`` as in ADM.
        batch_size: Images in one call of a network; no image depends on it, up to rounding.
        device: Where to compute (a GPU if there is one).
        decode_dtype: What the autoencoder computes in.
        engine: Who draws: the ranks that a launcher has started, or workers of Ray.
        ray_workers: How many (one for each GPU of the cluster; without any, one for each machine).
        overrides: Changes to the run's configuration: ``autoencoder.path=/data/vae`` where the autoencoder has moved,
            ``model.attention`` (``sdpa`` by default, however the run was trained), and, for flow matching,
            ``objective.sampling_shift``, the shift of the sampling times.

    Raises:
        UserError: Values that exclude each other or are out of range.
    """

    path: Annotated[str, Flag('PATH')]
    out: Annotated[Path, Flag(metavar='FOLDER')]
    weights: Weights = 'ema'
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    weak: str | None = None
    weak_weights: Weights = 'ema'
    classes: tuple[int, ...] | None = None
    count: ImageCount | None = None
    seed: Seed = 0
    formats: Annotated[tuple[Literal['png', 'npz', 'mds'], ...], Flag('--format')] = ('png',)
    batch_size: Annotated[int, Ge(1)] = 64
    device: Device | None = None
    decode_dtype: Literal['float32', 'bfloat16'] = 'float32'
    engine: Literal['ranks', 'ray'] = 'ranks'
    ray_workers: Annotated[int | None, Ge(1)] = None
    overrides: Overrides = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_request(self)
        check_overrides(self.overrides)
        if self.ray_workers and self.engine != 'ray':
            raise UserError('--ray-workers: only with --engine ray')


def check_overrides(overrides: Mapping[str, Any]) -> None:
    """Refuse settings that would make a trained model another one with a ``UserError``."""
    foreign = [name for name in overrides if not name.startswith('autoencoder') and name not in _OF_SAMPLING]
    if foreign:
        raise UserError(
            f'{", ".join(foreign)}: a trained model is sampled as it was trained; only the autoencoder can be another '
            'one, for example autoencoder.path=/data/vae, model.attention computed otherwise, and the sampling times '
            'shifted by objective.sampling_shift=3.33'
        )


def draws_of(request: SamplesRequest, num_classes: int) -> 'Draws':
    """Labels and seeds asked of a model with so many classes; ``UserError`` if a label is none of them."""
    from tread_composer.metrics.drawing import Draws  # loads torch, which the command lines do not need

    count, classes = request.count or _COUNT, request.classes
    draws = Draws.in_turn(count, num_classes, request.seed)
    if classes:
        labels = tuple(classes[index % len(classes)] for index in range(count))
        draws = Draws(labels, request.seed, 'classes' if num_classes else 'none')
    wrong = sorted({label for label in draws.labels if not 0 <= label <= num_classes})
    if wrong:
        allowed = f'0 to {num_classes - 1}, or {num_classes} for no class' if num_classes else '0, it has no classes'
        raise UserError(f'labels {wrong[:5]}: this model knows {allowed}')
    return draws
