"""What ``sample`` was asked for, and which labels and seeds that makes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tread_composer.core.errors import UserError
from tread_composer.metrics.drawing import Draws
from tread_composer.samplers import SamplingSettings

__all__ = ['DECODE_DTYPES', 'FORMATS', 'SamplesRequest', 'check_overrides', 'draws_of']

FORMATS = ('png', 'npz', 'mds')
DECODE_DTYPES = ('float32', 'bfloat16')
_COUNT = 64  # images, if nobody says how many


@dataclass(frozen=True)
class SamplesRequest:
    """One call of ``sample``.

    Args:
        path: Run folder, checkpoint or exported file.
        out: Folder of the images.
        weights: ``'ema'``, ``'raw'``, or ``'posthoc:0.13'`` of a run with ``algorithms.power_ema``.
        sampling: Sampler, steps and guidance.
        weak: The second network for guidance that takes one, as ``path``.
        weak_weights: Which weights of it.
        classes: Classes to draw, all if None. Image i is of class ``classes[i % len(classes)]``.
        per_class: Images of each class.
        count: Images in all, instead.
        labels_file: A text file with one label for each image, instead of all three.
        seed: Image i has the seed ``seed + i``.
        formats: Some of ``FORMATS``.
        batch_size: Images drawn together; no image depends on it, up to rounding.
        device: ``'cuda'``, ``'cpu'`` or None for a GPU if there is one.
        decode_dtype: What the autoencoder computes in.
        overrides: Settings that replace those of the run: of the autoencoder, and ``model.attention``, which is
            ``sdpa`` unless it stands here, whatever the run was trained with.

    Raises:
        UserError: Values that exclude each other or are out of range.
    """

    path: str
    out: Path
    weights: str = 'ema'
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    weak: str | None = None
    weak_weights: str = 'ema'
    classes: tuple[int, ...] | None = None
    per_class: int | None = None
    count: int | None = None
    labels_file: str | None = None
    seed: int = 0
    formats: tuple[str, ...] = ('png',)
    batch_size: int = 64
    device: str | None = None
    decode_dtype: str = 'float32'
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = [name for name in ('per_class', 'count', 'labels_file') if getattr(self, name) is not None]
        if len(counts) > 1 or (self.labels_file is not None and self.classes is not None):
            names = [*counts, 'classes'] if self.classes else counts
            flags = ', '.join(f'--{name.replace("_", "-")}' for name in names)
            raise UserError(f'{flags}: each of them says how many images of which class there are; give one')
        for name in ('per_class', 'count', 'batch_size'):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f'--{name.replace("_", "-")}: {value} must be at least 1')
        if self.seed < 0:
            raise UserError(f'--seed: {self.seed} must not be negative')
        unknown = [name for name in self.formats if name not in FORMATS]
        if unknown or not self.formats:
            raise UserError(f'--format: {", ".join(unknown) or "none"}; choose of {", ".join(FORMATS)}')
        if self.decode_dtype not in DECODE_DTYPES:
            raise UserError(f'--decode-dtype: {self.decode_dtype!r}; choose of {", ".join(DECODE_DTYPES)}')
        check_overrides(self.overrides)


def check_overrides(overrides: Mapping[str, Any]) -> None:
    """Refuse settings that would make a trained model another one.

    Raises:
        UserError: A setting is not one of the autoencoder.
    """
    foreign = [name for name in overrides if not name.startswith('autoencoder') and name != 'model.attention']
    if foreign:
        raise UserError(
            f'{", ".join(foreign)}: a trained model is sampled as it was trained; only the autoencoder can be another '
            'one, for example autoencoder.path=/data/vae, and model.attention computed otherwise'
        )


def draws_of(request: SamplesRequest, num_classes: int) -> Draws:
    """The labels and seeds that are asked for, of a model with so many classes.

    Raises:
        UserError: A label is no class of the model, or the file of labels cannot be read.
    """
    if request.labels_file is not None:
        draws = Draws(_read_labels(request.labels_file), request.seed, 'file')
    else:
        classes = request.classes or tuple(range(num_classes)) or (0,)  # 0 is the null label of a model without classes
        count = request.count or (request.per_class or 0) * len(classes) or _COUNT
        draws = Draws.in_turn(count, num_classes, request.seed)
        if request.classes is not None:
            labels = tuple(classes[index % len(classes)] for index in range(count))
            draws = Draws(labels, request.seed, 'classes' if num_classes else 'none')
    wrong = sorted({label for label in draws.labels if not 0 <= label <= num_classes})
    if wrong:
        allowed = f'0 to {num_classes - 1}, or {num_classes} for no class' if num_classes else '0, it has no classes'
        raise UserError(f'labels {wrong[:5]}: this model knows {allowed}')
    return draws


def _read_labels(name: str) -> tuple[int, ...]:
    try:
        words = Path(name).read_text(encoding='utf-8').split()
        labels = tuple(int(word) for word in words)
    except (OSError, ValueError) as error:
        raise UserError(
            f'--labels-file {name}: must be a text file of whole numbers, one for each image: {error}'
        ) from error
    if not labels:
        raise UserError(f'--labels-file {name}: holds no labels')
    return labels
