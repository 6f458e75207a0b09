"""Runs as ``compare`` sees them: curves of metrics with their protocols, and what training had cost at each point.

From a run's folder, a ``results.json``, or MLflow. Nothing is written, and no store is made that is not there.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tread_composer.compare.cost import Cost, not_recorded, recorded_seconds, training_teraflops
from tread_composer.compare.entries import Curve, curves_of, read_entries
from tread_composer.compare.store import MLFLOW, artifacts, changes, find, speeds, store_of
from tread_composer.core.errors import UserError
from tread_composer.io.files import read_json

__all__ = ['Run', 'open_run']

_RESULTS = ('results.json', 'digits_quality.json')
_ARTIFACTS = ('config.yaml', 'data.json', *_RESULTS, 'environment.json', 'samples/latest.png')
_STORE = 'runs/mlflow.db'
_FORMS = f"a run's folder, a results.json (FILE#RUN where it holds several), or {MLFLOW}RUN[@tracking uri]"


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
    if word.startswith(MLFLOW):
        name, _, uri = word.removeprefix(MLFLOW).partition('@')
        return _from_mlflow(name, uri or f'sqlite:///{_STORE}')
    file, _, run_name = word.partition('#')
    for path, name in ((Path(word), None), (Path(file), run_name or None)):
        if path.is_dir():
            return _from_folder(path)
        if path.is_file():
            return _from_file(path, name)
    raise UserError(f'{word!r} is neither a folder nor a file; give {_FORMS}')


# --- the three forms ---


def _from_file(path: Path, run_name: str | None) -> Run:
    entries = read_entries(path)
    names = sorted({entry['run'] or '' for entry in entries})
    if run_name is None and len(names) > 1:
        raise UserError(
            f'{path} holds results of several runs; say which one: {", ".join(f"{path}#{n}" for n in names)}'
        )
    entries = [entry for entry in entries if run_name is None or entry['run'] == run_name]
    if not entries:
        raise UserError(f'{path}: no results of a run {run_name!r}; it holds {names or "none"}')
    curves, notes = curves_of(entries, not_recorded, not_recorded)
    return Run(entries[0]['run'] or path.stem, str(path), curves, tuple(notes))


def _from_folder(folder: Path) -> Run:
    config_file = folder / 'config.yaml'
    if not config_file.is_file():
        raise UserError(f'{folder}: no run (there is no config.yaml in it); give {_FORMS}')
    config = yaml.safe_load(config_file.read_text())
    data_file = folder / 'data.json'
    flops, flops_note = training_teraflops(config_file, data_file if data_file.is_file() else None)
    notes = [flops_note]
    record, missing = store_of(config, folder)
    logged: dict[int, float] = {}
    if record is None:
        notes.append(f'no MLflow record found ({missing}), so only what is in the folder is known')
    else:
        logged = speeds(*record)
    seconds, seconds_note = recorded_seconds(logged)
    files = [folder / name for name in _RESULTS if (folder / name).is_file()]
    entries = [entry for file in files for entry in read_entries(file)]
    if not entries:
        raise UserError(
            f'{folder}: holds no results ({" or ".join(_RESULTS)}): measure it first: '
            f'python -m tread_composer evaluate {folder} --reference ... (or train with the callback evaluation)'
        )
    notes += changes(record[1]) if record is not None else []
    notes.append(_seconds_note(entries, seconds_note))
    curves, more = curves_of(entries, flops, seconds)
    grid, environment = folder / 'samples' / 'latest.png', folder / 'environment.json'
    return Run(
        config['run_name'],
        str(folder),
        curves,
        (*notes, *more),
        _machine(read_json(environment)) if environment.is_file() else None,
        grid.read_bytes() if grid.is_file() else None,
    )


def _from_mlflow(name: str, uri: str) -> Run:
    client, run = find(name, uri)
    seconds, seconds_note = recorded_seconds(speeds(client, run))
    notes = []
    with tempfile.TemporaryDirectory() as temporary:
        files = artifacts(client, run, Path(temporary), _ARTIFACTS)
        flops: Cost = not_recorded
        if 'config.yaml' in files:
            flops, counted = training_teraflops(files['config.yaml'], files.get('data.json'))
            notes.append(counted)
        else:
            notes.append('FLOPs not recorded: the MLflow run has no config.yaml')
        entries = [entry for name in _RESULTS if name in files for entry in read_entries(files[name])]
        if not entries:
            raise UserError(
                f'{MLFLOW}{name}: the run has no {" or ".join(_RESULTS)}, so it is not known how its numbers '
                'were measured; measure it first'
            )
        notes += [*changes(run), _seconds_note(entries, seconds_note)]
        curves, more = curves_of(entries, flops, seconds)
        grid = files['latest.png'].read_bytes() if 'latest.png' in files else None
        machine = _machine(read_json(files['environment.json'])) if 'environment.json' in files else None
    source = f'{MLFLOW}{run.info.run_id}@{uri}'
    return Run(run.data.tags.get('run_name', run.info.run_name), source, curves, (*notes, *more), machine, grid)


def _seconds_note(entries: Sequence[Mapping[str, Any]], derived: str) -> str:
    """Where the seconds of the points come from."""
    timed = sum(1 for entry in entries if (entry['training'] or {}).get('seconds') is not None)
    written = 'seconds: as written with each result while training (the time of measuring left out)'
    if not timed:
        return derived
    return written if timed == len(entries) else f'{timed} of {len(entries)} results: {written}; the others: {derived}'


def _machine(environment: Mapping[str, Any]) -> str:
    gpus = environment.get('gpus') or []
    device = ', '.join(sorted({str(gpu.get('name', gpu) if isinstance(gpu, Mapping) else gpu) for gpu in gpus}))
    cpu = f'{environment.get("cpu")}, {environment.get("torch_threads")} threads'
    return f'{environment.get("world_size")} ranks on {f"{len(gpus)} x {device}" if gpus else cpu}'
