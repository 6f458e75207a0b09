"""The MLflow record of a run, beside its folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tread_composer.core.errors import UserError
from tread_composer.core.process import disable_mlflow_telemetry

__all__ = ['speeds', 'store_of']


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


def speeds(client: Any, run: Any) -> dict[int, float]:
    """Batches in a second, by step, as ``speed_monitor`` logged them."""
    logged = client.get_metric_history(run.info.run_id, 'throughput/batches_per_sec')
    # By when they were logged: of a step repeated after a resume the last counts
    return {point.step: point.value for point in sorted(logged, key=lambda point: point.timestamp)}
