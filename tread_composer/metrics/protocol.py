"""What a measured number was measured with, and the file of numbers: ``results.json``.

A number without its protocol says nothing: the count of samples, the sampler, the guidance, the reference and the
feature network move an FID by more than most methods do. So the protocol travels with each number, and two numbers
compare only if ``differences`` finds none.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from tread_composer.core.errors import UserError
from tread_composer.core.flatten import flatten
from tread_composer.io.files import read_json, write_json
from tread_composer.io.locks import locked

__all__ = [
    'UINT8_RULE', 'UNKNOWN', 'Protocol', 'append_results', 'by_protocol', 'differences', 'load_results',
    'protocol_key', 'series_name',
]  # fmt: skip

UNKNOWN = 'unknown'
"""Stands in a protocol where nobody knows; such a number compares with nothing."""

UINT8_RULE = 'round((x + 1) * 127.5), ties to even, clamped'
"""How pixels become bytes in this project (``autoencoders.pixels.to_uint8``)."""

_ENTRY = {'metric': str, 'value': (int, float), 'protocol': Mapping}  # what an entry of results.json must have
_OPTIONAL = ('run', 'batch', 'training', 'better', 'source', 'weights_digest')

# Names of things that a hash identifies: they may lie elsewhere under another name.
_NAMED_BY_HASH = {
    'reference.name': 'reference_hash',
    'reference.lossy': 'reference_hash',
    'autoencoder': 'autoencoder_hash',
}


@dataclass(frozen=True)
class Protocol:
    """Everything that decides a number besides the weights of the model. Plain values only: it is stored as JSON.

    ``'unknown'`` stands for what nobody knows, in place of any value.
    """

    weights: str  # 'ema', 'raw' or 'posthoc:0.13'
    num_samples: int
    labels: str  # how the classes were chosen: 'balanced', 'random', or other words for it
    seed: int | str  # image i has the seed `seed + i`
    sampling: Mapping[str, Any] | str  # sampler, steps, guidance: `SamplingSettings.to_dict`
    autoencoder: str  # 'pixels' for none
    autoencoder_hash: str | None  # SHA-256 of its weights; None for pixels
    decode_dtype: str  # what it computed in
    uint8_rule: str  # how pixels became bytes
    reference: Mapping[str, str]  # `name` and `kind` of what was compared with, and `lossy` where it has JPEGs
    reference_hash: str  # SHA-256 of its content
    features: Mapping[str, str]  # `name`, `weights_hash` and `version` of the feature network
    resolution: int  # side of the images in pixels
    settings: Mapping[str, Any] = field(default_factory=dict)  # what the metric depends on besides, as KID's subsets
    time_grid: Mapping[str, Any] | str = UNKNOWN  # `objective`, where its steps lie, how the last ends: `time_grid`
    weak: str = UNKNOWN  # which weights guided as the second network, and their digest; 'none' without one

    def to_dict(self) -> dict[str, Any]:
        """As it is stored."""
        return json.loads(json.dumps(asdict(self), allow_nan=False))


# Of a protocol that was written before a part of it existed
_UNSAID = {entry.name: UNKNOWN for entry in fields(Protocol) if entry.name != 'settings'}


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Why two numbers do not compare, by their protocols as they are stored: one line each; empty if they do.

    What is unknown on either side is a reason. A name beside an equal hash is none: the hash says what it is. The time
    grids of two objectives are not held against each other: there is no equal grid in t and in noise levels, and which
    objective a model has belongs to the model.
    """
    left_side, right_side = (flatten({**_UNSAID, **protocol}) for protocol in (a, b))
    objectives = {flat.get('time_grid.objective', UNKNOWN) for flat in (left_side, right_side)}  # of the two models
    lines = []
    for key in dict.fromkeys([*left_side, *right_side]):
        hashed = left_side.get(_NAMED_BY_HASH.get(key, ''))
        if hashed not in (None, UNKNOWN) and hashed == right_side.get(_NAMED_BY_HASH[key]):
            continue
        section = key.partition('.')[0]
        if section == 'time_grid' and len(objectives) == 2 and UNKNOWN not in objectives:
            continue
        if key != section and UNKNOWN in (left_side.get(section), right_side.get(section)):
            continue  # said once, of the whole section
        values = [flat.get(key, 'absent') for flat in (left_side, right_side)]
        if UNKNOWN in values:
            side = 'the first' if values[0] == UNKNOWN else 'the second'
            lines.append(f'{key}: unknown for {"both numbers" if values[0] == values[1] else side}')
        elif values[0] != values[1]:
            lines.append(f'{key}: {values[0]!r} and {values[1]!r}')
    return lines


