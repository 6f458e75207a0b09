"""Tracking with MLflow: one run per run name, in a sqlite file unless told otherwise, without a network.

A layer over Composer's `MLFlowLogger`, whose defaults lose parameters, report a crash as FINISHED, follow environment
variables to other stores and write beside the working directory.

**What a run is bound to.** A run is found by its name within its experiment. It is continued only if a checkpoint was
loaded (the timestamp is beyond batch 0); training that starts at batch 0 under a name that is taken opens a new run,
and the earlier one is kept with the tag ``tread_composer.superseded_by``. So no history is written over another, and a
job that died before its first checkpoint can be started again by the same command.

**How the status comes about.** RUNNING from the start on. FINISHED when training reached ``Event.FIT_END`` (and the
evaluation behind it ended), or an evaluation or prediction without training ended, or `MLflowRun.finished` was called.
FAILED otherwise, whatever the reason: exception, SIGTERM, Ctrl-C. For ``kill -9`` see `run_watch`; where its watcher
was killed too, the next start of the run says so, and marks it with a tag.
"""

import logging
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated, Any

from annotated_types import MinLen
from composer.core import Event, State
from composer.loggers import Logger, MLFlowLogger
from composer.utils import dist

from tread_composer.callbacks import mlflow_store as store
from tread_composer.callbacks.run_watch import DEATH, END_TAG, OWNER_TAG, RunWatch
from tread_composer.core.errors import UserError
from tread_composer.core.masking import without_password
from tread_composer.core.process import disable_mlflow_telemetry
from tread_composer.io.files import check_writable
from tread_composer.io.progress import to_stderr
from tread_composer.io.ranks import agreed

__all__ = ['MLflowRun']

log = logging.getLogger(__name__)

_FLUSH_SECONDS = 5.0
_METRICS_A_REQUEST = 1000  # MLflow's limits
_PARAMS_A_REQUEST = 100
_PARAM_LENGTH = 500

# An evaluation that does not end is a failure, behind the training too; a run that only evaluates is finished.
_BEGINS = {Event.FIT_START: 'fit', Event.EVAL_BEFORE_ALL: 'eval'}
_ENDS = {
    Event.FIT_END: 'fit',
    Event.EVAL_AFTER_ALL: 'eval',
    Event.EVAL_STANDALONE_END: 'eval',
    Event.PREDICT_END: 'predict',
}

# Composer's logger lets each of these override what the YAML says; the first one even needs the Databricks SDK.
_REDIRECTIONS = ('DATABRICKS_TOKEN', 'MLFLOW_EXPERIMENT_ID', 'MLFLOW_RUN_ID', 'RUN_NAME')


