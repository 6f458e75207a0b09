"""Files of results as ``compare`` reads them: their entries, and the curves that these make."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tread_composer.compare.cost import Cost
from tread_composer.compare.curves import Point
from tread_composer.core.errors import UserError
from tread_composer.io.files import read_json
from tread_composer.metrics.metric import direction
from tread_composer.metrics.protocol import protocol_key
from tread_composer.metrics.quantity import Better

__all__ = ['Curve', 'curves_of', 'read_entries']

_NEEDED = {'metric': str, 'value': (int, float), 'protocol': Mapping}


@dataclass(frozen=True)
class Curve:
    """A metric of a run under one protocol.

    Args:
        metric: Name as reported.
        protocol: How it was measured.
        points: Ascending in ``step``.
        better: Which values are better; asked of the metrics that this process knows if None.

    Raises:
        ValueError: ``better`` is None, and no known metric has this name.
    """

    metric: str
    protocol: Mapping[str, Any]
    points: tuple[Point, ...]
    better: Better | None = None

    def __post_init__(self) -> None:
        if self.better is None:
            object.__setattr__(self, 'better', direction(self.metric))


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The entries of a file of results: of ``evaluate``, ``sweep`` and the callbacks.

    Raises:
        UserError: It is something else.
    """
    content = read_json(path)
    if isinstance(content, Mapping):
        return _digits_entries(content, path)
    if not isinstance(content, list):
        raise UserError(f'{path}: not a list of results')
    entries = []
    for number, entry in enumerate(content):
        fields = entry if isinstance(entry, Mapping) else {}
        wrong = [key for key, kind in _NEEDED.items() if not isinstance(fields.get(key), kind)]
        if wrong:
            raise UserError(f'{path}: result {number} has no proper {", ".join(wrong)}; it was not written by evaluate')
        entries.append({'run': None, 'batch': None, 'training': None, 'better': None, **fields})
    return entries


def _digits_entries(content: Mapping[str, Any], path: Path) -> list[dict[str, Any]]:
    """What digits_quality writes: one protocol, and the figures of each measurement."""
    missing = [key for key in ('run_name', 'protocol', 'points') if key not in content]
    if missing:
        raise UserError(f'{path}: has no {", ".join(missing)}; it was not written by digits_quality or evaluate')
    shared = {'protocol': content['protocol'], 'training': None, 'run': content['run_name'], 'better': None}
    return [
        {'metric': f'digits/{name}', 'value': value, 'batch': point['batch'], **shared}
        for point in content['points']
        for name, value in point.items()
        if name != 'batch'
    ]


def curves_of(entries: Iterable[Mapping[str, Any]], flops: Cost, seconds: Cost) -> tuple[tuple[Curve, ...], list[str]]:
    """Entries by metric and protocol, and notes on what was left out.

    Args:
        entries: What ``read_entries`` returned.
        flops: TFLOPs until a step, for entries that do not say theirs.
        seconds: Likewise.
    """
    points: dict[tuple[str, str], dict[int, Point]] = {}
    samples: dict[tuple[str, str], Mapping[str, Any]] = {}  # an entry of each curve, for its protocol and direction
    notes: list[str] = []
    for entry in entries:
        metric, step, value = entry['metric'], entry['batch'], float(entry['value'])
        reason = _unusable(entry)
        if reason is not None:
            notes.append(f'left out: {reason}')
            continue
        key = metric, protocol_key(entry['protocol'])
        samples.setdefault(key, entry)
        curve, cost = points.setdefault(key, {}), entry['training'] or {}
        if step in curve and curve[step].value != value:
            notes.append(f'{metric} at step {step} was measured more than once; the last value counts')
        spent, took = cost.get('teraflops'), cost.get('seconds')
        curve[step] = Point(
            step,
            value,
            flops(step) if spent is None else spent,
            seconds(step) if took is None else took,
        )
    curves = []
    for key, by_step in points.items():
        ordered = tuple(by_step[step] for step in sorted(by_step))
        curves.append(Curve(key[0], samples[key]['protocol'], ordered, samples[key]['better']))
    return tuple(curves), list(dict.fromkeys(notes))


def _unusable(entry: Mapping[str, Any]) -> str | None:
    """Why an entry is no point of a curve."""
    metric, step = entry['metric'], entry['batch']
    if entry['better'] is None:  # a result that was written before metrics said their direction themselves
        try:
            direction(metric)
        except ValueError as error:
            return str(error)
    if step is None:
        return f'{metric} of {entry.get("source")}: training step unknown'
    return None if math.isfinite(entry['value']) else f'{metric} at step {step} is {entry["value"]}'
