"""A picture of what the model has learnt so far: one row per class, drawn while it trains."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from composer.core import State
from composer.loggers import Logger
from composer.utils import dist
from PIL import Image
from torch import Tensor

from tread_composer.autoencoders.pixels import to_tiles
from tread_composer.callbacks.sampling import AtInterval, Sampling, Weights, bare_model, log_file
from tread_composer.core.errors import UserError
from tread_composer.io.files import write_atomically
from tread_composer.io.picture_grid import picture_grid

__all__ = ['SampleGrid', 'draw_grid', 'keep_grid']

_FEW_CLASSES, _SHOWN_CLASSES = 10, 8


class SampleGrid(AtInterval):
    """Draws a labelled grid of samples at an interval and at the end of training.

    Writes ``<folder>/ba000800.png`` and the same picture as ``latest.png``, and hands both to every logger that has a
    ``log_file``. The images of a column share their noise. Given weights and seed the picture is always the same.
    Runs on ``Event.BATCH_CHECKPOINT`` or ``Event.EPOCH_CHECKPOINT`` (after the weights were averaged), and
    ``Event.FIT_END``.

    Args:
        interval: A Composer time string, e.g. ``'1ep'`` or ``'200ba'``.
        folder: Where the pictures go. ``{run_name}`` is filled in. (Default: ``runs/{run_name}/samples``.)
        classes: The classes of the rows. (Default: all if there are at most 10, else the first 8.)
        class_names: Names of all classes of the model, in order. (Default: the model's ``class_names``, else numbers.)
        samples_per_class: Images in a row.
        sampler: Name of a sampler.
        num_steps: Its steps.
        guidance_scale: Classifier-free guidance; 1 is none.
        weights: ``'ema'`` for the averaged weights, ``'raw'`` for those in training.
        seed: Of the first column; the next ones count on.

    Raises:
        UserError: a setting is impossible, or at ``Event.FIT_START`` a class is unknown or there are no averaged
            weights.
    """

    default_folder: ClassVar[str] = 'samples'
    """In the folder of a run that is described by a YAML file."""

    def __init__(
        self,
        interval: str = '1ep',
        *,
        folder: str = 'runs/{run_name}/samples',
        classes: Sequence[int] | None = None,
        class_names: Sequence[str] | None = None,
        samples_per_class: int = 10,
        sampler: str = 'heun',
        num_steps: int = 25,
        guidance_scale: float = 1.0,
        weights: Weights = 'ema',
        seed: int = 0,
    ) -> None:
        if samples_per_class < 1:
            raise UserError(f'samples_per_class: {samples_per_class} must be at least 1')
        super().__init__(interval, folder)
        self.classes, self.class_names = classes, class_names
        self.samples_per_class, self.seed = samples_per_class, seed
        self.sampling = Sampling(sampler, num_steps, guidance_scale, weights)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Refuse at once what would fail at the first picture."""
        del logger
        self.sampling.check(state, 'sample_grid')
        if self.class_names and len(self.class_names) != bare_model(state).num_classes:
            raise UserError(
                f'callbacks.sample_grid.class_names: {len(self.class_names)} names for the '
                f'{bare_model(state).num_classes} classes of the model; give one for each'
            )
        count = bare_model(state).num_classes
        absent = [label for label in self._rows(state) if not 0 <= label < max(count, 1)]
        if absent:
            raise UserError(f'callbacks.sample_grid.classes: {absent} are not classes of the model, which has {count}')

    def summary(self, state: State) -> list[tuple[str, str]]:
        """Where the latest picture is, if there is one."""
        path = self.folder_of(state) / 'latest.png'
        return [('sample grid', str(path))] if path.exists() else []

    def _rows(self, state: State) -> list[int]:
        count = bare_model(state).num_classes
        if self.classes is not None:
            return list(self.classes)
        return list(range(count if count <= _FEW_CLASSES else _SHOWN_CLASSES)) or [0]

    def act(self, state: State, logger: Logger) -> None:
        """Draw; every rank draws, the first one writes."""
        rows, columns = self._rows(state), self.samples_per_class
        labels = [label for label in rows for _ in range(columns)]
        images = self.sampling.images(state, labels, [self.seed + column for _ in rows for column in range(columns)])
        if dist.get_global_rank() != 0:
            return
        all_names = self.class_names or getattr(bare_model(state), 'class_names', ())
        names = [str(all_names[label]) if all_names else str(label) for label in rows]
        keep_grid(images, names, self.sampling, state, logger, self.folder_of(state), 'samples')


def keep_grid(
    images_NCHW: Tensor,
    row_names: Sequence[str],
    sampling: Sampling,
    state: State,
    logger: Logger,
    folder: Path,
    artifacts: str,
) -> None:
    """Write a grid as ``ba000800.png`` and ``latest.png``, and hand both to every logger that has a ``log_file``.

    Args:
        images_NCHW: As for ``draw_grid``; those that are not finite are shown grey, and the title says so.
        row_names: One name for each row.
        sampling: How they were drawn, for the title.
        state: Names the run and the batch.
        logger: Of the run.
        folder: Where the pictures go.
        artifacts: The folder of the pictures within a logger.
    """
    batch = int(state.timestamp.batch)
    title = f'{state.run_name}, batch {batch}, {sampling.weights} weights, '
    title += f'{sampling.sampler} {sampling.num_steps} steps, guidance {sampling.guidance_scale:g}'
    broken = int((~images_NCHW.isfinite()).flatten(1).any(1).sum())
    if broken:  # a picture is no reason to end a run, but it must not look healthy either
        title = f'{broken} OF {len(images_NCHW)} IMAGES ARE NOT FINITE (shown grey): ' + title
    content = io.BytesIO()
    draw_grid(images_NCHW, row_names, title).save(content, format='PNG')
    for path in (folder / f'ba{batch:06d}.png', folder / 'latest.png'):
        write_atomically(path, content.getvalue())
        log_file(logger, path, artifacts)


def draw_grid(images_NCHW: Tensor, row_names: Sequence[str], title: str) -> Image.Image:
    """Lay images out in rows with a name at the left of each and a title above.

    Args:
        images_NCHW: Row after row, 1 or 3 channels, -1 to 1; what lies beyond is cut.
        row_names: One name for each row.
        title: Broken into lines.
    """
    return picture_grid(to_tiles(images_NCHW), title, columns=len(images_NCHW) // len(row_names), row_names=row_names)
