"""From images, or from a trained model, to entries of a ``results.json``.

A model is first sampled, as ``sample`` does it, on all ranks; one process measures.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tread_composer.core.errors import UserError
from tread_composer.evaluate.samples import facts_of, facts_said, folder_of, open_samples, origin_of
from tread_composer.io.device import choose_device
from tread_composer.io.progress import Progress
from tread_composer.io.ranks import Ranks
from tread_composer.metrics.features import FeatureSet
from tread_composer.metrics.images import ImageSet
from tread_composer.metrics.measurer import Measurement, Measurer
from tread_composer.sample.folder import RECORD
from tread_composer.sample.generate import generate
from tread_composer.sample.request import SamplesRequest, draws_of
from tread_composer.weights.exported import digest_of
from tread_composer.weights.trained import image_size, model_of, read_trained

__all__ = ['evaluate_model', 'evaluate_samples', 'measure_samples']

Log = Callable[[str], None]

_NO_MATTER = ('out', 'batch_size', 'device', 'formats')  # to what the images are


def evaluate_samples(
    path: str | Path,
    measurement: Measurement,
    *,
    describe: Mapping[str, Any] | None = None,
    device: str | None = None,
    log: Log = print,
) -> list[dict[str, Any]]:
    """Measure images that are there; returns entries for a ``results.json``. Writes nothing but the cache.

    Args:
        path: A folder that ``sample`` wrote, or any images (``metrics.images.open_images``).
        measurement: What and how.
        describe: How images were made that do not say it themselves: parts of a ``Protocol``.
        device: ``'cuda'``, ``'cpu'`` or None for a GPU if there is one.
        log: Gets the lines for people.

    Raises:
        UserError: The images, the reference and the network do not go together.
    """
    _, record = open_samples(Path(path))  # refused before the network is loaded
    if record is not None and describe:
        raise UserError(f'--describe: {path} says itself how it was made ({RECORD}); leave it out')
    return measure_samples(path, Measurer(measurement, choose_device(device, 0), log=log), describe)


def evaluate_model(
    request: SamplesRequest, measurement: Measurement, *, samples: str | Path | None = None, log: Log = print
) -> tuple[list[dict[str, Any]], Path]:
    """Draw the samples of a model, and measure them. Under the ``composer`` launcher all ranks call this.

    Args:
        request: The model and how to sample it; its ``out`` and ``formats`` are decided here.
        measurement: What to measure.
        samples: Folder of the samples; the same call goes on with what is in it. (Default: within the run's folder,
            named by the checkpoint and the settings.)
        log: Gets the lines for people, on the first rank.

    Returns:
        Entries for a ``results.json``, none on other ranks than the first; and the folder of the samples.

    Raises:
        UserError: As for ``sample`` and ``evaluate_samples``; what can be known before sampling is refused before.
    """
    ranks = Ranks.start()
    measurer, place = ranks.agreed(
        lambda: _before_sampling(request, measurement, log) if ranks.is_first else (None, '')
    )
    # Npz: all images in one file, with their labels
    request = dataclasses.replace(request, out=Path(samples or ranks.from_first(place)), formats=('npz',))
    generate(request, log=log)
    entries = [] if measurer is None else measure_samples(request.out, measurer)
    return [{**entry, 'source': request.path} for entry in entries], request.out


def measure_samples(
    path: str | Path, measurer: Measurer, describe: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Look at images on the first rank; all ranks call this. Arguments and refusals as for ``evaluate_samples``."""
    ranks, log = measurer.ranks, measurer.log

    def opened() -> tuple[ImageSet, list[int] | None, dict[str, Any], dict[str, Any]]:
        images, record = open_samples(Path(path))
        facts = facts_said(describe or {}, log) if record is None else facts_of(record)
        labels = images.labels() if measurer.needs_labels and facts['labels'] != 'none' else None  # else not even read
        measurer.check(images.count, images.resolution, has_labels=labels is not None)
        return images, labels, facts, origin_of(record)

    samples = ranks.agreed(lambda: opened() if ranks.is_first else None)
    measurer.prepare()

    def looked_at() -> list[FeatureSet]:
        if samples is None:
            return []
        images, labels, _, _ = samples
        log(f'{images.path}: looking at {images.count:,} images')
        progress = Progress(str(images.path), images.count, 'images', log=log)
        return measurer.look(images.batches(measurer.measurement.batch_size), labels, progress)

    figures = measurer.figures(ranks.agreed(looked_at))
    if samples is None:
        return []
    images, _, facts, origin = samples
    return measurer.entries(figures, facts, images.count, images.resolution, source=str(path), **origin)


def _before_sampling(request: SamplesRequest, measurement: Measurement, log: Log) -> tuple[Measurer, str]:
    """Refuse what the samples could not be measured with; what measures them, and where they go by default."""
    if request.count is None and request.per_class is None and request.labels_file is None:
        raise UserError('--count: say how many images to draw and measure; published numbers are of 50000')
    model = read_trained(request.path, weights=request.weights, overrides=request.overrides)
    classes = model.data.num_classes
    measurer = Measurer(measurement, choose_device(request.device, 0), log=log)
    resolution = model.data.resolution or image_size(model_of(model, request.path))
    measurer.check(len(draws_of(request, classes).labels), resolution, has_labels=classes > 0)
    measurer.prepare()
    drawn = {name: value for name, value in dataclasses.asdict(request).items() if name not in _NO_MATTER}
    drawn['path'] = digest_of(model.tensors)  # the weights themselves: a run folder holds later ones tomorrow
    if request.weak is not None:
        drawn['weak'] = digest_of(read_trained(request.weak, weights=request.weak_weights).tensors)
    drawn['weights'] = model.weights  # in its one spelling
    key = hashlib.sha256(json.dumps(drawn, default=str, sort_keys=True).encode()).hexdigest()[:8]
    name = f'{model.weights.replace(":", "-")}-ba{model.batch}-{key}'
    return measurer, str(folder_of(request.path) / 'evaluation_samples' / name)
