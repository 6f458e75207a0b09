"""Runs as ``compare`` sees them: curves of metrics with their protocols, and what training had cost at each point.

From a run's folder, a ``results.json``, or MLflow. Nothing is written, and no store is made that is not there.
"""

import json
import math
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tread_composer.compare.cost import Cost, not_recorded, recorded_seconds, training_teraflops
from tread_composer.compare.curves import Point, direction
from tread_composer.errors import UserError

__all__ = ['Curve', 'Run', 'open_run']

_DIGITS = ('frechet_distance', 'recognised')
# What digits_quality does not write because its code leaves no choice.
_DIGITS_PROTOCOL = {
    'sampling': {'of': 'digits_quality'},
    'autoencoder': 'pixels',
    'autoencoder_hash': None,
    'decode_dtype': 'float32',
    'uint8_rule': 'none, the judge sees floats',
    'reference': {'name': 'digits', 'kind': 'training split'},
    'reference_hash': 'scikit-learn digits',
    'features': {'name': 'hidden layer of the digits judge'},
    'resolution': 8,
}
# `evaluate` takes the second name where digits_quality has taken the first.
_RESULTS = ('results.json', 'evaluation.json')
_SPEED = 'throughput/batches_per_sec'
_MLFLOW = 'mlflow:'
_STORE = 'runs/mlflow.db'
_FORMS = f"a run's folder, a results.json (FILE#RUN where it holds several), or {_MLFLOW}RUN[@tracking uri]"


@dataclass(frozen=True)
class Curve:
    """A metric of a run under one protocol.

    Args:
        metric: Its name.
        protocol: How it was measured.
        points: Ascending in ``step``.
    """

    metric: str
    protocol: Mapping[str, Any]
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Run:
    """A run with what it measured.

    Args:
        name: Of the run.
        source: Where this was read.
        curves: One for each metric and protocol.
        notes: How costs were found, what was left out.
        machine: CPU, GPUs and number of ranks, if recorded.
        grid: The latest sample grid, a PNG.
    """

    name: str
    source: str
    curves: tuple[Curve, ...]
    notes: tuple[str, ...] = ()
    machine: str | None = None
    grid: bytes | None = field(default=None, repr=False)


def open_run(word: str) -> Run:
    """Read a run.

    Args:
        word: A run's folder, a ``results.json`` (``FILE#RUN`` where it holds several runs), or
            ``mlflow:RUN[@tracking uri]`` with a run's id or name.

    Raises:
        UserError: There is no such thing, it is ambiguous, or it holds no results.
    """
    if word.startswith(_MLFLOW):
        name, _, uri = word.removeprefix(_MLFLOW).partition('@')
        return _from_mlflow(name, uri or f'sqlite:///{_STORE}')
    file, _, wanted = word.partition('#')
    for path, name in ((Path(word), None), (Path(file), wanted or None)):
        if path.is_dir():
            return _from_folder(path)
        if path.is_file():
            return _from_file(path, name)
    raise UserError(f'{word!r} is neither a folder nor a file; give {_FORMS}')


# --- the three forms ---


def _from_file(path: Path, wanted: str | None) -> Run:
    content = _read_json(path)
    if isinstance(content, Mapping):
        entries = _digits_entries(content, path, {})
    else:
        entries = _entries(content, path)
    names = sorted({entry['run'] or '' for entry in entries})
    if wanted is None and len(names) > 1:
        raise UserError(
            f'{path} holds results of several runs; say which one: {", ".join(f"{path}#{n}" for n in names)}'
        )
    entries = [entry for entry in entries if wanted is None or entry['run'] == wanted]
    if not entries:
        raise UserError(f'{path}: no results of a run {wanted!r}; it holds {names or "none"}')
    curves, notes = _curves(entries, not_recorded, not_recorded)
    return Run(entries[0]['run'] or path.stem, str(path), curves, tuple(notes))


def _from_folder(folder: Path) -> Run:
    config_file = folder / 'config.yaml'
    if not config_file.is_file():
        raise UserError(f'{folder}: no run (there is no config.yaml in it); give {_FORMS}')
    config = yaml.safe_load(config_file.read_text())
    data_file = folder / 'data.json'
    flops, how = training_teraflops(config_file, data_file if data_file.is_file() else None)
    notes = [how]
    found, missing = _store_of(config, folder)
    histories: dict[str, dict[int, float]] = {}
    if found is None:
        notes.append(f'no MLflow record found ({missing}), so only what is in the folder is known')
    else:
        histories = _histories(*found)
        notes += _changes(*found)
    seconds, how = recorded_seconds(histories.get(_SPEED, {}))
    entries = [
        entry for name in _RESULTS if (folder / name).is_file() for entry in _any_entries(folder / name, histories)
    ]
    if not entries:
        raise UserError(f'{folder}: holds no results ({" or ".join(_RESULTS)}): measure the run first')
    notes.append(_seconds_note(entries, how))
    curves, more = _curves(entries, flops, seconds)
    grid, environment = folder / 'samples' / 'latest.png', folder / 'environment.json'
    return Run(
        config['run_name'],
        str(folder),
        curves,
        (*notes, *more),
        _machine(_read_json(environment)) if environment.is_file() else None,
        grid.read_bytes() if grid.is_file() else None,
    )


