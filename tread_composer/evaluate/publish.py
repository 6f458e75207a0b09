"""Where measured numbers go: ``results.json``, a page to look at, MLflow."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tread_composer.config import restore_config
from tread_composer.core.errors import UserError
from tread_composer.core.process import disable_mlflow_telemetry
from tread_composer.evaluate.page import evaluation_page
from tread_composer.evaluate.samples import folder_of, run_name
from tread_composer.io.files import read_json
from tread_composer.metrics.protocol import append_results, load_results, series_name

__all__ = ['format_entries', 'log_to_mlflow', 'publish']

Log = Callable[[str], None]


def publish(
    entries: Sequence[Mapping[str, Any]],
    path: str,
    command: str,
    *,
    grid: Path | None = None,
    out: str | None = None,
    log: Log = print,
) -> None:
    """Write the numbers to ``results.json``, to a page beside it, and to MLflow where the run has it.

    Those of an exported file are credited to the run that it says it is of, not to that of the folder it lies in.

    Args:
        entries: Of ``evaluate_samples`` or ``evaluate_model``.
        path: What was measured.
        command: How to get the page again.
        grid: A picture for the page, if it is there.
        out: The file of numbers. (Default: ``results.json`` in the folder of the run or of the samples.)
        log: Gets the lines for people.

    Raises:
        UserError: The file is there and holds something else.
    """
    folder = folder_of(path)
    run = _run_of(folder)
    # An exported file lies in the folder of any run, or in none.
    foreign = run is not None and Path(path).suffix == '.safetensors' and run_name(path) != run
    target = Path(out) if out else folder / ('results.json' if not foreign else f'{Path(path).stem}.results.json')
    if out is None and _is_of_digits_quality(target):
        target = folder / 'evaluation.json'
        log(f'{folder / "results.json"} is that of digits_quality, so the numbers go to {target.name}')
    append_results(target, entries)
    page = target.with_suffix('.html')
    pictures = [(str(grid), grid.read_bytes())] if grid is not None and grid.is_file() else []
    evaluation_page(entries, command, pictures).write(page)
    log(f'numbers  {target}\npage     {page}')
    if foreign:
        log(f'MLflow   not logged: {path} is of run {run_name(path)!r}, and lies in the folder of run {run!r}')
    elif run is not None:
        log(f'MLflow   {log_to_mlflow(folder, entries, target)}')


def _run_of(folder: Path) -> str | None:
    return run_name(str(folder)) if (folder / 'config.yaml').is_file() else None


def _is_of_digits_quality(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        load_results(path)
    except UserError:
        content = read_json(path)
        return isinstance(content, dict) and 'recognised' in content
    return False


def format_entries(entries: Sequence[Mapping[str, Any]]) -> str:
    """The numbers, one a line."""
    width = max(len(entry['metric']) for entry in entries)
    spreads = ['' if entry['spread'] is None else f' ± {entry["spread"]:.4g} over its parts' for entry in entries]
    pairs = zip(entries, spreads, strict=True)
    return '\n'.join(f'{entry["metric"]:<{width}}  {entry["value"]:.6g}{spread}' for entry, spread in pairs)


def log_to_mlflow(folder: str | Path, entries: Sequence[Mapping[str, Any]], results: Path) -> str:
    """Add the numbers to the MLflow run of a run's folder, at the batch that was measured; says in words what it did.

    The series is that of the protocol (``metrics.protocol.series_name``), as it is for the callback.

    Args:
        folder: Of the run, with its ``config.yaml``.
        entries: The numbers.
        results: Their file, which becomes an artifact.
    """
    config = restore_config(Path(folder) / 'config.yaml')
    logger = config.loggers.get('mlflow')
    if logger is None:
        return 'the run logs to none'
    disable_mlflow_telemetry()
    from mlflow import MlflowClient

    tracking_uri = logger.kwargs.get('tracking_uri')
    places = dict.fromkeys([Path(folder).resolve().parent, Path(logger.kwargs.get('folder') or 'runs').resolve()])
    databases = [place / 'mlflow.db' for place in places if (place / 'mlflow.db').is_file()]
    stores = [tracking_uri] if tracking_uri else [f'sqlite:///{file}' for file in databases]
    for uri in stores:
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name(logger.kwargs['experiment_name'])
        query = f'tags.run_name = "{config.run_name}"'
        runs = client.search_runs([experiment.experiment_id], query) if experiment is not None else []
        if not runs:
            continue
        run_id = runs[0].info.run_id
        dated = [entry for entry in entries if entry['batch'] is not None]
        for entry in dated:
            name = series_name(entry['metric'], entry['protocol'])
            client.log_metric(run_id, name, entry['value'], step=entry['batch'])
        client.log_artifact(run_id, str(results))
        note = (
            '' if len(dated) == len(entries) else ', without the curves: nobody has said after how many batches it is'
        )
        return f'run {config.run_name} in {uri}{note}'
    looked = stores or [f'{place}/mlflow.db' for place in places]
    return f'not logged: there is no run {config.run_name!r} in {", ".join(looked)}'
