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
from tread_composer.evaluate.samples import facts_of, facts_said, folder_of, open_samples, run_name
from tread_composer.io.device import choose_device
from tread_composer.io.ranks import Ranks
from tread_composer.metrics.measurer import Measurement, Measurer
from tread_composer.sample.folder import RECORD
from tread_composer.sample.generate import generate
from tread_composer.sample.request import SamplesRequest
from tread_composer.weights.exported import digest_of
from tread_composer.weights.trained import image_size, model_of, read_trained

__all__ = ['evaluate_model', 'evaluate_samples']

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
    """Measure images that are there. Writes nothing but the cache.

    Args:
        path: A folder that ``sample`` wrote, or any images (``metrics.images.open_images``).
        measurement: What and how.
        describe: How images were made that do not say it themselves: parts of a ``Protocol``.
        device: ``'cuda'``, ``'cpu'`` or None for a GPU if there is one.
        log: Gets the lines for people.

    Returns:
        Entries for a ``results.json``.

    Raises:
        UserError: The images, the reference and the network do not go together.
    """
    images, record = open_samples(Path(path))
    if record is None:
        facts = facts_said(describe or {}, log)
    elif describe:
        raise UserError(f'--describe: {path} says itself how it was made ({RECORD}); leave it out')
    else:
        facts = facts_of(record)
    measurer = Measurer(measurement, choose_device(device, 0), log=log)
    measurer.check(images.count, images.resolution)
    measurer.prepare()
    log(f'{images.path}: looking at {images.count:,} images')
    figures = measurer.figures(measurer.look(images.batches(measurement.batch_size)))
    origin: dict[str, Any] = {'source': str(path), 'run': None, 'batch': None, 'weights_digest': None}
    if record is not None:
        origin['run'] = record.get('run') or run_name(record['source'])
        origin['batch'] = record['batch'] or None  # 0: imported, and nobody has said it
        origin['weights_digest'] = record['made_with']['weights_digest']
    return measurer.entries(figures, facts, num_samples=images.count, resolution=images.resolution, **origin)


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
    place = ranks.from_first(
        ranks.agreed(lambda: _before_sampling(request, measurement, samples, log) if ranks.is_first else None)
    )
    request = dataclasses.replace(request, out=Path(place), formats=('npz',))
    generate(request, log=log)
    if not ranks.is_first:
        return [], request.out
    entries = evaluate_samples(place, measurement, device=request.device, log=log)
    return [{**entry, 'source': request.path} for entry in entries], request.out


def _before_sampling(request: SamplesRequest, measurement: Measurement, samples: str | Path | None, log: Log) -> str:
    """Refuse what the samples could not be measured with; where they go."""
    if request.count is None and request.per_class is None and request.labels_file is None:
        raise UserError('--count: say how many images to draw and measure; published numbers are of 50000')
    model = read_trained(request.path, weights=request.weights, overrides=request.overrides)
    count = request.count or (request.per_class or 0) * len(request.classes or range(model.data.num_classes))
    if request.labels_file is not None:
        count = len(Path(request.labels_file).read_text(encoding='utf-8').split())
    measurer = Measurer(measurement, choose_device(request.device, 0), log=log)
    measurer.check(count, model.data.resolution or image_size(model_of(model, request.path)))
    measurer.prepare()
    if samples is not None:
        return str(samples)
    drawn = {name: value for name, value in dataclasses.asdict(request).items() if name not in _NO_MATTER}
    drawn['path'] = digest_of(model.tensors)
    if request.weak is not None:
        drawn['weak'] = digest_of(read_trained(request.weak, weights=request.weak_weights).tensors)
    drawn['weights'] = model.weights  # in its one spelling
    key = hashlib.sha256(json.dumps(drawn, default=str, sort_keys=True).encode()).hexdigest()[:8]
    return str(
        folder_of(request.path) / 'evaluation_samples' / f'{model.weights.replace(":", "-")}-ba{model.batch}-{key}'
    )