def _from_mlflow(name: str, uri: str) -> Run:
    client, run = _find(name, uri)
    histories = _histories(client, run)
    seconds, how = recorded_seconds(histories.get(_SPEED, {}))
    notes = _changes(client, run)
    with tempfile.TemporaryDirectory() as temporary:
        files = _artifacts(client, run, Path(temporary))
        flops: Cost = not_recorded
        if 'config.yaml' in files:
            flops, counted = training_teraflops(files['config.yaml'], files.get('data.json'))
            notes.append(counted)
        else:
            notes.append('FLOPs not recorded: the MLflow run has no config.yaml')
        entries = [entry for name in _RESULTS if name in files for entry in _any_entries(files[name], histories)]
        if not entries:
            raise UserError(
                f'{_MLFLOW}{name}: the run has no {" or ".join(_RESULTS)}, so it is not known how its numbers '
                'were measured; measure it first'
            )
        notes.append(_seconds_note(entries, how))
        curves, more = _curves(entries, flops, seconds)
        grid = files['latest.png'].read_bytes() if 'latest.png' in files else None
        machine = _machine(_read_json(files['environment.json'])) if 'environment.json' in files else None
    source = f'{_MLFLOW}{run.info.run_id}@{uri}'
    return Run(run.data.tags.get('run_name', run.info.run_name), source, curves, (*notes, *more), machine, grid)


# --- results ---


def _any_entries(path: Path, histories: Mapping[str, Mapping[int, float]]) -> list[dict[str, Any]]:
    content = _read_json(path)
    return _digits_entries(content, path, histories) if isinstance(content, Mapping) else _entries(content, path)


def _entries(content: object, path: Path) -> list[dict[str, Any]]:
    """The checked entries of a ``results.json``."""
    if not isinstance(content, list):
        raise UserError(f'{path}: not a list of results')
    entries = []
    for number, entry in enumerate(content):
        needed = {'metric': str, 'value': (int, float), 'protocol': Mapping}
        wrong = [
            key
            for key, kind in needed.items()
            if not isinstance(entry, Mapping) or not isinstance(entry.get(key), kind)
        ]
        if wrong:
            raise UserError(f'{path}: result {number} has no proper {", ".join(wrong)}; it was not written by evaluate')
        entries.append({'run': None, 'batch': None, 'training': None, **entry})
    return entries


def _digits_entries(
    content: Mapping[str, Any], path: Path, histories: Mapping[str, Mapping[int, float]]
) -> list[dict[str, Any]]:
    """The quickstart's own measurement: the file holds the latest one and the protocol, MLflow all of them."""
    missing = [key for key in ('run_name', 'batch', 'protocol', *_DIGITS) if key not in content]
    if missing:
        raise UserError(f'{path}: has no {", ".join(missing)}; it was not written by digits_quality or evaluate')
    entries, protocol = [], {**content['protocol'], **_DIGITS_PROTOCOL}
    for name in _DIGITS:
        metric = f'digits/{name}'
        values = dict(histories.get(metric, {})) or {content['batch']: content[name]}
        entries += [
            {'metric': metric, 'value': value, 'batch': step, 'protocol': protocol, 'training': None,
             'run': content['run_name']}
            for step, value in values.items()
        ]  # fmt: skip
    return entries


def _curves(entries: Iterable[Mapping[str, Any]], flops: Cost, seconds: Cost) -> tuple[tuple[Curve, ...], list[str]]:
    """Entries by metric and protocol. What an entry says of its cost goes before what the run says."""
    groups: dict[tuple[str, str], dict[int, Point]] = {}
    protocols: dict[tuple[str, str], Mapping[str, Any]] = {}
    notes: list[str] = []
    for entry in entries:
        metric, step, value = entry['metric'], entry['batch'], float(entry['value'])
        try:
            direction(metric)
        except ValueError as error:
            notes.append(f'left out: {error}')
            continue
        if step is None:
            notes.append(
                f'left out: {metric} of {entry.get("source")}: it is not known after how many steps it was taken'
            )
            continue
        if not math.isfinite(value):
            notes.append(f'left out: {metric} at step {step} is {value}')
            continue
        key = metric, json.dumps(entry['protocol'], sort_keys=True)
        protocols[key] = entry['protocol']
        points, cost = groups.setdefault(key, {}), entry['training'] or {}
        if step in points and points[step].value != value:
            notes.append(f'{metric} at step {step} was measured more than once; the last value counts')
        spent, took = cost.get('teraflops'), cost.get('seconds')
        points[step] = Point(
            step,
            value,
            flops(step) if spent is None else spent,
            seconds(step) if took is None else took,
        )
    curves = tuple(
        Curve(metric, protocols[metric, key], tuple(points[step] for step in sorted(points)))
        for (metric, key), points in groups.items()
    )
    return curves, list(dict.fromkeys(notes))


