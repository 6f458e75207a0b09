"""A picture of what the model has learnt so far: one row per class, drawn while it trains."""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Le
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist

from tread_composer.autoencoders.pixels import to_tiles
from tread_composer.callbacks.sampling import SamplingCallback, Weights, bare_model, log_file
from tread_composer.core.bounds import NonNegative, Seed, Steps
from tread_composer.core.errors import UserError
from tread_composer.core.options import check_bounds
from tread_composer.io.files import write_atomically
from tread_composer.io.picture_grid import class_grid, png_bytes, shown_classes
from tread_composer.metrics.drawing import Draws

__all__ = ['SampleGrid']

Columns = Annotated[int, Ge(1), Le(1000)]

_BATCH = 256  # images drawn together


class SampleGrid(SamplingCallback):
    """Draws a labelled grid of samples at an interval and at the end of training.

    Writes ``<folder>/ba000800.png`` and the same picture as ``latest.png``, and hands both to every logger that has a
    ``log_file``. Rows have the model's ``class_names``, else numbers; the images of a column share their noise. Given
    weights and seed the picture is always the same.

    Args beside those of ``SamplingCallback``:
        classes: The classes of the rows. (Default: all if there are at most 10, else the first 8.)
        samples_per_class: Images in a row.
        seed: Seed of the first column; the next ones count on.
    """

    default_folder: ClassVar[str] = 'samples'
    """In the folder of a run that is described by a YAML file."""

    owner: ClassVar[str] = 'sample_grid'

    def __init__(
        self,
        interval: str = '1ep',
        *,
        folder: str = 'runs/{run_name}/samples',
        classes: Sequence[int] | None = None,
        samples_per_class: Columns = 10,
        sampler: str = 'heun',
        num_steps: Steps = 25,
        guidance_scale: NonNegative = 1.0,
        weights: Weights = 'ema',
        seed: Seed = 0,
    ) -> None:
        check_bounds('samples_per_class', Columns, samples_per_class)
        super().__init__(interval, folder, sampler, num_steps, guidance_scale, weights)
        self.classes, self.samples_per_class, self.seed = classes, samples_per_class, seed

    def fit_start(self, state: State, logger: Logger) -> None:
        """Refuse at once what would fail at the first picture."""
        del logger
        self.check(state)
        count = bare_model(state).num_classes
        absent = [label for label in self._rows(state) if not 0 <= label < max(count, 1)]
        if absent:
            raise UserError(f'callbacks.sample_grid.classes: {absent} are not classes of the model, which has {count}')

    def summary(self, state: State) -> list[tuple[str, str]]:
        """Where the latest picture is, if there is one."""
        path = self.folder_of(state) / 'latest.png'
        return [('sample grid', str(path))] if path.exists() else []

    def act(self, state: State, logger: Logger) -> None:
        """Draw; every rank draws, the first one writes."""
        rows, columns = self._rows(state), self.samples_per_class
        # Row after row
        draws = Draws(tuple(label for label in rows for _ in range(columns)), self.seed, 'classes', columns)
        numbers = range(len(draws.labels))
        batches = [numbers[start : start + _BATCH] for start in range(0, len(numbers), _BATCH)]
        images_NCHW = torch.cat([images for _, _, images in self.images(state, draws, batches)])
        if dist.get_global_rank() != 0:
            return
        batch, names = int(state.timestamp.batch), getattr(bare_model(state), 'class_names', ())
        title = f'{state.run_name}, batch {batch}, {self.weights} weights, '
        title += f'{self.sampling.in_words}, guidance {self.guidance_scale:g}'
        broken = int((~images_NCHW.isfinite()).flatten(1).any(1).sum())
        if broken:  # a picture is no reason to end a run, but it must not look healthy either
            title = f'{broken} OF {len(images_NCHW)} IMAGES ARE NOT FINITE (shown grey): ' + title
        content, folder = png_bytes(class_grid(to_tiles(images_NCHW), rows, names, title)), self.folder_of(state)
        for path in (folder / f'ba{batch:06d}.png', folder / 'latest.png'):
            write_atomically(path, content)
            log_file(logger, path, 'samples')

    def _rows(self, state: State) -> list[int]:
        classes = range(bare_model(state).num_classes)
        return list(shown_classes(classes) if self.classes is None else self.classes) or [0]
