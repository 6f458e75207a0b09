import contextlib
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request

import psutil
import pytest
from composer.core import Callback
from composer.utils import dist
from mlflow import MlflowClient

from tests.callbacks.small import store, trainer
from tests.warm import exit_codes, on_ranks, rank_variables, start, wait_until
from tread_composer.callbacks.mlflow_run import MLflowRun
from tread_composer.core.errors import UserError


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """One store for all: making the tables takes seconds. Each test has an experiment of its own."""
    return tmp_path_factory.mktemp('runs')


def runs_of(folder, experiment):
    client = MlflowClient(store(folder))
    ids = [client.get_experiment_by_name(experiment).experiment_id]
    return client, client.search_runs(ids, order_by=['attributes.start_time ASC'])


def values_of(client, run, name='loss/train/total'):
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]


class Config(Callback):
    def __init__(self, tracking, flat):
        self.tracking, self.flat = tracking, flat

    def fit_start(self, state, logger):
        self.tracking.log_config(self.flat, ''.join(f'{key}: {value}\n' for key, value in self.flat.items()))

    def batch_end(self, state, logger):
        logger.log_metrics({'constant': 1.0})


def train(folder, experiment, duration='6ba', flat=None, **settings):
    tracking = MLflowRun(experiment, folder=str(folder))
    run = trainer(duration, loggers=[tracking], callbacks=[Config(tracking, flat or {'lr': 0.1})], **settings)
    run.fit()
    run.close()
    return tracking


