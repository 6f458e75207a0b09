"""The rows of ``gpu.py`` as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ['table']


def table(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    """Steps first, then all that is no step, with the environment above and the commands below.

    Args:
        rows: Of ``rows.jsonl``.
        facts: Of ``environment.json``.
    """
    versions = ', '.join(f'{name} {version}' for name, version in facts['versions'].items() if version)
    cards = ', '.join(f'{facts["cards"].count(card)} x {card}' for card in dict.fromkeys(facts['cards'])) or 'no GPU'
    lines = [f'{cards}, driver {facts["driver"]}, CUDA {facts["cuda"]}; {versions}; commit {facts["commit"]}.', '']
    if any(row['rehearsal'] for row in rows):
        lines += ['**A rehearsal with tiny networks: no figure means anything.**', '']
    steps = [row for row in rows if _named(row, 'ratio')]
    if steps:
        lines += [
            '| step | batch | dense ms | routed ms | dense / routed (quartiles) | ideal | of it | the blocks allow '
            '| MFU dense, routed | GiB dense, routed | tokens/s dense, routed |',
            '|---|---|---|---|---|---|---|---|---|---|---|',
            *map(_step, steps),
            '',
        ]
    others = [row for row in rows if row not in steps]
    if others:
        lines += ['| row | status | seconds | what it says |', '|---|---|---|---|', *map(_other, others), '']
    lines += ['Commands:', '', *(f'- {row["name"]}: `{row["command"]}`' for row in rows), '']
    return '\n'.join(lines)


def _named(row: Mapping[str, Any], measurement: str, **values: str) -> dict[str, Any] | None:
    for entry in row['measurements']:
        if entry['measurement'] == measurement and all(entry[key] == value for key, value in values.items()):
            return entry
    return None


def _step(row: Mapping[str, Any]) -> str:
    dense, routed = (_named(row, 'step', contender=name) or {} for name in ('dense', 'routed'))
    ratio = _named(row, 'ratio') or {}
    measured = ratio['ratio']
    cells = [
        row['name'],
        str(ratio['batch_size']),
        *(f'{1000 * one["seconds"]["median"]:.2f}' for one in (dense, routed)),
        f'{measured["median"]:.3f} ({measured["low"]:.3f} to {measured["high"]:.3f})',
        f'{ratio["ideal"]:.3f}',
        f'{ratio["quotient"]:.1%}',
        f'{ratio["blocks_allow"]:.3f}',
        ', '.join(f'{one["mfu"]:.1%}' for one in (dense, routed)),
        ', '.join(f'{one["peak_gib"]:.2f}' for one in (dense, routed)),
        ', '.join(f'{one["tokens_per_second"]:,.0f}' for one in (dense, routed)),
    ]
    return f'| {" | ".join(cells)} |'


def _other(row: Mapping[str, Any]) -> str:
    said = [_values(entry, row) for entry in row['measurements']]
    if not said:
        # The last lines of a traceback, a refusal, the summary of pytest or of a run.
        last = [line.strip() for line in row.get('output', '').splitlines() if line.strip(' -')]
        text = ' '.join(last[-1:] if row['name'] == 'tests' else last[-6:])
        said = [text.replace('|', '/')[-400:]]
    return f'| {row["name"]} | {row["status"]} | {row["seconds"]} | {"; ".join(said)} |'


def _values(entry: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    hidden = {
        'measurement',
        'yaml',
        'overrides',
        'device',
        'torch',
        'python',
        'commit',
        'label',
        'compile',
        'dynamic',
        *row,
    }
    words = [f'{key} {_short(value)}' for key, value in entry.items() if key not in hidden]
    return f'{entry["measurement"]}: {", ".join(words)}'


def _short(value: Any) -> str:
    return f'{value:.4g}' if isinstance(value, float) else str(value)
