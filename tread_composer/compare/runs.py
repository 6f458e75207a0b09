"""Runs as ``compare`` sees them: curves of metrics with their protocols, and what training had cost at each point.

From a run's folder with its MLflow record, or from a ``results.json``. FLOPs come from the run's configuration, seconds
from its logged speed. Nothing is written.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from composer.core import Time, TimeUnit

from tread_composer.config import Config, restore_config
from tread_composer.core.errors import UserError
from tread_composer.core.process import disable_mlflow_telemetry
from tread_composer.data.manifest import Manifest
from tread_composer.io.files import read_json
from tread_composer.metrics.metric import Better
from tread_composer.metrics.protocol import load_results, protocol_key
from tread_composer.run.plan import make_plan

__all__ = ['AXES', 'Axis', 'Curve', 'Point', 'Run', 'open_run', 'recorded_seconds', 'store_of', 'training_teraflops']

Axis = Literal['step', 'teraflops', 'seconds']
AXES: dict[Axis, str] = {'step': 'training steps', 'teraflops': 'training TFLOPs', 'seconds': 'seconds of training'}

Cost = Callable[[int], float | None]
"""From the number of steps to what they have cost; None where that is not known."""

_FORMS = "a run's folder, or a results.json (FILE#RUN where it holds several)"
_FLOPS_PER_MAC = 6  # a multiply and an add, and the backward pass costs twice the forward


@dataclass(frozen=True)
class Point:
    """One measurement: batches trained, the metric's value, what training had cost until then; None if not recorded."""

    step: int
    value: float
    teraflops: float | None = None
    seconds: float | None = None

    def cost(self, axis: Axis) -> float | None:
        """What training had cost."""
        return getattr(self, axis)


@dataclass(frozen=True)
class Curve:
    """A metric of a run under one protocol; its points ascend in ``step``."""

    metric: str
    protocol: Mapping[str, Any]
    points: tuple[Point, ...]
    better: Better


@dataclass(frozen=True)
class Run:
    """A run with what it measured."""

    name: str
    source: str  # where this was read
    curves: tuple[Curve, ...]  # one for each metric and protocol
    notes: tuple[str, ...] = ()  # how costs were found, what was left out
    machine: str | None = None  # CPU, GPUs and number of ranks, if recorded
    grid: bytes | None = field(default=None, repr=False)  # the latest sample grid, a PNG


def open_run(word: str) -> Run:
    """Read a run: a run's folder, or a ``results.json`` (``FILE#RUN`` where it holds several runs).

    ``FILE#`` are its entries of no run, such as those of images that nobody says the origin of.

    Raises:
        UserError: There is no such thing, it is ambiguous, or it holds no results.
    """
    file, mark, run_name = word.partition('#')
    for path, name in ((Path(word), None), (Path(file), run_name if mark else None)):
        if path.is_dir():
            return _from_folder(path)
        if path.is_file():
            return _from_file(path, name)
    raise UserError(f'{word!r} is neither a folder nor a file; give {_FORMS}')


def _from_file(path: Path, run_name: str | None) -> Run:
    entries = load_results(path)
    names = sorted({entry['run'] or '' for entry in entries})
    if run_name is None and len(names) > 1:
        raise UserError(
            f'{path} holds results of several runs; say which one: {", ".join(f"{path}#{n}" for n in names)}'
        )
    entries = [entry for entry in entries if run_name is None or (entry['run'] or '') == run_name]
    if not entries:
        raise UserError(f'{path}: no results of a run {run_name!r}; it holds {names or "none"}')
    curves, notes = _curves(entries, _not_recorded, _seconds_of(entries, {})[0])
    return Run(entries[0]['run'] or path.stem, str(path), curves, tuple(notes))


def _from_folder(folder: Path) -> Run:
    if not (folder / 'config.yaml').is_file():
        raise UserError(f'{folder}: no run (there is no config.yaml in it); give {_FORMS}')
    results = folder / 'results.json'
    entries = load_results(results) if results.is_file() else []
    if not entries:
        raise UserError(
            f'{folder}: holds no results (results.json): measure it first: '
            f'python -m tread_composer evaluate {folder} --reference ... (or train with the callback evaluation)'
        )
    config, logged, notes = yaml.safe_load((folder / 'config.yaml').read_text()), {}, []
    try:
        client, record = store_of(config, folder)
        logged, changed = _speeds(client, record), record.data.tags.get('tread_composer.changed_settings')
        notes += [f'resumed with changed settings: {changed}'] if changed else []
    except UserError as error:
        notes.append(f'no MLflow record found ({error}), so only what is in the folder is known')
    flops, flops_note = training_teraflops(folder)
    seconds, seconds_note = _seconds_of(entries, logged)
    curves, left_out = _curves(entries, flops, seconds)
    environment, grid = folder / 'environment.json', folder / 'samples' / 'latest.png'
    return Run(
        config['run_name'],
        str(folder),
        curves,
        (flops_note, *notes, seconds_note, *left_out),
        _machine(read_json(environment)) if environment.is_file() else None,
        grid.read_bytes() if grid.is_file() else None,
    )