def test_a_run_is_kept_whole_and_nothing_lands_beside_it(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flat = {'lr': 0.1, 'data.streams[0]': 'a', **{f'many.{i}': i for i in range(150)}, 'long': 'x' * 9000}
    tracking = train(folder, 'whole', flat=flat)
    client, (run,) = runs_of(folder, 'whole')
    assert run.info.status == 'FINISHED'
    assert run.info.run_name == 'painting'
    assert [step for step, _ in values_of(client, run)] == [0, 1, 2, 3, 4, 5]
    assert len(values_of(client, run, 'constant')) == 6  # equal values in succession
    assert {'lr', 'data.streams_0_', 'many.0', 'many.149', 'long'} <= set(run.data.params)
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ['config.yaml']
    assert run.info.artifact_uri.startswith((folder / 'mlflow_artifacts').resolve().as_uri())
    assert os.listdir(tmp_path) == []
    assert store(folder) in tracking.ui_command()


def test_a_resumed_run_is_the_same_run_and_may_have_other_settings(folder, tmp_path):
    train(folder, 'resumed', '3ba', save_folder=str(tmp_path), save_interval='3ba')
    latest = str(tmp_path / 'latest-rank0.pt')
    train(folder, 'resumed', '6ba', flat={'lr': 0.2, 'new': 1}, load_path=latest)
    client, (run,) = runs_of(folder, 'resumed')
    assert run.info.status == 'FINISHED'
    assert [step for step, _ in values_of(client, run)] == [0, 1, 2, 3, 4, 5]
    assert run.data.params['lr'] == '0.1'
    assert run.data.tags['tread_composer.changed_settings'] == 'lr: 0.1 -> 0.2'
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {'config.yaml', 'config_resumed_1.yaml'}


def test_training_from_the_start_does_not_write_into_an_earlier_run(folder):
    train(folder, 'twice', '2ba')
    train(folder, 'twice', '2ba', flat={'lr': 0.2})
    client, (first, second) = runs_of(folder, 'twice')
    assert [first.info.status, second.info.status] == ['FINISHED', 'FINISHED']
    assert len(values_of(client, first)) == len(values_of(client, second)) == 2
    assert [first.data.params['lr'], second.data.params['lr']] == ['0.1', '0.2']
    assert first.data.params.keys() == second.data.params.keys()  # those of the Trainer before loading too
    assert first.data.tags['tread_composer.superseded_by'] == second.info.run_id


def test_neither_the_name_nor_the_environment_lead_to_another_experiment(folder, monkeypatch):
    for name in ('DATABRICKS_TOKEN', 'MLFLOW_EXPERIMENT_ID', 'MLFLOW_RUN_ID', 'RUN_NAME'):
        monkeypatch.setenv(name, '123')
    monkeypatch.setenv('MLFLOW_TRACKING_URI', 'http://127.0.0.1:9')
    first, second = (train(folder, experiment, '2ba') for experiment in ('here', 'there'))
    assert first.run_id != second.run_id
    for experiment in ('here', 'there'):
        (run,) = runs_of(folder, experiment)[1]
        assert run.data.tags['run_name'] == 'painting'
    assert os.environ['DATABRICKS_TOKEN'] == '123'


def test_what_a_checkpoint_has_seen_is_in_the_store(folder, tmp_path):
    written = []

    class Look(Callback):
        def batch_start(self, state, logger):
            if int(state.timestamp.batch) == 3:
                client, (run,) = runs_of(folder, 'durable')
                written.extend(values_of(client, run))

    saving = {'save_folder': str(tmp_path), 'save_interval': '3ba'}
    run = trainer(loggers=[MLflowRun('durable', folder=str(folder))], callbacks=[Look()], **saving)
    run.fit()
    run.close()
    assert [step for step, _ in written] == [0, 1, 2]


def test_a_name_that_mlflow_refuses_is_cleaned_and_keeps_nothing_back(folder, caplog):
    named = {'val@256': 'val_256', 'a//b': 'a/b', '../up': 'up', 'x' * 300: 'x' * 250}

    class Named(Callback):
        def batch_start(self, state, logger):
            logger.log_metrics(dict.fromkeys(named, 1.0))

    tracking = MLflowRun('names', folder=str(folder))
    run = trainer('3ba', loggers=[tracking], callbacks=[Named()])
    run.fit()
    run.close()
    client, (kept,) = runs_of(folder, 'names')
    for name in ('loss/train/total', *named.values()):
        assert [step for step, _ in values_of(client, kept, name)] == [0, 1, 2], name
    assert caplog.text.count("'val@256'") == 1 and "'val_256'" in caplog.text


def test_a_locked_store_delays_the_values_and_does_not_end_training(folder):
    other = sqlite3.connect(folder / 'mlflow.db', isolation_level=None)

    class Lock(Callback):
        def fit_start(self, state, logger):
            other.execute('BEGIN EXCLUSIVE')

    uri = f'{store(folder)}?timeout=1'  # not 20 s, as MLflow waits for a lock else
    run = trainer('2ba', loggers=[MLflowRun('locked', tracking_uri=uri)], callbacks=[Lock()])
    run.fit()  # writes at its end, in vain
    other.execute('ROLLBACK')
    other.close()
    run.close()
    client, (kept,) = runs_of(folder, 'locked')
    assert [step for step, _ in values_of(client, kept)] == [0, 1]


def answers(address):
    try:
        return urllib.request.urlopen(f'{address}/health', timeout=5).status == 200
    except OSError:
        return False


@pytest.fixture
def server(folder, tmp_path):
    """A real server in front of the store; its process and its address."""
    port = rank_variables(1)[0]['MASTER_PORT']
    words = ['-m', 'mlflow', 'server', '--backend-store-uri', store(folder), '--port', port, '--workers', '1']
    words += ['--artifacts-destination', str(tmp_path / 'artifacts')]
    with open(tmp_path / 'server.log', 'w') as log:
        process = psutil.Popen([sys.executable, *words], stdout=log, stderr=subprocess.STDOUT)
    address = f'http://127.0.0.1:{port}'
    try:
        wait_until(lambda: process.poll() is not None or answers(address), pause=0.2)
        assert process.poll() is None, (tmp_path / 'server.log').read_text()
        yield process, address
    finally:
        for member in [*process.children(recursive=True), process]:
            member.kill()
        process.wait()


def train_while_the_server_is_silent(address, server, picture):
    processes = [psutil.Process(server), *psutil.Process(server).children(recursive=True)]

    class Silence(Callback):
        def fit_start(self, state, logger):
            for process in processes:
                process.suspend()
            os.environ['MLFLOW_HTTP_REQUEST_TIMEOUT'] = '1'  # for each try; until now a busy machine has had more
            with pytest.raises(UserError, match='cannot be used: '):
                tracking.log_config({'a': 1}, 'a: 1')

        def batch_end(self, state, logger):
            if int(state.timestamp.batch) == 3:
                tracking.log_file(picture)

    tracking = MLflowRun('silent', tracking_uri=address)
    run = trainer('6ba', loggers=[tracking], callbacks=[Silence()])
    run.fit()  # writes at its end, in vain
    for process in processes:
        process.resume()
    os.environ['MLFLOW_HTTP_REQUEST_TIMEOUT'] = '60'
    run.close()


def test_a_server_that_stops_to_answer_delays_the_values_and_does_not_hold_up_training(folder, tmp_path, server):
    """MLflow alone would try for 20 minutes at each write (docs/lab_notes.md)."""
    process, address = server
    picture = tmp_path / 'picture.png'
    picture.write_bytes(b'as good as any')
    began = time.monotonic()
    assert exit_codes([start(train_while_the_server_is_silent, address, process.pid, picture)]) == [0]
    assert time.monotonic() - began < 200
    client, (kept,) = runs_of(folder, 'silent')
    assert [step for step, _ in values_of(client, kept)] == [0, 1, 2, 3, 4, 5]
    assert kept.info.status == 'FINISHED'


def test_an_evaluation_alone_finishes_its_run_and_an_idle_one_has_failed(folder):
    run = trainer('2ba', loggers=[MLflowRun('only', folder=str(folder))], run_name='evaluated')
    run.eval(eval_dataloader=run.state.train_dataloader)
    run.close()
    run = trainer('2ba', loggers=[MLflowRun('only', folder=str(folder))], run_name='idle')
    run.close()
    tracking = MLflowRun('only', folder=str(folder))
    run = trainer('2ba', loggers=[tracking], run_name='told')
    tracking.finished()
    run.close()
    ends = {run.info.run_name: run.info.status for run in runs_of(folder, 'only')[1]}
    assert ends == {'evaluated': 'FINISHED', 'idle': 'FAILED', 'told': 'FINISHED'}


class End(Callback):
    def __init__(self, way):
        self.way = way

    def batch_end(self, state, logger):
        if int(state.timestamp.batch) != 3:
            return
        if self.way in ('exception', 'swallowed'):
            raise RuntimeError('as asked for')
        if self.way == 'everything':
            for child in psutil.Process().children(recursive=True):  # the watcher too, as a batch system does
                child.kill()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.way.startswith('SIG'):
            os.kill(os.getpid(), getattr(signal, self.way))

    def fit_end(self, state, logger):
        if self.way == 'exception at the end':
            raise RuntimeError('as asked for')


def train_and_end(folder, experiment, way, saving=None):
    """In a process of its own. Nothing is closed, but where an exception is swallowed: the process's end has to do."""
    settings = {'run_name': way, **({**saving, 'save_interval': '2ba'} if saving else {})}
    run = trainer(loggers=[MLflowRun(experiment, folder=str(folder))], callbacks=[End(way)], **settings)
    if way != 'swallowed':
        run.fit()
        return
    with contextlib.suppress(RuntimeError):
        run.fit()
    run.close()


def test_only_a_run_that_reached_its_end_is_finished(folder):
    codes = {'nothing': 0, 'exception': 1, 'exception at the end': 1, 'SIGTERM': 143, 'SIGKILL': -9, 'swallowed': 0}
    for way, code in codes.items():
        process = start(train_and_end, folder, 'deaths', way)
        process.join()
        assert process.exitcode == code, way

    def ends():
        return {run.info.run_name: run.info.status for run in runs_of(folder, 'deaths')[1]}

    wait_until(lambda: 'RUNNING' not in ends().values())  # until the watcher has imported MLflow
    assert ends() == {way: 'FINISHED' if way == 'nothing' else 'FAILED' for way in codes}


@pytest.mark.parametrize('goes_on', [False, True])
def test_the_next_start_says_that_a_run_died_together_with_its_watcher(folder, tmp_path, capsys, goes_on):
    experiment = f'died, goes on: {goes_on}'
    process = start(train_and_end, folder, experiment, 'everything', {'save_folder': str(tmp_path)})
    process.join()
    assert process.exitcode == -9
    (dead,) = runs_of(folder, experiment)[1]
    assert dead.info.status == 'RUNNING'
    latest = str(tmp_path / 'latest-rank0.pt') if goes_on else None
    train(folder, experiment, run_name='everything', load_path=latest)
    assert f'run everything ({dead.info.run_id}) still counts as RUNNING' in capsys.readouterr().err
    runs = runs_of(folder, experiment)[1]
    assert [run.info.status for run in runs] == (['FINISHED'] if goes_on else ['FAILED', 'FINISHED'])
    assert 'and its watcher with it' in runs[0].data.tags['tread_composer.end']


class Pause(Callback):
    def __init__(self, path):
        self.path = path

    def fit_start(self, state, logger):
        self.path.touch()
        wait_until(lambda: not self.path.exists())


def train_and_pause(folder, path):
    run = trainer('2ba', loggers=[MLflowRun('alive', folder=str(folder))], callbacks=[Pause(path)])
    run.fit()
    run.close()


def test_a_run_that_another_process_trains_is_not_taken_for_dead(folder, tmp_path):
    path = tmp_path / 'paused'
    process = start(train_and_pause, folder, path)
    assert wait_until(path.exists, process)
    with pytest.raises(UserError, match=rf'run_name: process {process.pid} on this host trains .*painting'):
        train(folder, 'alive')
    path.unlink()
    process.join()
    client, (run,) = runs_of(folder, 'alive')
    assert (process.exitcode, run.info.status) == (0, 'FINISHED')
    assert [step for step, _ in values_of(client, run)] == [0, 1]


def test_a_plain_folder_as_tracking_uri_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=re.escape("set folder: './mlruns'")):
        MLflowRun('x', tracking_uri='./mlruns')


