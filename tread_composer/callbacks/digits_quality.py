"""How good the generated digits are, measured at the end of the quickstart and written with the protocol."""

import json
from pathlib import Path
from typing import Any, ClassVar

from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist
from torch import Tensor

from tread_composer.callbacks.sampling import Sampling, Weights, bare_model
from tread_composer.core.errors import UserError
from tread_composer.io.files import write_atomically
from tread_composer.metrics.digits import QUANTITIES, digits_judge, real_digits
from tread_composer.metrics.frechet import frechet_distance
from tread_composer.metrics.protocol import Protocol

__all__ = ['FIGURES', 'DigitsQuality']

FIGURES = tuple(quantity.name.removeprefix('digits/') for quantity in QUANTITIES)
_CLASSES = 10
# What the judge leaves no choice in.
_JUDGED = {
    'uint8_rule': 'none, the judge sees floats',
    'reference': {'name': 'digits', 'kind': 'training split'},
    'reference_hash': 'scikit-learn digits',
    'features': {'name': 'hidden layer of the digits judge'},
    'resolution': 8,
}


class DigitsQuality(Callback):
    """Measures samples of the ten digits with a classifier that was trained on real ones.

    Logs ``digits/recognised`` (share of the images that are recognised as the digit asked for) and
    ``digits/frechet_distance`` (to the real training images, in the classifier's features; not an FID), and writes
    ``<folder>/digits_quality.json``: the latest figures, what real images reach under the same judge, the protocol, and
    all figures that were measured by it. The images are those that the command ``sample`` draws with the same settings.
    Runs on ``Event.FIT_END``, and at the interval on ``Event.BATCH_CHECKPOINT`` or ``Event.EPOCH_CHECKPOINT``.

    Args:
        interval: A Composer time string. (Default: only at the end.)
        folder: Where ``digits_quality.json`` goes. ``{run_name}`` is filled in. (Default: ``runs/{run_name}``.)
        num_samples: Images, as many of each digit as of the others.
        sampler: Name of a sampler.
        num_steps: Its steps.
        guidance_scale: Classifier-free guidance; 1 is none.
        weights: ``'ema'`` for the averaged weights, ``'raw'`` for those in training.
        seed: Image i has the seed ``seed + i``, as with the command ``sample``.

    Raises:
        UserError: ``num_samples`` is no multiple of 10, or at ``Event.FIT_START`` the model has not ten classes or
            there are no averaged weights.
    """

    default_folder: ClassVar[str] = '.'
    """In the folder of a run that is described by a YAML file."""

    def __init__(
        self,
        interval: str | None = None,
        *,
        folder: str = 'runs/{run_name}',
        num_samples: int = 500,
        sampler: str = 'heun',
        num_steps: int = 25,
        guidance_scale: float = 1.0,
        weights: Weights = 'ema',
        seed: int = 0,
    ) -> None:
        if num_samples < _CLASSES or num_samples % _CLASSES:
            raise UserError(f'num_samples: {num_samples} must be a multiple of 10, so that all digits count alike')
        self.folder, self.num_samples, self.seed = folder, num_samples, seed
        self.sampling = Sampling(sampler, num_steps, guidance_scale, weights)
        self._is_due = create_interval_scheduler(interval or '0ba', include_end_of_training=False)
        self._last_batch = -1

    def fit_start(self, state: State, logger: Logger) -> None:
        """Refuse at once what would fail at the end."""
        del logger
        self.sampling.check(state, 'digits_quality')
        num_classes = bare_model(state).num_classes
        if num_classes != _CLASSES:
            raise UserError(f'callbacks.digits_quality: is for the ten digits, but the model has {num_classes} classes')

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        """Measure when the interval says so, and at the end unless that batch was measured already."""
        super().run_event(event, state, logger)
        at_end = event == Event.FIT_END and self._last_batch != int(state.timestamp.batch)
        if at_end or (event in (Event.BATCH_CHECKPOINT, Event.EPOCH_CHECKPOINT) and self._is_due(state, event)):
            self._last_batch = int(state.timestamp.batch)
            self._measure(state, logger)

    def summary(self, state: State) -> list[tuple[str, str]]:
        """The figures of the latest measurement, if there is one, and what real images reach."""
        if not self._path(state).exists():
            return []
        results = json.loads(self._path(state).read_text())
        real, protocol = results['real_held_out'], results['protocol']
        count, sampling = protocol['num_samples'], protocol['sampling']
        drawn = f'{protocol["weights"]} weights, {sampling["sampler"]} {sampling["num_steps"]} steps'
        drawn += f', guidance {sampling["guidance_scale"]:g}, dense'
        return [
            (
                'recognised',
                f'{round(results["recognised"] * count)} of {count} samples ({results["recognised"]:.1%}) as the digit '
                f'asked for; real held-out digits: {real["recognised"]:.1%}',
            ),
            (
                'Fréchet distance',
                f'{results["frechet_distance"]:.2f} in the features of that classifier (not an FID); real held-out '
                f'digits: {real["frechet_distance"]:.2f}',
            ),
            ('samples', f'{drawn}, at batch {results["batch"]}'),
        ]

    def _path(self, state: State) -> Path:
        return Path(self.folder.format(run_name=state.run_name)) / 'digits_quality.json'

    def _measure(self, state: State, logger: Logger) -> None:
        labels = [index % _CLASSES for index in range(self.num_samples)]
        seeds = [self.seed + index for index in range(self.num_samples)]
        images = self.sampling.images(state, labels, seeds)
        if dist.get_global_rank() != 0:
            return
        results = measure(images, labels)
        figures = {name: results[name] for name in FIGURES}
        logger.log_metrics({f'digits/{name}': value for name, value in figures.items()})
        facts = {**self.sampling.facts(state, labels='balanced', seed=self.seed), **_JUDGED}
        protocol = Protocol(**facts, num_samples=self.num_samples).to_dict()
        path, batch = self._path(state), int(state.timestamp.batch)
        identity = {'run_name': state.run_name, 'protocol': protocol}
        points = [*_earlier(path, identity, batch), {'batch': batch, **figures}]
        written = {**identity, 'batch': batch, **results, 'points': points}
        write_atomically(path, json.dumps(written, indent=2).encode())
        for destination in logger.destinations:
            if hasattr(destination, 'log_file'):
                destination.log_file(path)  # type: ignore[attr-defined]


def _earlier(path: Path, identity: dict[str, Any], batch: int) -> list[dict[str, Any]]:
    """What this run has measured by this protocol before; another protocol begins anew."""
    content = json.loads(path.read_text()) if path.exists() else {'points': []}
    is_same = all(content.get(name) == value for name, value in identity.items())
    return [point for point in content['points'] if point['batch'] < batch] if is_same else []


def measure(images: Tensor, labels: list[int]) -> dict[str, Any]:
    """The figures of generated digits, and those of real held-out ones as the mark to reach."""
    judge, real = digits_judge(), real_digits()
    (train_images, _), (eval_images, eval_labels) = real['train'], real['eval']
    train_features = judge.features(train_images)
    return {
        'recognised': judge.recognised(images, eval_labels.new_tensor(labels)),
        'frechet_distance': frechet_distance(judge.features(images), train_features),
        'real_held_out': {
            'num_samples': len(eval_labels),
            'recognised': judge.recognised(eval_images, eval_labels),
            'frechet_distance': frechet_distance(judge.features(eval_images), train_features),
        },
    }