def _seconds_of(entries: Iterable[Mapping[str, Any]], speeds: Mapping[int, float]) -> tuple[Cost, str]:
    """Seconds of training until a step, and how they were found: one clock, whoever has measured at that step.

    As written with the results, on a straight line between those; beyond them, and without any, by the logged speeds.
    """
    pairs = [(entry['batch'], (entry['training'] or {}).get('seconds')) for entry in entries]
    written = {step: took for step, took in pairs if step is not None and took is not None}
    derived, text = recorded_seconds(speeds)
    if not written:
        return derived, text
    steps = [0, *sorted(written.keys() - {0})]
    clock = [written.get(0, 0.0), *(written[step] for step in steps[1:])]

    def seconds(step: int) -> float | None:
        beyond = derived(step - steps[-1]) if step > steps[-1] else 0.0
        return None if beyond is None else float(np.interp(step, steps, clock)) + beyond

    note = 'seconds: as written with each result while training (the time of measuring left out)'
    if all(step is None or step in written for step, _ in pairs):
        return seconds, note
    late = any(step is not None and step > steps[-1] for step, _ in pairs)
    return seconds, f'{note}, on a straight line between them{f"; after the last: {text}" if late else ""}'


def _machine(environment: Mapping[str, Any]) -> str:
    gpus = environment.get('gpus') or []
    device = ', '.join(sorted({str(gpu.get('name', gpu) if isinstance(gpu, Mapping) else gpu) for gpu in gpus}))
    cpu = f'{environment.get("cpu")}, {environment.get("torch_threads")} threads'
    return f'{environment.get("world_size")} ranks on {f"{len(gpus)} x {device}" if gpus else cpu}'


def _curves(entries: Iterable[Mapping[str, Any]], flops: Cost, seconds: Cost) -> tuple[tuple[Curve, ...], list[str]]:
    """Entries by metric and protocol, and notes on what was left out; the costs count for entries without theirs."""
    points: dict[tuple[str, str], dict[int, Point]] = {}
    samples: dict[tuple[str, str], Mapping[str, Any]] = {}  # an entry of each curve, for its protocol and direction
    notes: list[str] = []
    for entry in entries:
        metric, step, value = entry['metric'], entry['batch'], float(entry['value'])
        faults = {
            'training step unknown': step is None,
            'nobody says which values are better': entry['better'] is None,
            f'at step {step} it is {value}': not math.isfinite(value),
        }
        if any(faults.values()):
            reasons = ', '.join(text for text, holds in faults.items() if holds)
            notes.append(f'left out: {metric} of {entry["source"]}: {reasons}')
            continue
        key = metric, protocol_key(entry['protocol'])  # numbers of different protocols are different curves
        samples.setdefault(key, entry)
        curve, cost = points.setdefault(key, {}), entry['training'] or {}
        if step in curve and curve[step].value != value:
            notes.append(f'{metric} at step {step} was measured more than once; the last value counts')
        spent, took = cost.get('teraflops'), cost.get('seconds')
        work, duration = flops(step) if spent is None else spent, seconds(step) if took is None else took
        curve[step] = Point(step, value, work, duration)
    curves = []
    for key, by_step in points.items():
        ordered = tuple(by_step[step] for step in sorted(by_step))
        curves.append(Curve(key[0], samples[key]['protocol'], ordered, samples[key]['better']))
    return tuple(curves), list(dict.fromkeys(notes))


def store_of(config: Mapping[str, Any], folder: Path) -> tuple[Any, Any]:
    """MLflow's client and the run that belong to a run's folder: the newest of this name, should there be several.

    Raises:
        UserError: The run has no MLflow logger, or there is no record of it; says where it was looked for.
    """
    settings = (config.get('loggers') or {}).get('mlflow')
    if settings is None:
        raise UserError('the run has no mlflow logger')
    disable_mlflow_telemetry()
    from mlflow import MlflowClient

    if settings.get('tracking_uri'):
        uris = [settings['tracking_uri']]
    else:  # beside the folder first: stores and folders are moved and copied together
        places = dict.fromkeys([folder.resolve().parent, Path(settings.get('folder') or 'runs').resolve()])
        uris = [f'sqlite:///{place}/mlflow.db' for place in places]
    reasons = []
    for uri in uris:
        if uri.startswith('sqlite:///') and not Path(uri.removeprefix('sqlite:///')).is_file():
            reasons.append(f'there is no store {uri}')  # MLflow would make one
            continue
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name(settings['experiment_name'])
        query = f'tags.run_name = "{config["run_name"]}"'
        runs = client.search_runs([experiment.experiment_id], query) if experiment is not None else []
        if runs:
            return client, runs[0]
        reasons.append(f'no run of this name in {uri}')
    raise UserError('; '.join(reasons))


