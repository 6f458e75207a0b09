"""A picture of what the model has learnt so far: one row per class, drawn while it trains."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tread_composer.autoencoders.pixels import to_uint8
from tread_composer.callbacks.sampling import Sampling, Weights, bare_model
from tread_composer.core.errors import UserError
from tread_composer.io.files import write_atomically

__all__ = ['SampleGrid', 'draw_grid', 'keep_grid', 'shown_in_grid']

_FEW_CLASSES, _SHOWN_CLASSES, _COLUMNS = 10, 8, 10
_TILE = 64  # pixels that a tile has at least, so that a small image can be seen
_GAP = 4


class SampleGrid(Callback):
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
        self.folder, self.classes, self.class_names = folder, classes, class_names
        self.samples_per_class, self.seed = samples_per_class, seed
        self.sampling = Sampling(sampler, num_steps, guidance_scale, weights)
        self._is_due = create_interval_scheduler(interval, include_end_of_training=False)
        self._last_batch = -1

    def fit_start(self, state: State, logger: Logger) -> None:
        """Refuse at once what would fail at the first picture."""
        del logger
        self.sampling.check(state, 'sample_grid')
        if self.class_names and len(self.class_names) != bare_model(state).num_classes:
            raise UserError(
                f'callbacks.sample_grid.class_names: {len(self.class_names)} names for the '
                f'{bare_model(state).num_classes} classes of the model; give one for each'
            )
        known = bare_model(state).num_classes
        unknown = [label for label in self._rows(state) if not 0 <= label < max(known, 1)]
        if unknown:
            raise UserError(f'callbacks.sample_grid.classes: {unknown} are not classes of the model, which has {known}')

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        """Draw when the interval says so, and at the end unless that batch has its picture already."""
        super().run_event(event, state, logger)
        at_end = event == Event.FIT_END and self._last_batch != int(state.timestamp.batch)
        if at_end or (event in (Event.BATCH_CHECKPOINT, Event.EPOCH_CHECKPOINT) and self._is_due(state, event)):
            self._last_batch = int(state.timestamp.batch)
            self._draw(state, logger)

    def summary(self, state: State) -> list[tuple[str, str]]:
        """Where the latest picture is, if there is one."""
        path = self._folder(state) / 'latest.png'
        return [('sample grid', str(path))] if path.exists() else []

    def _folder(self, state: State) -> Path:
        return Path(self.folder.format(run_name=state.run_name))

    def _rows(self, state: State) -> list[int]:
        known = bare_model(state).num_classes
        if self.classes is not None:
            return list(self.classes)
        return list(range(known if known <= _FEW_CLASSES else _SHOWN_CLASSES)) or [0]

    def _draw(self, state: State, logger: Logger) -> None:
        rows, columns = self._rows(state), self.samples_per_class
        labels = [label for label in rows for _ in range(columns)]
        images = self.sampling.images(state, labels, [self.seed + column for _ in rows for column in range(columns)])
        if dist.get_global_rank() != 0:
            return
        all_names = self.class_names or getattr(bare_model(state), 'class_names', ())
        names = [str(all_names[label]) if all_names else str(label) for label in rows]
        keep_grid(images, names, self.sampling, state, logger, self._folder(state), 'samples')


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
    draw_grid(images_NCHW.nan_to_num(0.0, 0.0, 0.0), row_names, title).save(content, format='PNG')
    for path in (folder / f'ba{batch:06d}.png', folder / 'latest.png'):
        write_atomically(path, content.getvalue())
        for destination in logger.destinations:
            if hasattr(destination, 'log_file'):
                destination.log_file(path, artifacts)  # type: ignore[attr-defined]


def shown_in_grid(labels: Sequence[int]) -> tuple[list[int], list[int | None]]:
    """Which of many images a grid shows: a row for each class (all if there are at most 10, else 8), 10 at most in it.

    Args:
        labels: Of all images. One class alone fills several rows.

    Returns:
        Positions of the images, row after row; and the label of each row, None where the row above has said it.
    """
    of_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        of_class.setdefault(label, []).append(index)
    classes = sorted(of_class)
    if len(classes) == 1:
        own = of_class[classes[0]]
        columns = min(_COLUMNS, len(own))
        rows = min(_SHOWN_CLASSES, len(own) // columns)
        return own[: rows * columns], [classes[0], *[None] * (rows - 1)]
    classes = classes if len(classes) <= _FEW_CLASSES else classes[:_SHOWN_CLASSES]
    columns = min([_COLUMNS, *(len(of_class[label]) for label in classes)])
    return [index for label in classes for index in of_class[label][:columns]], list(classes)


def draw_grid(images_NCHW: Tensor, row_names: Sequence[str], title: str) -> Image.Image:
    """Lay images out in rows with a name at the left of each and a title above; small ones are enlarged.

    Args:
        images_NCHW: Row after row, 1 or 3 channels, -1 to 1; what lies beyond is cut.
        row_names: One name for each row.
        title: Made smaller until it fits into a line, as far as it can be read; then broken into several.
    """
    count, channels, height, width = images_NCHW.shape
    if channels not in (1, 3) or count % len(row_names):
        raise ValueError(f'{count} images of {channels} channels do not fill {len(row_names)} rows of grey or colour')
    columns, scale = count // len(row_names), max(1, math.ceil(_TILE / width))
    tiles = to_uint8(images_NCHW).permute(0, 2, 3, 1).numpy()
    if channels == 1:
        tiles = np.repeat(tiles, 3, axis=3)
    step_x, step_y = width * scale + _GAP, height * scale + _GAP
    font = ImageFont.load_default(16)
    left = _GAP * 3 + max(math.ceil(font.getlength(name)) for name in row_names)
    right = left + columns * step_x
    size = next((size for size in range(16, 11, -1) if ImageFont.load_default(size).getlength(title) < right - 8), 11)
    title_font = ImageFont.load_default(size)
    lines = _lines(title, title_font, right - 8)
    top = 10 + 18 * len(lines)
    picture = Image.new('RGB', (right, top + len(row_names) * step_y), 'white')
    pen = ImageDraw.Draw(picture)
    for number, line in enumerate(lines):
        pen.text((_GAP, 14 + 18 * number), line, fill='black', font=title_font, anchor='lm')
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        # Smooth: the eye reads strokes of a few pixels where it would see blocks.
        image = Image.fromarray(tile).resize((width * scale, height * scale), Image.Resampling.BICUBIC)
        picture.paste(image, (left + column * step_x, top + row * step_y))
    for row, name in enumerate(row_names):
        middle = top + row * step_y + (step_y - _GAP) // 2
        pen.text((left - 2 * _GAP, middle), name, fill='black', font=font, anchor='rm')
    return picture


def _lines(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines = ['']
    for word in text.split():
        longer = f'{lines[-1]} {word}'.strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
