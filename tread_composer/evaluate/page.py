"""The page of an evaluation: numbers first, then how they were measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from tread_composer.io.page import Report

__all__ = ['evaluation_page']


def evaluation_page(
    entries: Sequence[Mapping[str, Any]], command: str, grids: Sequence[tuple[str, bytes]] = ()
) -> Report:
    """The page of some entries of a ``results.json``.

    Args:
        entries: At least one. Those with the same protocol stand together.
        command: How to get the same again.
        grids: Caption and PNG of pictures of samples.

    Raises:
        ValueError: There is no entry, or a picture is no PNG.
    """
    if not entries:
        raise ValueError('an evaluation without a number has no page')
    sources = ', '.join(dict.fromkeys(str(entry['source']) for entry in entries))
    runs = ', '.join(dict.fromkeys(str(entry['run']) for entry in entries if entry.get('run')))
    page = Report(f'Evaluation of {runs or sources}', f'Measured: {sources}')
    page.tiles([(f'{entry["value"]:.4g}', _with_batch(entry)) for entry in entries])
    page.heading('Numbers').table(
        [
            'metric',
            'value',
            'standard deviation',
            'unit',
            'run',
            'batch',
            'training TFLOPs',
            'seconds of training',
            'measured',
        ],
        [_row(entry) for entry in entries],
    )
    page.text(
        'A standard deviation is that over the parts of the samples that the number is the mean of; it is none of '
        'other samples or other seeds. A number in the name of a metric is how many samples there were: fewer than '
        '50,000, so it does not compare with published values.',
        soft=True,
    )
    if grids:
        page.heading('Samples').pictures(grids)
    page.heading('Protocol')
    protocols: list[tuple[Mapping[str, Any], list[str]]] = []
    for entry in entries:
        same = next((names for protocol, names in protocols if protocol == entry['protocol']), None)
        if same is None:
            protocols.append((entry['protocol'], [entry['metric']]))
        else:
            same.append(entry['metric'])
    for protocol, names in protocols:
        page.heading(', '.join(dict.fromkeys(names)), small=True).facts(protocol)
    digests = list(dict.fromkeys(str(entry['weights_digest']) for entry in entries if entry.get('weights_digest')))
    if digests:
        page.heading('Weights', small=True).text(', '.join(digests))
    return page.heading('How to get this page again').command(command)


def _with_batch(entry: Mapping[str, Any]) -> str:
    return entry['metric'] if entry.get('batch') is None else f'{entry["metric"]} at batch {entry["batch"]:,}'


def _row(entry: Mapping[str, Any]) -> list[str]:
    training = entry.get('training') or {}
    figures = [entry['value'], entry.get('spread')]
    costs = [entry.get('batch'), training.get('teraflops'), training.get('seconds')]
    return [
        entry['metric'],
        *('' if value is None else f'{value:.5g}' for value in figures),
        str(entry.get('unit') or 'not recorded'),
        str(entry.get('run') or 'not recorded'),
        *('not recorded' if value is None else f'{value:,.5g}' for value in costs),
        str(entry.get('created') or 'not recorded'),
    ]