def _speeds(client: Any, run: Any) -> dict[int, float]:
    """Batches in a second, by step, as ``speed_monitor`` logged them."""
    logged = client.get_metric_history(run.info.run_id, 'throughput/batches_per_sec')
    # By when they were logged: of a step repeated after a resume the last counts
    return {point.step: point.value for point in sorted(logged, key=lambda point: point.timestamp)}


def _not_recorded(step: int) -> None:
    """The cost of which nothing is known."""
    del step


def training_teraflops(folder: Path) -> tuple[Cost, str]:
    """TFLOPs of a run until a step, of the network's matrix products alone, and a sentence on how they were found.

    What its data are says ``data.json`` in its folder, where the data are not on this machine.
    """
    try:
        config = restore_config(folder / 'config.yaml')
        if (folder / 'data.json').is_file() and config.data.name == 'latents':
            config = restore_config(folder / 'config.yaml', _data_overrides(folder / 'data.json'))
        plan = make_plan(config, 1, memory=False)  # the work of a step is the same on any number of ranks
        window = _routed_steps(config, plan)
    except UserError as error:
        return _not_recorded, f'FLOPs not recorded: {error}'
    factor = _FLOPS_PER_MAC * plan['samples_per_step'] / 1000
    dense, routed = factor * plan['gmacs_dense'], factor * plan['gmacs_routed']  # TFLOPs of a step

    def cost(step: int) -> float:
        steps = max(0.0, min(step, window[1]) - window[0])  # of them routed
        return routed * steps + dense * (step - steps)

    text = f'FLOPs: {routed:.4g} TFLOPs a step ({_FLOPS_PER_MAC} x {plan["gmacs_routed"]:.4g} GMACs x '
    text += f'{plan["samples_per_step"]} samples), arithmetic of the network only'
    if window != (0, math.inf):
        text += f'; routed from step {window[0]:g} to {window[1]:g}, else {dense:.4g} TFLOPs a step'
    if config.load_path is not None:
        text += f'; without what the weights in {config.load_path} had cost before'
    return cost, text


def _data_overrides(path: Path) -> list[str]:
    manifest = Manifest.parse(path.read_text(), str(path), 'it belongs to the run: write it anew by resuming the run')
    return [f'data.{name}={value}' for name, value in manifest.sizes.items()]


def _routed_steps(config: Config, plan: Mapping[str, Any]) -> tuple[float, float]:
    """The steps in which work is saved; (0, inf) if always, or if nothing is ever saved."""
    windows = {}
    for name, component in config.algorithms.items():
        if hasattr(component.instance, 'cost_window'):
            start, end = component.instance.cost_window()
            windows[name] = (
                0.0 if start is None else _in_steps(start, f'{name}.start_time', plan),
                math.inf if end is None else _in_steps(end, f'{name}.end_time', plan),
            )
    if len(set(windows.values())) > 1:
        raise UserError(f'{" and ".join(windows)} save work in different steps of the run')
    return next(iter(windows.values()), (0.0, math.inf))


def _in_steps(text: str, name: str, plan: Mapping[str, Any]) -> float:
    time = Time.from_timestring(text)
    factor = {
        TimeUnit.BATCH: 1,
        TimeUnit.DURATION: plan['batches'],
        TimeUnit.EPOCH: plan['batches_per_epoch'],
        TimeUnit.SAMPLE: 1 / plan['samples_per_step'],
    }.get(time.unit)
    if factor is None:
        raise UserError(f'algorithms.{name}: {text} is not known in steps without the size of the data')
    return math.ceil(time.value * factor - 1e-9)


def recorded_seconds(speeds: Mapping[int, float]) -> tuple[Cost, str]:
    """Seconds of training until a step, and how they were found; ``speeds`` are batches in a second, by step.

    Composer's clock of training time counts what callbacks do, drawing samples for example. So the middle one of the
    logged speeds is taken: most windows are undisturbed.
    """
    usable = [speed for speed in speeds.values() if speed > 0 and math.isfinite(speed)]
    if not usable:
        return _not_recorded, 'seconds not recorded: the run has no throughput/batches_per_sec (add speed_monitor: {})'
    speed = statistics.median(usable)
    text = f'seconds: steps / {speed:.4g} steps a second, the median of {len(usable)} logged speeds '
    return lambda step: step / speed, text + '(measuring and saving between them left out)'
