"""``doctor`` says what ``train`` would stumble over, and writes nothing."""

import contextlib
import functools
import http.server
import os
import resource
import socket
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs import ROOT, SMALL, YAMLS, command, environment, make_store, needs_namespaces
from tests.warm import exit_codes, own_namespaces, start, start_program
from tread_composer.core.errors import UserError
from tread_composer.data.digits import prepare_digits
from tread_composer.io.files import check_writable

DIGITS = str(YAMLS / 'digits_tread.yaml')


def lines(text: str) -> dict[str, tuple[str, str]]:
    """Name of a check -> its verdict and what is said of it."""
    rows = [line for line in text.splitlines() if line.startswith(('ok ', 'FAULT '))]
    return {line[7:28].strip(): (line[:7].strip(), line[29:]) for line in rows}


def test_a_machine_that_can_train_is_said_to_and_nothing_is_written(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    rows = lines(cli('doctor', DIGITS).out)
    assert {verdict for verdict, _ in rows.values()} == {'ok'}
    asked = {'versions', 'torch and GPU', 'shared memory', 'open files', 'rendezvous', 'Inception', 'data'}
    assert asked | {'run folder', 'free disk', 'loggers.mlflow'} <= set(rows)
    assert not list(tmp_path.iterdir())
    assert 'data' not in lines(cli('doctor').out)  # the machine alone


def test_what_train_refuses_of_the_data_is_a_fault_here_too(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    for words, said in (
        ('global_train_batch_size=1700', 'samples of the training data'),
        ('model.patch_size=3', 'model: '),
    ):
        verdict, text = lines(cli('doctor', DIGITS, words, code=2).out)['data']
        assert verdict == 'FAULT' and said in text
        assert text.splitlines()[0] in cli.refusal('train', DIGITS, words)
        assert said in cli('plan', DIGITS, words, code=2).err


def test_shared_memory_counts_the_workers_that_a_run_has_without_a_setting(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    prepare_digits('digits')
    data = 'data={name: latents, local: digits, eval_split: eval, num_workers: %s}'

    def needed(workers: str) -> str:
        text = lines(
            cli('doctor', DIGITS, data % workers, 'global_train_batch_size=1400', 'callbacks.digits_quality=null').out
        )['shared memory'][1]
        return text.partition('about ')[2]

    assert needed('null') == needed('2') != needed('0')


def refused_without_leave(folder: Path) -> None:
    if os.getuid() == 0:
        os.setuid(65534)  # modes do not bind root
    with pytest.raises(UserError, match=r'no file can be made in .*: Permission denied\. Choose a folder of yours'):
        check_writable(folder)


def test_a_folder_below_one_that_may_not_be_searched_is_refused_in_words(tmp_path):
    closed = tmp_path / 'closed'
    closed.mkdir(mode=0)
    assert exit_codes([start(refused_without_leave, closed / 'runs' / 'a')]) == [0]


def become_faulty(script: str, open_files: int = 4096) -> None:
    own_namespaces(script, network=True)
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))


@needs_namespaces
@pytest.mark.parametrize(
    ('fault', 'name', 'cure'),
    [
        (('mount -t tmpfs -o size=2m tmpfs /dev/shm; ip link set lo up',), 'shared memory', '--shm-size='),
        (('mount -t tmpfs -o ro tmpfs /dev/shm; ip link set lo up',), 'shared memory', 'mount it writable'),
        (('true',), 'loopback', 'ip link set lo up'),
        (('ip link set lo up', 512), 'open files', 'ulimit -n 65536'),
    ],
)
def test_faults_of_a_machine_are_named_with_their_cure(tmp_path, fault, name, cure):
    outputs, before = [tmp_path / 'out', tmp_path / 'err'], functools.partial(become_faulty, *fault)
    process = start_program(['-m', 'tread_composer', 'doctor'], ROOT, environment(), outputs, before)
    process.join()
    verdict, text = lines(outputs[0].read_text())[name]
    assert (process.exitcode, verdict) == (2, 'FAULT') and cure in text
    assert '1 fault, each with its cure above' in outputs[1].read_text()


@needs_namespaces
@pytest.mark.parametrize(('folder', 'size'), [('data', '100k'), ('runs', '1500k')])
def test_a_disk_that_fills_ends_a_run_in_words(tmp_path, folder, size):
    """Checkpoints have tests of their own; here it is the digits, or MLflow's store and the pictures."""
    (tmp_path / folder).mkdir()
    outputs = [tmp_path / 'out', tmp_path / 'err']
    before = functools.partial(own_namespaces, f'mount -t tmpfs -o size={size} tmpfs {tmp_path / folder}')
    grid = 'callbacks.sample_grid={interval: 1ba, num_steps: 2, weights: raw}'
    words = command(DIGITS, *SMALL, grid, 'save_interval=1ba', 'max_duration=3ba')
    process = start_program(words[1:], tmp_path, environment(), outputs, before)
    process.join()
    text = outputs[1].read_text()
    assert process.exitcode == 2 and 'Traceback' not in text and 'make room' in text, text


def test_a_port_that_is_taken(monkeypatch, cli):
    with socket.socket() as taken:
        taken.bind(('0.0.0.0', 0))
        taken.listen()
        monkeypatch.setenv('MASTER_PORT', str(taken.getsockname()[1]))
        verdict, text = lines(cli('doctor', code=2).out)['rendezvous']
    assert verdict == 'FAULT' and '--master_port' in text


def damaged(store: Path) -> None:
    store.write_bytes(b'no database' * 1000)


def of_another_version(store: Path) -> None:
    make_store(store.parent)
    with contextlib.closing(sqlite3.connect(store)) as connection:
        connection.execute("update alembic_version set version_num = 'ffffffffffff'")
        connection.commit()


@pytest.mark.parametrize('spoil', [damaged, of_another_version])
def test_a_store_that_cannot_be_used_stops_doctor_and_train_alike(tmp_path, monkeypatch, cli, spoil):
    monkeypatch.chdir(tmp_path)
    store = tmp_path / 'runs' / 'mlflow.db'
    store.parent.mkdir()
    spoil(store)
    before = store.read_bytes()
    verdict, text = lines(cli('doctor', DIGITS, code=2).out)['loggers.mlflow']
    assert verdict == 'FAULT' and 'mlflow.db cannot be used' in text and 'loggers.mlflow=null' in text
    refused = cli.refusal('train', DIGITS, 'max_duration=1ba')
    assert text.splitlines()[0][:60] in refused and 'Traceback' not in refused
    assert store.read_bytes() == before


@contextlib.contextmanager
def server(answer: int | None) -> Iterator[int]:
    """A tracking server that answers every request with a code, or accepts connections and never answers."""
    if answer is None:
        with socket.socket() as listener:
            listener.bind(('127.0.0.1', 0))
            listener.listen()
            yield listener.getsockname()[1]
        return

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_error(answer)

        do_GET = do_POST

        def log_message(self, *args: object) -> None:
            pass

    service = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=service.serve_forever, daemon=True).start()
    try:
        yield service.server_address[1]
    finally:
        service.shutdown()


@pytest.mark.parametrize('answer', [403, None])
def test_a_tracking_server_that_refuses_or_never_answers(tmp_path, monkeypatch, cli, answer):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('tread_composer.callbacks.mlflow_store.PATIENCE', 2.0)
    with server(answer) as port:
        uri = f'http://me:pass-word@127.0.0.1:{port}'
        out, err = cli('doctor', DIGITS, f'loggers.mlflow.tracking_uri={uri}', code=2)
    verdict, text = lines(out)['loggers.mlflow']
    assert verdict == 'FAULT' and f'http://me:***@127.0.0.1:{port} cannot be used' in text
    assert 'for at most 2 s' in err and 'pass-word' not in out + err
