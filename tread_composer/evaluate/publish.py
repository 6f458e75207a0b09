"""Where measured numbers go: ``results.json``, and MLflow."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tread_composer.compare.runs import store_of
from tread_composer.core.errors import UserError
from tread_composer.evaluate.measuring import Log, folder_of, run_name
from tread_composer.metrics.protocol import append_results, series_name

__all__ = ['format_entries', 'publish']

Entries = Sequence[Mapping[str, Any]]


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