def _seconds_note(entries: Sequence[Mapping[str, Any]], derived: str) -> str:
    """Where the seconds of the points come from."""
    own = sum(1 for entry in entries if (entry['training'] or {}).get('seconds') is not None)
    written = 'seconds: as written with each result while training (the time of measuring left out)'
    if not own:
        return derived
    return written if own == len(entries) else f'{own} of {len(entries)} results: {written}; the others: {derived}'


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f'{path}: cannot be read: {error}') from None


def _machine(environment: Mapping[str, Any]) -> str:
    gpus = environment.get('gpus') or []
    device = ', '.join(sorted({str(gpu.get('name', gpu) if isinstance(gpu, Mapping) else gpu) for gpu in gpus}))
    cpu = f'{environment.get("cpu")}, {environment.get("torch_threads")} threads'
    return f'{environment.get("world_size")} ranks on {f"{len(gpus)} x {device}" if gpus else cpu}'


# --- MLflow ---


def _find(name: str, uri: str) -> tuple[Any, Any]:
    """A client and the run of this id or name."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    file = Path(uri.removeprefix('sqlite:///')) if uri.startswith('sqlite:///') else None
    if file is not None and not file.is_file():
        raise UserError(
            f'{_MLFLOW}{name}: there is no store {str(file)!r}; give another: {_MLFLOW}{name}@sqlite:///PATH'
        )
    if '"' in name or not name:
        raise UserError(f'{_MLFLOW}{name}: is no name of a run')
    client = MlflowClient(uri)
    if re.fullmatch(r'[0-9a-f]{32}', name):
        try:
            return client, client.get_run(name)
        except MlflowException:
            pass  # a name may look like an id
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    for tag in ('run_name', '`mlflow.runName`'):
        found = client.search_runs(experiments, f'tags.{tag} = "{name}"')
        if len(found) > 1:
            ids = ', '.join(run.info.run_id for run in found)
            raise UserError(f'{_MLFLOW}{name}: {len(found)} runs have this name in {uri}; give one of their ids: {ids}')
        if found:
            return client, found[0]
    raise UserError(f'{_MLFLOW}{name}: no run of this id or name in {uri}')


def _store_of(config: Mapping[str, Any], folder: Path) -> tuple[tuple[Any, Any] | None, str]:
    """The MLflow record that belongs to a run's folder, or where it was looked for."""
    settings = (config.get('loggers') or {}).get('mlflow')
    if settings is None:
        return None, 'the run had no mlflow logger'
    if settings.get('tracking_uri'):
        uris = [settings['tracking_uri']]
    else:  # beside the folder first: stores and folders are moved and copied together
        places = dict.fromkeys([folder.resolve().parent, Path(settings.get('folder') or 'runs').resolve()])
        uris = [f'sqlite:///{place}/mlflow.db' for place in places]
    reasons = []
    for uri in uris:
        try:
            return _find(config['run_name'], uri), ''
        except UserError as error:
            reasons.append(str(error))
    return None, '; '.join(reasons)


def _histories(client: Any, run: Any) -> dict[str, dict[int, float]]:
    names = [name for name in run.data.metrics if name == _SPEED or name.startswith('digits/')]
    histories = {}
    for name in names:
        points = sorted(client.get_metric_history(run.info.run_id, name), key=lambda point: point.timestamp)
        histories[name] = {point.step: point.value for point in points}  # a step repeated after a resume: the last
    return histories


def _changes(client: Any, run: Any) -> list[str]:
    """What a resumed run was given anew. The stored protocol is the last one, so it must not have changed."""
    del client
    changed = run.data.tags.get('tread_composer.changed_settings', '')
    named = [change for change in changed.split('; ') if change.startswith('callbacks.digits_quality.')]
    named = [change for change in named if not re.match(r'callbacks\.digits_quality\.(interval|folder):', change)]
    if named:
        raise UserError(
            f'run {run.info.run_name!r}: was resumed with another protocol ({"; ".join(named)}), so its points do not '
            'compare with each other; measure again with one protocol'
        )
    return [f'resumed with changed settings: {changed}'] if changed else []


def _artifacts(client: Any, run: Any, folder: Path) -> dict[str, Path]:
    """Those that are there of the files that a comparison reads, by their own names."""
    from mlflow.environment_variables import MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR

    wanted: Sequence[str] = ('config.yaml', 'data.json', *_RESULTS, 'environment.json')
    there = {file.path for place in ('', 'samples') for file in client.list_artifacts(run.info.run_id, place or None)}
    paths = [path for path in (*wanted, 'samples/latest.png') if path in there]
    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.set(False)  # a bar for each small file would bury the tables
    return {Path(path).name: Path(client.download_artifacts(run.info.run_id, path, str(folder))) for path in paths}
