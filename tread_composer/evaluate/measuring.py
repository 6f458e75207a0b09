"""From images, or from a trained model, to entries of a ``results.json``.

A model is first sampled, as ``sample`` does it, on all ranks; one process measures. Samples that ``sample`` wrote say
themselves how they were made (``samples.json``); numbers of others compare with none.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tread_composer.compare.runs import store_of
from tread_composer.config import restore_config
from tread_composer.core.errors import UserError
from tread_composer.io.device import choose_device
from tread_composer.io.files import read_json
from tread_composer.io.progress import Progress
from tread_composer.io.ranks import Ranks
from tread_composer.metrics.features import FeatureSet, looked
from tread_composer.metrics.images import ImageSet, open_images
from tread_composer.metrics.measurer import Measurement, Measurer
from tread_composer.metrics.protocol import UNKNOWN, append_results, series_name
from tread_composer.sample.folder import PLACES, RECORD
from tread_composer.sample.generate import generate
from tread_composer.sample.request import SamplesRequest, draws_of
from tread_composer.weights.exported import digest_of, exported_run
from tread_composer.weights.trained import image_size, model_of, read_trained, weights_name

__all__ = ['Log', 'evaluate_model', 'folder_of', 'is_model', 'measure_samples', 'open_samples', 'run_name']

Entries = Sequence[Mapping[str, Any]]

Log = Callable[[str], None]

_NO_MATTER = ('out', 'batch_size', 'device', 'formats', 'engine', 'ray_workers')  # to what the images are
# The part of a protocol that says how images came about.
_DRAWN = (
    'weights', 'labels', 'seed', 'sampling', 'time_grid', 'weak', 'autoencoder', 'autoencoder_hash', 'decode_dtype',
    'uint8_rule',
)  # fmt: skip


def evaluate_model(
    request: SamplesRequest, measurement: Measurement, *, samples: str | Path | None = None, log: Log = print
) -> list[dict[str, Any]]:
    """Draw the samples of a model, and measure them. Under the ``composer`` launcher all ranks call this.

    Args:
        request: The model and how to sample it; its ``out`` and ``formats`` are decided here.
        samples: Folder of the samples; the same call goes on with what is in it. (Default: within the run's folder,
            named by the checkpoint and the settings.)

    Returns:
        Entries for a ``results.json``, none on other ranks than the first.

    Raises:
        UserError: As for ``sample`` and ``measure_samples``; what can be known before sampling is refused before.
    """
    ranks = Ranks.start()
    measurer, place = ranks.agreed(
        lambda: _before_sampling(request, measurement, log) if ranks.is_first else (None, '')
    )
    # Npz: all images in one file, with their labels
    request = dataclasses.replace(request, out=Path(samples or ranks.from_first(place)), formats=('npz',))
    generate(request, log=log)
    entries = [] if measurer is None else measure_samples(request.out, measurer)
    return [{**entry, 'source': request.path} for entry in entries]


def measure_samples(path: str | Path, measurer: Measurer) -> list[dict[str, Any]]:
    """Look at images on the first rank: a folder that ``sample`` wrote, or any images; all ranks call this.

    Returns:
        Entries for a ``results.json``, on the first rank.

    Raises:
        UserError: The images, the reference and the network do not go together.
    """
    ranks, log = measurer.ranks, measurer.log

    def opened() -> tuple[ImageSet, list[int] | None, dict[str, Any], dict[str, Any]]:
        images, record = open_samples(Path(path))
        facts = _facts(record, log)
        labels = images.labels() if measurer.needs_labels and facts['labels'] != 'none' else None  # else not even read
        measurer.check(images.count, images.resolution, has_labels=labels is not None)
        return images, labels, facts, _origin(record)

    samples = ranks.agreed(lambda: opened() if ranks.is_first else None)
    measurer.prepare()

    def looked_at() -> list[FeatureSet]:
        if samples is None:
            return []
        images, labels, _, _ = samples
        log(f'{images.path}: looking at {images.count:,} images')
        progress = Progress(str(images.path), images.count, 'images', log=log)
        return looked(images.batches(measurer.measurement.batch_size), measurer.extractor, labels, progress)

    figures = measurer.figures(ranks.agreed(looked_at))
    if samples is None:
        return []
    images, _, facts, origin = samples
    return measurer.entries(figures, facts, images.count, images.resolution, source=str(path), **origin)


def is_model(path: str | Path) -> bool:
    """Whether a path is a trained model (run folder, checkpoint, exported file), and not images."""
    path = Path(path)
    return path.suffix in ('.pt', '.safetensors') or (path / 'config.yaml').is_file()


def folder_of(source: str | Path) -> Path:
    """The folder of a run, a checkpoint or samples."""
    path = Path(source)
    return path if path.is_dir() else path.parent


def run_name(source: str) -> str | None:
    """Name of the run that a checkpoint, a folder or an exported file is of; None where nothing says it.

    An exported file says so itself: the folder in which it lies may be of another run.
    """
    if Path(source).suffix == '.safetensors':
        return exported_run(source)
    config = folder_of(source) / 'config.yaml'
    return restore_config(config).run_name if config.is_file() else None


def open_samples(path: Path) -> tuple[ImageSet, dict[str, Any] | None]:
    """The images at a path, and what ``sample`` wrote of them; ``UserError`` if there are none, or other ones."""
    if path.name in ('', '..'):  # '.' and '..' do not say what the folder is called
        path = path.resolve()
    inside = path.name in PLACES.values() and not (path / RECORD).is_file()
    folder = path.parent if inside else path
    if not (folder / RECORD).is_file():
        return open_images(path), None
    record = read_json(folder / RECORD)
    if not isinstance(record, dict) or 'made_with' not in record:
        raise UserError(f'{folder / RECORD}: not written by sample')
    if not record.get('complete'):
        raise UserError(f'{folder}: is not finished; run the same sample command again, which goes on')
    if folder == path:
        path = folder / next(PLACES[name] for name in PLACES if name in record['made_with']['formats'])
    images, count = open_images(path), record['made_with']['num_samples']
    if images.count != count:
        raise UserError(f'{path}: holds {images.count} images, and {folder / RECORD} says {count}; sample them again')
    return images, record


def _facts(record: dict[str, Any] | None, log: Log) -> dict[str, Any]:
    """The part of a protocol that ``samples.json`` holds; what an older one does not say is unknown."""
    if record is None:
        log(
            f'there is no {RECORD} beside these images, so nobody knows how they were made: in the protocol of the '
            f'numbers it is {UNKNOWN!r}, and they compare with no others'
        )
        return dict.fromkeys(_DRAWN, UNKNOWN)
    made_with = record['made_with']
    facts = {name: made_with.get(name, UNKNOWN) for name in _DRAWN}
    # Balanced labels follow from the count; of others the list itself decides.
    if made_with['labels'] not in ('balanced', 'none'):
        facts['labels'] = f'{made_with["labels"]} {made_with["labels_digest"]}'
    return facts


def _origin(record: dict[str, Any] | None) -> dict[str, Any]:
    """Which weights drew the samples, as far as ``samples.json`` says it."""
    if record is None:  # images of somebody else
        return {}
    return {
        'run': record.get('run') or run_name(record['source']),
        'batch': record['batch'] or None,  # 0: imported, and nobody has said it
        'weights_digest': record['made_with']['weights_digest'],
        # The mean of those that an image took, where its sampler decided that and not the protocol.
        **({} if 'num_steps' in record['made_with']['sampling'] else {'evaluations': record['evaluations']}),
    }


def _before_sampling(request: SamplesRequest, measurement: Measurement, log: Log) -> tuple[Measurer, str]:
    """Refuse what the samples could not be measured with; what measures them, and where they go by default."""
    if request.count is None:
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
        drawn['weak_weights'] = weights_name(request.weak_weights)
    drawn['weights'] = model.weights  # in its one spelling, as that of the weak ones
    key = hashlib.sha256(json.dumps(drawn, default=str, sort_keys=True).encode()).hexdigest()[:8]
    name = f'{model.weights.replace(":", "-")}-ba{model.batch}-{key}'
    return measurer, str(folder_of(request.path) / 'evaluation_samples' / name)


def publish(entries: Entries, path: str, *, out: str | None = None, log: Log = print) -> None:
    """Write the numbers of a path to ``results.json``, and to MLflow where the run has it.

    Those of an exported file are credited to the run that it says it is of, not to that of the folder it lies in. By
    default the file of numbers, ``out``, is ``results.json`` in the folder of the run or of the samples.

    Raises:
        UserError: The file is there and holds something else.
    """
    folder = folder_of(path)
    run, measured = run_name(str(folder)), run_name(path)
    foreign = run not in (None, measured)  # an exported file lies in the folder of any run, or in none
    target = Path(out) if out else folder / ('results.json' if not foreign else f'{Path(path).stem}.results.json')
    append_results(target, entries)
    log(f'numbers  {target}')
    if foreign:
        log(f'MLflow   not logged: {path} is of run {measured!r}, and lies in the folder of run {run!r}')
    elif run is not None:
        log(f'MLflow   {_log_to_mlflow(folder, entries, target)}')


def format_entries(entries: Entries) -> str:
    """The numbers, one a line."""
    width = max(len(entry['metric']) for entry in entries)
    spreads = ['' if entry['spread'] is None else f' ± {entry["spread"]:.4g} over its parts' for entry in entries]
    pairs = zip(entries, spreads, strict=True)
    return '\n'.join(f'{entry["metric"]:<{width}}  {entry["value"]:.6g}{spread}' for entry, spread in pairs)


def _log_to_mlflow(folder: Path, entries: Entries, results: Path) -> str:
    """Add the numbers to the MLflow run of a run's folder, at the measured batch; says in words what it did."""
    try:
        client, run = store_of(yaml.safe_load((folder / 'config.yaml').read_text()), folder)
    except UserError as error:
        return f'not logged: {error}'
    dated = [entry for entry in entries if entry['batch'] is not None]  # a curve needs a step
    for entry in dated:  # in the series of the protocol, as the callback does
        name = series_name(entry['metric'], entry['protocol'])
        client.log_metric(run.info.run_id, name, entry['value'], step=entry['batch'])
    client.log_artifact(run.info.run_id, str(results))
    without = '' if len(dated) == len(entries) else ', without the curves: nobody has said after how many batches it is'
    return f'run {run.data.tags.get("run_name")} in {client.tracking_uri}{without}'