def protocol_key(protocol: Mapping[str, Any]) -> str:
    """The same text for two protocols in which ``differences`` finds no other values; what is unknown counts as equal.

    It tells series of numbers of one model apart.
    """
    flat = flatten({**_UNSAID, **protocol})
    for name, hashed in _NAMED_BY_HASH.items():
        if flat.get(hashed) not in (None, UNKNOWN):
            flat.pop(name, None)
    text = json.dumps({key: _number(value) for key, value in flat.items()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _number(value: Any) -> Any:
    """1.0 as 1: they are equal, and their texts are not."""
    if isinstance(value, list):
        return [_number(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def series_name(metric: str, protocol: Mapping[str, Any]) -> str:
    """The name of a metric's series in a logger: numbers of different protocols never stand in one.

    ``evaluation/fid_10000/ema-heun-50-classifier_free-1.5-1a2b3c4d``: some of the protocol for people, then a digest of
    all of it.
    """
    drawn, words = protocol['sampling'], [protocol['weights']]
    if isinstance(drawn, Mapping):
        # An adaptive sampler has tolerances in the place of steps, and they are in the digest.
        words += [drawn.get('sampler', UNKNOWN), *([drawn['num_steps']] if 'num_steps' in drawn else [])]
        words += [] if drawn.get('guidance', 'none') == 'none' else [drawn['guidance'], drawn.get('guidance_scale')]
    return f'evaluation/{metric}/{"-".join(map(str, words))}-{protocol_key(protocol)[:8]}'


def by_protocol(measured: Iterable[tuple[str, Mapping[str, Any]]]) -> list[tuple[dict[str, Any], list[str]]]:
    """Of names and protocols: each protocol once, with the names of what was measured by it.

    Its ``settings`` are those of each metric.
    """
    groups: list[tuple[dict[str, Any], list[str]]] = []
    for name, protocol in measured:
        # How the images were drawn is the same for all metrics of them
        shared = {key: value for key, value in protocol.items() if key != 'settings'}
        matching = [group for group in groups if {**group[0], **shared} == group[0]]
        if not matching:
            groups.append((shared, []))
        group, names = matching[0] if matching else groups[-1]
        if protocol.get('settings'):
            group.setdefault('settings', {})[name] = protocol['settings']
        names += [] if name in names else [name]
    return groups


def load_results(path: str | Path) -> list[dict[str, Any]]:
    """The entries of a ``results.json``; what an older one does not say is None.

    Raises:
        UserError: The file is not a list of such entries.
    """
    entries = read_json(Path(path))
    if not isinstance(entries, list):
        raise UserError(f'{path}: is no list of measured numbers with their protocols; write the numbers elsewhere')
    for number, entry in enumerate(entries):
        content = entry if isinstance(entry, Mapping) else {}
        wrong = [key for key, kind in _ENTRY.items() if not isinstance(content.get(key), kind)]
        if wrong:
            raise UserError(f'{path}: result {number} has no proper {", ".join(wrong)}; it was not written by evaluate')
    return [{**dict.fromkeys(_OPTIONAL), **entry} for entry in entries]


def append_results(path: str | Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Add entries to a ``results.json``, whole or not at all; makes the file and its folder.

    An entry takes the place of an earlier one that measured the same: a run that is continued from an older checkpoint
    measures a second time what it had measured before it was stopped.

    Raises:
        UserError: The file is there and is not such a list.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent / f'.{path.name}.lock'):
        # A later entry of the same identity replaces it
        kept = {_identity(entry): entry for entry in load_results(path)} if path.exists() else {}
        write_json(path, list({**kept, **{_identity(entry): entry for entry in entries}}.values()))


def _identity(entry: Mapping[str, Any]) -> str:
    keys = ('metric', 'protocol', 'weights_digest', 'run', 'batch', 'source')
    return json.dumps([entry.get(key) for key in keys], sort_keys=True)
