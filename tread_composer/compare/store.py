"""The MLflow record of a run: found by name or id, or beside a run's folder."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tread_composer.core.errors import UserError
from tread_composer.core.process import disable_mlflow_telemetry

__all__ = ['MLFLOW', 'SPEED', 'artifacts', 'changes', 'find', 'speeds', 'store_of']

MLFLOW = 'mlflow:'
SPEED = 'throughput/batches_per_sec'


def find(name: str, uri: str, experiment: str | None = None) -> tuple[Any, Any]:
    """A client and the run of this id or name.

    Args:
        name: Id or name of the run.
        uri: Tracking uri of the store.
        experiment: Name of the only experiment to look in; of several runs the newest is taken then.

    Raises:
        UserError: There is no such store or run, or several runs have this name.
    """
    disable_mlflow_telemetry()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    file = Path(uri.removeprefix('sqlite:///')) if uri.startswith('sqlite:///') else None
    if file is not None and not file.is_file():
        raise UserError(f'{MLFLOW}{name}: there is no store {str(file)!r}; give another: {MLFLOW}{name}@sqlite:///PATH')
    if '"' in name or not name:
        raise UserError(f'{MLFLOW}{name}: is no name of a run')
    client = MlflowClient(uri)
    if re.fullmatch(r'[0-9a-f]{32}', name):
        try:
            return client, client.get_run(name)
        except MlflowException:
            pass  # a name may look like an id
    experiments = [each.experiment_id for each in client.search_experiments() if experiment in (None, each.name)]
    for tag in ('run_name', '`mlflow.runName`'):
        runs = client.search_runs(experiments, f'tags.{tag} = "{name}"') if experiments else []
        if len(runs) > 1 and experiment is None:
            ids = ', '.join(run.info.run_id for run in runs)
            raise UserError(f'{MLFLOW}{name}: {len(runs)} runs have this name in {uri}; give one of their ids: {ids}')
        if runs:
            return client, runs[0]
    raise UserError(f'{MLFLOW}{name}: no run of this id or name in {uri}')


def store_of(config: Mapping[str, Any], folder: Path) -> tuple[Any, Any]:
    """The client and the run that belong to a run's folder: the newest of this name, should it have been trained anew.

    Raises:
        UserError: The run has no MLflow logger, or there is no record of it; says where it was looked for.
    """
    settings = (config.get('loggers') or {}).get('mlflow')
    if settings is None:
        raise UserError('the run has no mlflow logger')
    if settings.get('tracking_uri'):
        uris = [settings['tracking_uri']]
    else:  # beside the folder first: stores and folders are moved and copied together
        places = dict.fromkeys([folder.resolve().parent, Path(settings.get('folder') or 'runs').resolve()])
        uris = [f'sqlite:///{place}/mlflow.db' for place in places]
    reasons = []
    for uri in uris:
        try:
            return find(config['run_name'], uri, settings['experiment_name'])
        except UserError as error:
            reasons.append(str(error))
    raise UserError('; '.join(reasons))


def speeds(client: Any, run: Any) -> dict[int, float]:
    """Batches in a second, by step, as ``speed_monitor`` logged them."""
    # By when they were logged
    points = sorted(client.get_metric_history(run.info.run_id, SPEED), key=lambda point: point.timestamp)
    return {point.step: point.value for point in points}  # a step repeated after a resume: the last


def changes(run: Any) -> list[str]:
    """What a resumed run was given anew, as notes."""
    changed = run.data.tags.get('tread_composer.changed_settings', '')
    return [f'resumed with changed settings: {changed}'] if changed else []


def artifacts(client: Any, run: Any, folder: Path, paths: Sequence[str]) -> None:
    """Copy those artifacts that the run has to their paths below ``folder``.

    Args:
        client: MLflow's.
        run: MLflow's.
        folder: Where they are copied to.
        paths: Paths within the run's artifacts, ``samples/latest.png`` for example.
    """
    from mlflow.environment_variables import MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR

    stored = {file.path for place in (None, 'samples') for file in client.list_artifacts(run.info.run_id, place)}
    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.set(False)  # a bar for each small file would bury the tables
    for path in paths:
        if path in stored:
            copy = Path(client.download_artifacts(run.info.run_id, path, str(folder)))
            (folder / path).parent.mkdir(exist_ok=True)
            copy.replace(folder / path)  # MLflow leaves out the folder of a file