class MLflowRun(MLFlowLogger):
    """Logs a run to MLflow, from rank 0.

    Metrics are collected and written every 5 s, before each checkpoint and at the end: a synchronous write of each
    would cost 4 ms per call (sqlite), and what a checkpoint has seen is never missing after a resume. A server that
    goes away during the run costs training a tenth of its time at most, and half a minute at a checkpoint: the values
    wait for it. ``MLFLOW_HTTP_REQUEST_MAX_RETRIES`` and ``MLFLOW_HTTP_REQUEST_TIMEOUT`` set another limit.

    Args:
        experiment_name: The MLflow experiment; made if it does not exist.
        folder: Where the store and the artifacts go: ``<folder>/mlflow.db``, ``<folder>/mlflow_artifacts``.
            Default ``runs``. Not used with a server.
        tracking_uri: Another store: ``http(s)://`` or a database. The variable ``MLFLOW_TRACKING_URI`` is not read, so
            that the YAML is the whole run; write ``tracking_uri: ${oc.env:MLFLOW_TRACKING_URI}`` to follow it.
        tags: Tags of the run.
        log_system_metrics: Also log CPU, memory, GPU and network use, once in 30 s.

    Raises:
        UserError: the tracking URI is a plain folder, or the experiment was deleted.
    """

    def __init__(
        self,
        experiment_name: Annotated[str, MinLen(1)],
        *,
        folder: str | None = None,
        tracking_uri: Annotated[str | None, MinLen(1)] = None,
        tags: dict[str, str] | None = None,
        log_system_metrics: bool = False,
    ) -> None:
        disable_mlflow_telemetry()  # in a Python script of the user's, this is the first import of MLflow
        self.folder, uri = store.place_and_uri(folder, tracking_uri)
        store.limit_patience(uri)
        agreed(lambda: self._prepare_store(experiment_name, uri, local=tracking_uri is None))
        with store.environment({}, without=() if uri.startswith('databricks') else _REDIRECTIONS):
            super().__init__(
                experiment_name,
                tags=dict(tags or {}),
                tracking_uri=uri,
                synchronous=True,
                resume=True,
                log_system_metrics=log_system_metrics,
                logging_buffer_seconds=None,
                log_duplicated_metric_every_n_steps=1,
            )
        self.tracking_uri = uri  # the base class sets it on rank 0 only
        self.run_id: str | None = None  # known from Event.INIT on, on rank 0
        self._watch: RunWatch | None = None
        self._client: Any = None
        self._earlier: Any = None  # the run of this name from before, as it was
        self._hyperparameters: dict[str, Any] = {}  # those of the Trainer come before it is known which run they are of
        self._pending: list[tuple[str, float, int, int]] = []
        self._metric_names: dict[str, str] = {}  # as logged: as MLflow takes it
        self._next_flush = time.monotonic() + _FLUSH_SECONDS
        self._begun: set[str] = set()  # what has not come to its end
        self._done = False

    @staticmethod
    def check_store(folder: str | None = None, tracking_uri: str | None = None, **others: object) -> str:
        """Whether the store answers, without making it; ``UserError`` if not. Takes the constructor's arguments."""
        disable_mlflow_telemetry()
        _, uri = store.place_and_uri(folder, tracking_uri)
        database = Path(uri.removeprefix('sqlite:///'))
        if uri.startswith('sqlite:') and not database.exists():
            check_writable(database)  # MLflow would try for minutes
            return f'{database}: will be made'
        with store.in_turn(uri):
            store.ask(uri)
        return f'{without_password(uri)}: answers'

    def _prepare_store(self, experiment_name: str, uri: str, local: bool) -> None:
        """Make store and experiment if they do not exist."""
        if dist.get_global_rank() != 0:
            return
        with store.in_turn(uri), store.store_in_words(uri):
            self._make_experiment(experiment_name, uri, local)

    def _make_experiment(self, experiment_name: str, uri: str, local: bool) -> None:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        if local:
            self.folder.mkdir(parents=True, exist_ok=True)
            if os.environ.get('MLFLOW_TRACKING_URI') not in (None, uri):
                log.warning('MLFLOW_TRACKING_URI is set but not used; set tracking_uri to use it. Logging to %s', uri)
        if not local or (self.folder / 'mlflow.db').exists():
            store.ask(uri)
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name(experiment_name)
        if experiment is None:
            # A database leaves artifacts to the client, which would write to ./mlruns; a server has its own place.
            location = None if store.is_server(uri) else (self.folder / 'mlflow_artifacts').as_uri()
            try:
                client.create_experiment(experiment_name, artifact_location=location)
            except MlflowException:
                if client.get_experiment_by_name(experiment_name) is None:  # else another run was faster
                    raise
        elif experiment.lifecycle_stage == 'deleted':
            raise UserError(
                f'experiment_name: {experiment_name!r} was deleted in {uri}. Choose another name, or restore it with '
                f'`mlflow experiments restore --experiment-id {experiment.experiment_id}`.'
            )

    def ui_command(self) -> str:
        """The command that shows the store in a browser; for a server, its address."""
        if store.is_server(self.tracking_uri):
            return self.tracking_uri
        beside = Path(sys.executable).parent / 'mlflow'
        program = 'mlflow' if shutil.which('mlflow') or not beside.exists() else beside
        return f"{program} ui --backend-store-uri '{self.tracking_uri}'"

    def summary(self, state: State) -> list[tuple[str, str]]:
        """How to look at the run."""
        return [('curves and pictures', f'{self.ui_command()}   (then open http://127.0.0.1:5000)')]

    # --- beginning ---

    def init(self, state: State, logger: Logger) -> None:
        """Find the run of this name in the experiment, or make it."""
        agreed(lambda: self._find_earlier(state.run_name))
        self._begin(state, logger)

    def _find_earlier(self, run_name: str) -> None:
        if dist.get_global_rank() != 0:
            return
        from mlflow import MlflowClient

        if '"' in run_name:
            raise UserError(f"run_name: {run_name!r} has a double quote, and MLflow's search for it cannot hold one")
        with store.store_in_words(self.tracking_uri):
            client = MlflowClient(self.tracking_uri)
            experiment = client.get_experiment_by_name(str(self.experiment_name))
            assert experiment is not None  # made by the constructor
            runs = client.search_runs([experiment.experiment_id], f'tags.run_name = "{run_name}"')
            self._earlier = runs[0].info if runs else None
            if self._earlier is not None and self._earlier.status == 'RUNNING':
                owner = runs[0].data.tags.get(OWNER_TAG, '')
                if store.still_writes(owner):
                    raise UserError(
                        f'run_name: process {owner.split(":")[1]} on this host trains {run_name!r} and writes to the '
                        f'same run of MLflow ({self._earlier.run_id}). Take another run_name, or end that process'
                    )
                client.set_tag(self._earlier.run_id, END_TAG, f'{DEATH}, and its watcher with it')
                place = f' on {store.host_of(owner)}' if store.host_of(owner) else ''
                to_stderr(
                    f'MLflow: run {run_name} ({self._earlier.run_id}) still counts as RUNNING: its process{place} and '
                    f'the watcher beside it died without a word (a job or a node that was killed?)'
                )

    def after_load(self, state: State, logger: Logger) -> None:
        """Now it is known whether training goes on or begins: a beginning gets a run of its own."""
        is_taken = dist.all_gather_object(self._earlier is not None)[0]
        if is_taken and int(state.timestamp.batch) == 0:
            agreed(lambda: self._leave_earlier_run(state.run_name))
            self._begin(state, logger)
            agreed(self._supersede)
        super().after_load(state, logger)

    def _begin(self, state: State, logger: Logger) -> None:
        owner = store.new_owner()
        self.tags[OWNER_TAG] = owner
        self._refusal: UserError | None = None
        with store.environment({}, without=_REDIRECTIONS):
            super().init(state, logger)
        agreed(lambda: self._take_up(owner))

    def _start_mlflow_run(self, state: State) -> None:
        # Called on rank 0, between collectives of the base class that all ranks have to come to: refused after them.
        try:
            with store.store_in_words(self.tracking_uri):
                super()._start_mlflow_run(state)
        except UserError as error:
            self._refusal = error

    def _take_up(self, owner: str) -> None:
        if self._refusal is not None:
            raise self._refusal
        if dist.get_global_rank() == 0:
            import mlflow

            self._client = mlflow.MlflowClient(self.tracking_uri)
            active = mlflow.active_run()
            assert active is not None
            self.run_id = active.info.run_id
            self._watch = RunWatch(self.tracking_uri, self.run_id, owner)

    def _leave_earlier_run(self, run_name: str) -> None:
        """Give the earlier run back as it was, under a tag by which it is not found again."""
        if self._earlier is None:  # on the other ranks
            return
        import mlflow

        assert self._watch is not None
        with store.store_in_words(self.tracking_uri):
            self._client.set_tag(self._earlier.run_id, 'run_name', f'{run_name} (superseded)')
            # A run that still counted as RUNNING had died together with its watcher.
            mlflow.end_run('FAILED' if self._earlier.status == 'RUNNING' else self._earlier.status)
        self._watch.finished()

    def _supersede(self) -> None:
        if self._earlier is not None:
            with store.store_in_words(self.tracking_uri):
                self._log_new_params(self._hyperparameters)
                self._client.set_tag(self._earlier.run_id, 'tread_composer.superseded_by', self.run_id)

    # --- what is logged ---

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Collect ``metrics``; every value is kept, equal successive ones too."""
        if dist.get_global_rank() != 0:
            return
        milliseconds = int(time.time() * 1000)
        for name, value in metrics.items():
            self._pending.append((self._metric_name(name), float(value), milliseconds, step or 0))
        if time.monotonic() > self._next_flush:
            self.flush()

    def _metric_name(self, name: str) -> str:
        if name not in self._metric_names:
            self._metric_names[name] = accepted = store.accepted_name(name)
            if accepted != name:
                log.warning('MLflow takes no metric of the name %r; it is %r there', name, accepted)
        return self._metric_names[name]

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        """Log what is new. MLflow refuses another value for a parameter, which would end a resumed run."""
        if self._client is not None:
            self._hyperparameters |= hyperparameters
            with store.store_in_words(self.tracking_uri):
                self._log_new_params(hyperparameters)

    def log_config(self, flat: dict[str, Any], yaml_text: str) -> None:
        """Log the resolved config: ``flat`` as parameters, ``yaml_text`` as the artifact ``config.yaml``.

        Where the run is continued with other values, the parameters keep the first ones; the tag
        ``tread_composer.changed_settings`` names the changes, and the artifact is ``config_resumed_<n>.yaml``.
        """
        if self._client is not None:
            with store.store_in_words(self.tracking_uri):
                self._log_config(flat, yaml_text)

    def _log_config(self, flat: dict[str, Any], yaml_text: str) -> None:
        changed = self._log_new_params(flat)
        stored = [file.path for file in self._client.list_artifacts(self.run_id) if file.path.startswith('config')]
        if not stored:
            self._client.log_text(self.run_id, yaml_text, 'config.yaml')
        elif changed:
            self._client.log_text(self.run_id, yaml_text, f'config_resumed_{len(stored)}.yaml')
            self._client.set_tag(self.run_id, 'tread_composer.changed_settings', '; '.join(changed)[:5000])

    def _log_new_params(self, params: dict[str, Any]) -> list[str]:
        """Log the parameters that the run does not have; returns ``name: old -> new`` for those that differ."""
        from mlflow.entities import Param

        stored = self._client.get_run(self.run_id).data.params
        named = {store.accepted_name(name): str(value)[:_PARAM_LENGTH] for name, value in params.items()}
        new = [Param(name, value) for name, value in named.items() if name not in stored]
        for start in range(0, len(new), _PARAMS_A_REQUEST):
            self._client.log_batch(self.run_id, params=new[start : start + _PARAMS_A_REQUEST])
        changed = {name: value for name, value in named.items() if stored.get(name, value) != value}
        return [f'{name}: {stored[name]} -> {value}' for name, value in changed.items()]

    def log_file(self, path: str | Path, artifact_folder: str | None = None) -> None:
        """Copy a file to the run's artifacts, under its own name; replaces one of that name.

        A store that cannot take it does not end training: the file stays where it is, and a line says so.
        """
        if self._client is None:
            return
        try:
            self._client.log_artifact(self.run_id, str(path), artifact_folder)
        except Exception as error:
            log.warning('MLflow could not be given %s: %s', path, error)

    def flush(self) -> None:
        """Write the collected metrics. A store that cannot be written keeps them waiting and does not end training."""
        began = time.monotonic()
        self._next_flush = began + _FLUSH_SECONDS
        if self._client is None or not self._pending:
            return
        from mlflow.entities import Metric

        try:
            while self._pending:
                metrics = [Metric(*entry) for entry in self._pending[:_METRICS_A_REQUEST]]
                self._client.log_batch(self.run_id, metrics=metrics)
                del self._pending[: len(metrics)]
        except Exception as error:  # a server that is away, a locked or full disk: no reason to stop training
            log.warning('MLflow could not be written, %d values wait for the next try: %s', len(self._pending), error)
        # Training waits meanwhile: for a server that does not answer, a tenth of its time at most.
        self._next_flush += 10 * (time.monotonic() - began)

    # --- end ---

    def state_dict(self) -> dict[str, Any]:
        """Nothing of its own; but a checkpoint is being written, so what it has seen must be on disk."""
        self.flush()
        return {}

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        """Keep account of what has begun and what came to its end."""
        super().run_event(event, state, logger)
        if event in _BEGINS:
            self._begun.add(_BEGINS[event])
        if event in _ENDS:
            self._begun.discard(_ENDS[event])
            self._done = True
            self.flush()

    def finished(self) -> None:
        """Training did all that it should: the run will be FINISHED when the Trainer closes."""
        self._begun.clear()
        self._done = True

    def post_close(self) -> None:
        """Write what is left and set the status. Replaces the base class's, which sets FINISHED after a crash too."""
        if self._client is None:
            return
        import mlflow

        for pause in (1, 4, 0):
            self.flush()
            if self._pending:
                time.sleep(pause)
        if self._pending:
            log.error('MLflow could not be written: %d values are lost', len(self._pending))
        mlflow.end_run('FINISHED' if self._done and not self._begun else 'FAILED')
        if self._watch is not None:
            self._watch.finished()
        self._client = None
