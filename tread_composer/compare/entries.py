"""Files of results as ``compare`` reads them: their entries, and the curves that these make."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tread_composer.callbacks.digits_quality import FIGURES
from tread_composer.compare.cost import Cost
from tread_composer.compare.curves import Point
from tread_composer.core.errors import UserError
from tread_composer.io.files import read_json
from tread_composer.metrics.metric import direction
from tread_composer.metrics.protocol import UNKNOWN, protocol_key

__all__ = ['Curve', 'by_history', 'curves_of', 'is_of_digits', 'read_entries']

# What digits_quality did not write in earlier versions, because its code left no choice.
_EARLIER = {
    'sampling': {'of': 'digits_quality'},
    'weak': 'none',
    'autoencoder': 'pixels',
    'autoencoder_hash': None,
    'decode_dtype': 'float32',
    'uint8_rule': 'none, the judge sees floats',
    'reference': {'name': 'digits', 'kind': 'training split'},
    'reference_hash': 'scikit-learn digits',
    'features': {'name': 'hidden layer of the digits judge'},
    'resolution': 8,
}


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


def read_entries(
    path: Path, histories: Mapping[str, Mapping[int, float]] | None = None, grid: Mapping[str, Any] | str = UNKNOWN
) -> list[dict[str, Any]]:
    """The entries of a file of results: of ``evaluate``, ``sweep`` and their callback, or of digits_quality.

    Args:
        path: The file.
        histories: What MLflow has of the run, for earlier versions of digits_quality, which wrote the last point alone.
        grid: The run's time grid, which those did not write either.

    Raises:
        UserError: It is something else.
    """
    content = read_json(path)
    return _digits_entries(content, path, histories or {}, grid) if is_of_digits(content) else _entries(content, path)


def is_of_digits(content: object) -> bool:
    """Whether this is what digits_quality writes: a table, not a list of entries."""
    return isinstance(content, Mapping)


def by_history(entries: Sequence[Mapping[str, Any]]) -> bool:
    """Whether some of these entries were taken from a logged history, which does not say by which protocol."""
    return any(entry['protocol'].get('sampling', {}) == _EARLIER['sampling'] for entry in entries)


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
    content: Mapping[str, Any],
    path: Path,
    histories: Mapping[str, Mapping[int, float]],
    grid: Mapping[str, Any] | str,
) -> list[dict[str, Any]]:
    """The quickstart's own measurement, with all points of its protocol; of earlier versions MLflow has them."""
    missing = [key for key in ('run_name', 'batch', 'protocol', *FIGURES) if key not in content]
    if missing:
        raise UserError(f'{path}: has no {", ".join(missing)}; it was not written by digits_quality or evaluate')
    points, protocol = content.get('points'), content['protocol']
    if points is None:
        protocol = {**protocol, **_EARLIER, 'time_grid': grid}
        known = {name: histories.get(f'digits/{name}') or {content['batch']: content[name]} for name in FIGURES}
    else:
        known = {name: {point['batch']: point[name] for point in points} for name in FIGURES}
    return [
        {'metric': f'digits/{name}', 'value': value, 'batch': step, 'protocol': protocol, 'training': None,
         'run': content['run_name']}
        for name, values in known.items()
        for step, value in values.items()
    ]  # fmt: skip


def curves_of(entries: Iterable[Mapping[str, Any]], flops: Cost, seconds: Cost) -> tuple[tuple[Curve, ...], list[str]]:
    """Entries by metric and protocol, and notes on what was left out.

    Args:
        entries: Of ``read_entries``.
        flops: Of the run. What an entry says of its cost goes before it.
        seconds: Likewise.
    """
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
        key = metric, protocol_key(entry['protocol'])
        protocols.setdefault(key, entry['protocol'])
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