def made_together(folder, moment):
    time.sleep(max(0.0, moment - time.time()))
    MLflowRun('together', folder=folder)


def test_two_runs_may_make_one_store_at_the_same_moment(tmp_path):
    """MLflow's migrations of the one met half of those of the other: duplicate column name."""
    moment = time.time() + 1
    assert exit_codes([start(made_together, str(tmp_path), moment) for _ in range(2)]) == [0, 0]
    assert MlflowClient(store(tmp_path)).get_experiment_by_name('together') is not None


def what_a_rank_hears(folder, damaged_before):
    def damage():
        if dist.get_global_rank() == 0:
            (folder / 'mlflow.db').write_bytes(b'no database' * 1000)
        dist.barrier()

    try:
        if damaged_before == 'store':
            damage()
        tracking = MLflowRun('ranks', folder=str(folder))
        if damaged_before == 'run':
            damage()
        trainer('2ba', loggers=[tracking], run_name='a "name"' if damaged_before == 'nothing' else 'name')
    except UserError as error:
        return str(error)


@pytest.mark.parametrize(
    ('damaged_before', 'text'),
    [('store', 'cannot be used: '), ('run', 'cannot be used: '), ('nothing', 'has a double quote')],
)
def test_what_the_first_rank_cannot_begin_is_refused_on_all(tmp_path, damaged_before, text):
    """It alone asks the store; the others would wait for it in the next collective."""
    first, second = on_ranks(2, what_a_rank_hears, tmp_path, damaged_before)
    assert first == second and text in first
