"""From images, or from a trained model, to entries of a ``results.json``.

A model is first sampled, as ``sample`` does it, on all ranks; one process measures.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tread_composer.core.errors import UserError
from tread_composer.evaluate.samples import facts_of, facts_said, folder_of, open_samples, run_name
from tread_composer.io.device import choose_device
from tread_composer.io.ranks import Ranks
from tread_composer.metrics.features import Extractor, FeatureSet, extract, open_extractor
from tread_composer.metrics.metric import Comparison, Metric, build_metrics, check_metrics, measure
from tread_composer.metrics.protocol import Protocol, result
from tread_composer.metrics.references import Reference, default_cache, open_reference
from tread_composer.sample.folder import RECORD
from tread_composer.sample.generate import generate
from tread_composer.sample.request import SamplesRequest
from tread_composer.weights.exported import digest_of
from tread_composer.weights.trained import image_size, model_of, read_trained

__all__ = ['Measurement', 'evaluate_model', 'evaluate_samples']

Log = Callable[[str], None]

_NO_MATTER = ('out', 'batch_size', 'device', 'formats')  # to what the images are


@dataclass(frozen=True)
class Measurement:
    """What is measured, with which network, against what.

    Args:
        reference: A folder of images, an npz of ADM's suite, or MDS images.
        metrics: Of ``fid``, ``kid``, ``is``, ``prc``.
        features: ``'inception'`` or ``'digits'``.
        inception: File of Inception's weights, if not where ``find_weights`` looks.
        inception_sha256: Its hash, if it is not the published file.
        allow_download: Fetch the weights if they are not here.
        kid_subset_size: Images in each random subset of KID.
        batch_size: Images in one call of the network.
        device: ``'cuda'``, ``'cpu'`` or None for a GPU if there is one.
        cache: Where the reference's features are kept.
    """

    reference: str
    metrics: tuple[str, ...] = ('fid',)
    features: str = 'inception'
    inception: str | None = None
    inception_sha256: str | None = None
    allow_download: bool = False
    kid_subset_size: int = 1000
    batch_size: int = 64
    device: str | None = None
    cache: Path = field(default_factory=default_cache)


def evaluate_samples(
    path: str | Path, measurement: Measurement, *, describe: Mapping[str, Any] | None = None, log: Log = print
) -> list[dict[str, Any]]:
    """Measure images that are there. Writes nothing but the cache.

    Args:
        path: A folder that ``sample`` wrote, or any images (``metrics.images.open_images``).
        measurement: What and how.
        describe: How images were made that do not say it themselves: parts of a ``Protocol``.
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
    device = choose_device(measurement.device, 0)
    metrics, extractor, reference = _tools(measurement, device, images.count)
    reference.check(extractor, images.resolution)
    found = _looked_at(metrics, reference, extractor, measurement, log)
    log(f'{images.path}: looking at {images.count:,} images')
    figures = measure(
        metrics,
        extract(images.batches(measurement.batch_size), extractor),
        _comparison(metrics, reference, found),
        device,
    )
    protocol = Protocol(
        **facts,
        num_samples=images.count,
        reference=reference.described(),
        reference_hash=reference.hash,
        features=extractor.identity(),
        resolution=images.resolution,
    )
    where: dict[str, Any] = {'source': str(path), 'run': None, 'batch': None, 'weights_digest': None}
    if record is not None:
        where['run'] = record.get('run') or run_name(record['source'])
        where['batch'] = record['batch'] or None  # 0: imported, and nobody has said it
        where['weights_digest'] = record['made_with']['weights_digest']
    return [
        result(
            figure.quantity.reported(extractor.name, images.count),
            figure.value,
            dataclasses.replace(protocol, settings=figure.settings),
            spread=figure.spread,
            **where,
        )
        for figure in figures
    ]


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
    entries = evaluate_samples(place, measurement, log=log)
    return [{**entry, 'source': request.path} for entry in entries], request.out


def _before_sampling(request: SamplesRequest, measurement: Measurement, samples: str | Path | None, log: Log) -> str:
    """Refuse what the samples could not be measured with; where they go."""
    if request.count is None and request.per_class is None and request.labels_file is None:
        raise UserError('--count: say how many images to draw and measure; published numbers are of 50000')
    model = read_trained(request.path, weights=request.weights, overrides=request.overrides)
    count = request.count or (request.per_class or 0) * len(request.classes or range(model.data.num_classes))
    if request.labels_file is not None:
        count = len(Path(request.labels_file).read_text(encoding='utf-8').split())
    metrics, extractor, reference = _tools(measurement, choose_device(measurement.device, 0), count)
    reference.check(extractor, model.data.resolution or image_size(model_of(model, request.path)))
    _looked_at(metrics, reference, extractor, measurement, log)
    if samples is not None:
        return str(samples)
    drawn = {name: value for name, value in dataclasses.asdict(request).items() if name not in _NO_MATTER}
    drawn['path'] = digest_of(model.tensors)
    if request.weak is not None:
        drawn['weak'] = digest_of(read_trained(request.weak, weights=request.weak_weights).tensors)
    key = hashlib.sha256(json.dumps(drawn, default=str, sort_keys=True).encode()).hexdigest()[:8]
    return str(folder_of(request.path) / 'evaluation_samples' / f'{request.weights}-ba{model.batch}-{key}')


def _comparison(metrics: Sequence[Metric], reference: Reference, found: FeatureSet | None) -> Comparison:
    needed = any(metric.compares_with == 'statistics' for metric in metrics)
    return Comparison(reference.statistics(found) if needed else None, found)


def _looked_at(
    metrics: Sequence[Metric], reference: Reference, extractor: Extractor, measurement: Measurement, log: Log
) -> FeatureSet | None:
    """Features of the reference's images, if they are needed; looks at all of them, unless an earlier call did."""
    if not any(reference.must_be_looked_at(metric.compares_with) for metric in metrics):
        return None
    if not reference.is_cached(extractor, measurement.cache):
        log(f'{reference.path}: looking at {reference.count:,} reference images, once')
    return reference.features(extractor, measurement.cache, batch_size=measurement.batch_size)


def _tools(
    measurement: Measurement, device: torch.device, num_samples: int
) -> tuple[list[Metric], Extractor, Reference]:
    metrics = build_metrics(measurement.metrics, {'kid_subset_size': measurement.kid_subset_size})
    extractor = open_extractor(
        measurement.features,
        inception=measurement.inception,
        inception_sha256=measurement.inception_sha256,
        allow_download=measurement.allow_download,
        device=device,
    )
    reference = open_reference(measurement.reference)
    check_metrics(
        metrics,
        num_logits=extractor.num_logits,
        num_samples=num_samples,
        num_reference=reference.count,
    )
    return metrics, extractor, reference
