"""How good the generated digits are: the callback ``evaluation`` as the quickstart uses it."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from composer.core import State
from composer.loggers import Logger

from tread_composer.callbacks.evaluation import Evaluation
from tread_composer.callbacks.sampling import Weights, bare_model
from tread_composer.core.bounds import ImageCount, NonNegative, Seed, Steps
from tread_composer.core.errors import UserError
from tread_composer.metrics.digits import DigitsImages
from tread_composer.metrics.features import looked
from tread_composer.metrics.measurer import Measurer
from tread_composer.samplers import SamplingSettings

__all__ = ['DigitsQuality']

_CLASSES = 10
_SERIES = {'recognised': 'digits/recognised', 'fd': 'digits/frechet_distance'}
_BATCH = 256  # images drawn together


class DigitsQuality(Evaluation):
    """Measures samples of the ten digits with a classifier that was trained on real ones.

    It is the callback ``evaluation`` with the metrics ``recognised`` (share of the images that are recognised as the
    digit asked for) and ``fid`` in the classifier's features (not an FID) against the real training images. It logs
    ``digits/recognised`` and ``digits/frechet_distance``; in ``<folder>/results.json`` they are called
    ``recognised_digits_500`` and ``fd_digits_500``.

    Args beside those of ``Evaluation``:
        num_samples: Images, as many of each digit as of the others.
    """

    owner: ClassVar[str] = 'digits_quality'

    def __init__(
        self,
        interval: str | None = None,
        *,
        folder: str = 'runs/{run_name}',
        num_samples: ImageCount = 500,
        sampler: str = 'heun',
        num_steps: Steps = 25,
        guidance_scale: NonNegative = 1.0,
        weights: Weights = 'ema',
        seed: Seed = 0,
    ) -> None:
        if num_samples < _CLASSES or num_samples % _CLASSES:
            raise UserError(f'num_samples: {num_samples} must be a multiple of 10, so that all digits count alike')
        measured = {'reference': 'digits', 'metrics': ('recognised', 'fid'), 'features': 'digits'}
        drawn = {'sampler': sampler, 'num_steps': num_steps, 'guidance_scale': guidance_scale, 'weights': weights}
        images = {'num_samples': num_samples, 'seed': seed, 'batch_size': _BATCH}
        super().__init__(interval=interval, folder=folder, **measured, **drawn, **images)  # type: ignore[arg-type]

    def problems(self, config: Any) -> Iterator[tuple[str, str]]:
        """As of ``SamplingCallback``, and that the data are not the digits."""
        yield from super().problems(config)
        name = config.data.name
        if name != 'digits':
            yield '', f'measures the ten digits, and the data are {name!r}; remove it (callbacks.digits_quality=null)'

    def fit_start(self, state: State, logger: Logger) -> None:
        """Refuse at once what would fail at the first measurement, and look at the real digits."""
        super().fit_start(state, logger)
        num_classes = bare_model(state).num_classes
        if num_classes != _CLASSES:
            raise UserError(f'callbacks.digits_quality: is for the ten digits, but the model has {num_classes} classes')

    def series(self, entry: Mapping[str, Any]) -> str:
        """The name of a number in the loggers."""
        # The keys that these numbers have always had
        return _SERIES.get(entry['metric'].partition('_')[0], super().series(entry))

    def summary(self, state: State) -> list[tuple[str, str]]:
        """The figures of the latest measurement, if there is one, and what real held-out images reach."""
        entries = {self.series(entry): entry for entry in self._latest(state)}
        if not entries:
            return []
        recognised, distance = (entries[name] for name in _SERIES.values())
        real = self._held_out()
        protocol, share = recognised['protocol'], recognised['value']
        count, sampling = protocol['num_samples'], protocol['sampling']
        drawn = f'{protocol["weights"]} weights, {SamplingSettings.from_dict(sampling).in_words}'
        drawn += f', guidance {sampling["guidance_scale"]:g}, dense'
        return [
            (
                'recognised',
                f'{round(share * count)} of {count} samples ({share:.1%}) as the digit asked for; real held-out '
                f'digits: {real["recognised"]:.1%}',
            ),
            (
                'Fréchet distance',
                f'{distance["value"]:.2f} in the features of that classifier (not an FID); real held-out digits: '
                f'{real["fid"]:.2f}',
            ),
            ('samples', f'{drawn}, at batch {recognised["batch"]}'),
        ]

    def _held_out(self) -> dict[str, float]:
        measurer = Measurer(self.measurement, torch.device('cpu'))
        real = DigitsImages('eval')
        figures = measurer.figures(looked(real.batches(_BATCH), measurer.extractor, real.labels()))
        return {figure.quantity.name: figure.value for figure in figures}
