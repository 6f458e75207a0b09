"""Where measured numbers go: ``results.json``, a page to look at, MLflow."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tread_composer.compare.store import store_of
from tread_composer.core.errors import UserError
from tread_composer.evaluate.measuring import folder_of, run_name
from tread_composer.io.page import Report
from tread_composer.metrics.protocol import append_results, by_protocol, series_name

__all__ = ['format_entries', 'publish']

Log = Callable[[str], None]
Entries = Sequence[Mapping[str, Any]]

_HEAD = ['metric', 'value', 'standard deviation', 'unit', 'run', 'batch', 'measured']


def publish(
    entries: Entries,
    path: str,
    command: str,
    *,
    grid: Path | None = None,
    out: str | None = None,
    log: Log = print,
) -> None:
    """Write numbers to ``results.json``, to a page beside it, and to MLflow where the run has it.

    Those of an exported file are credited to the run that it says it is of, not to that of the folder it lies in.

    Args:
        entries: What ``measure_samples`` or ``evaluate_model`` returned.
        path: What was measured.
        command: How to get the page again.
        grid: A picture for the page, if it is there.
        out: The file of numbers. (Default: ``results.json`` in the folder of the run or of the samples.)
        log: Gets the lines for people.

    Raises:
        UserError: The file is there and holds something else.
    """
    folder = folder_of(path)
    run = run_name(str(folder)) if (folder / 'config.yaml').is_file() else None
    # An exported file lies in the folder of any run, or in none.
    foreign = run is not None and Path(path).suffix == '.safetensors' and run_name(path) != run
    target = Path(out) if out else folder / ('results.json' if not foreign else f'{Path(path).stem}.results.json')
    append_results(target, entries)
    page = target.with_suffix('.html')
    pictures = [(str(grid), grid.read_bytes())] if grid is not None and grid.is_file() else []
    _page(entries, command, pictures).write(page)
    log(f'numbers  {target}\npage     {page}')
    if foreign:
        log(f'MLflow   not logged: {path} is of run {run_name(path)!r}, and lies in the folder of run {run!r}')
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


def _page(entries: Entries, command: str, grids: Sequence[tuple[str, bytes]]) -> Report:
    """Numbers first, then how they were measured; those with the same protocol stand together."""
    sources = ', '.join(dict.fromkeys(str(entry['source']) for entry in entries))
    runs = ', '.join(dict.fromkeys(str(entry['run']) for entry in entries if entry['run']))
    page = Report(f'Evaluation of {runs or sources}', f'Measured: {sources}')
    batches = ['' if entry['batch'] is None else f' at batch {entry["batch"]:,}' for entry in entries]
    page.tiles([(f'{e["value"]:.4g}', f'{e["metric"]}{batch}') for e, batch in zip(entries, batches, strict=True)])
    page.heading('Numbers').table(_HEAD, [_row(entry) for entry in entries])
    page.text(
        'A standard deviation is that over the parts of the samples that the number is the mean of; it is none of '
        'other samples or other seeds. A number in the name of a metric is how many samples there were: fewer than '
        '50,000, so it does not compare with published values.',
        soft=True,
    )
    if grids:
        page.heading('Samples').pictures(grids)
    page.heading('Protocol')
    for protocol, names in by_protocol((entry['metric'], entry['protocol']) for entry in entries):
        page.heading(', '.join(names), small=True).facts(protocol)
    digests = dict.fromkeys(entry['weights_digest'] for entry in entries if entry['weights_digest'])
    if digests:
        page.heading('Weights', small=True).text(', '.join(digests))
    return page.heading('How to get this page again').command(command)


def _row(entry: Mapping[str, Any]) -> list[str]:
    return [
        entry['metric'],
        f'{entry["value"]:.5g}',
        '' if entry['spread'] is None else f'{entry["spread"]:.5g}',
        str(entry['unit']),
        str(entry['run'] or 'not recorded'),
        'not recorded' if entry['batch'] is None else f'{entry["batch"]:,}',
        entry['created'],
    ]
