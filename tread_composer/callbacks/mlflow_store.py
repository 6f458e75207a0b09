"""The store behind a tracked run: where it is, whether it answers, which names it takes."""

import contextlib
import os
import re
import socket
import uuid
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import psutil

from tread_composer.core.errors import UserError
from tread_composer.core.masking import without_password
from tread_composer.io.locks import locked
from tread_composer.io.progress import to_stderr

__all__ = [
    'PATIENCE', 'accepted_name', 'ask', 'environment', 'host_of', 'in_turn', 'is_server', 'limit_patience', 'new_owner',
    'place_and_uri', 'still_writes', 'store_in_words',
]  # fmt: skip

PATIENCE = 30.0
"""Seconds that a server may take to answer a request."""


def place_and_uri(folder: str | None, tracking_uri: str | None) -> tuple[Path, str]:
    """The folder of a store of our own, and the address of the store; ``UserError`` for a plain folder as address."""
    place = Path(folder or 'runs').resolve()
    uri = tracking_uri or f'sqlite:///{(place / "mlflow.db").as_posix()}'
    if '://' not in uri and uri != 'databricks':
        raise UserError(
            f'tracking_uri: {uri!r} is a folder, which MLflow 3 no longer accepts as a store. Leave tracking_uri '
            f"out and set folder: {uri!r} (a sqlite file is made there), or give a server's address."
        )
    return place, uri


def in_turn(uri: str) -> contextlib.AbstractContextManager[None]:
    """One process at a time makes or migrates a database, which takes MLflow seconds; the others wait for it."""
    if not uri.startswith('sqlite:///'):
        return contextlib.nullcontext()
    database = Path(uri.removeprefix('sqlite:///'))
    database.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(database.parent, os.W_OK):  # then nobody makes or migrates it, and MLflow says what it lacks
        return contextlib.nullcontext()
    return locked(database.with_name(f'.{database.name}.lock'))


def ask(uri: str) -> None:
    """Ask the store for one experiment, with patience of half a minute; MLflow's own is many minutes."""
    from mlflow import MlflowClient

    if _speaks_http(uri):
        to_stderr(f'MLflow: asking {without_password(uri)}, for at most {PATIENCE:.0f} s')
    with environment(_patience()), store_in_words(uri):
        MlflowClient(uri).search_experiments(max_results=1)


@contextlib.contextmanager
def store_in_words(uri: str) -> Iterator[None]:
    """What a store answers is for the user to put right: a ``UserError`` in place of whatever it raises."""
    try:
        yield
    except (UserError, AssertionError):  # the latter is a fault of ours
        raise
    except Exception as error:  # of requests, sqlalchemy, sqlite or MLflow itself
        shown, reason = without_password(uri), without_password(str(error).strip().partition('\n')[0])[:400]
        remedy = 'Put a copy of it back, upgrade it (mlflow db upgrade), or take another (loggers.mlflow.folder).'
        if _speaks_http(uri):
            remedy = 'Is the server up, the address right, its password set (MLFLOW_TRACKING_USERNAME, _PASSWORD)?'
        text = f'loggers.mlflow: the store {shown} cannot be used: {reason}. {remedy}'
        raise UserError(f'{text} Without tracking: loggers.mlflow=null') from None


def limit_patience(uri: str) -> None:
    """Let no request of this process wait longer than ``ask`` does, unless the environment says how long it may.

    MLflow tries eight times, of two minutes each: training would stand still for 20 minutes, and the other ranks would
    give up waiting for the first. Set once: to change the environment while threads read it is not safe.
    """
    if _speaks_http(uri):
        for name, value in _patience().items():
            os.environ.setdefault(name, value)


def _patience() -> dict[str, str]:
    return {'MLFLOW_HTTP_REQUEST_MAX_RETRIES': '1', 'MLFLOW_HTTP_REQUEST_TIMEOUT': str(int(PATIENCE / 2))}


def accepted_name(name: str) -> str:
    """A name that MLflow takes for a parameter or a metric: ``name`` itself, or the nearest to it.

    It takes letters, digits and ``_-./ :``, no path that could be written shorter, and 250 letters. One name that it
    refuses would keep back all that is written in the same request.
    """
    parts = re.sub(r'[^\w\-./ :]', '_', name)[:250].split('/')
    return '/'.join(part for part in parts if part not in ('', '.', '..')) or '_'


def new_owner() -> str:
    """A name for this process as the writer of one run: its host, number and start, and a random part."""
    process = psutil.Process()
    return f'{socket.gethostname()}:{process.pid}:{process.create_time():.0f}:{uuid.uuid4().hex}'


def host_of(owner: str) -> str:
    """The host of a writer; empty for names from before they had one."""
    return owner.partition(':')[0] if ':' in owner else ''


def still_writes(owner: str) -> bool:
    """Whether a writer is another process that lives on this host; of other hosts nobody here can say."""
    if host_of(owner) != socket.gethostname():
        return False
    number, start = owner.split(':')[1:3]
    if int(number) == os.getpid():  # an earlier Trainer of this process
        return False
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(int(number))
        return process.status() != psutil.STATUS_ZOMBIE and f'{process.create_time():.0f}' == start
    return False


def _speaks_http(uri: str) -> bool:
    return uri.startswith(('http:', 'https:'))


def is_server(uri: str) -> bool:
    """Whether artifacts have a place of their own there."""
    return uri.startswith(('http:', 'https:', 'databricks'))


@contextlib.contextmanager
def environment(values: Mapping[str, str], without: Collection[str] = ()) -> Iterator[None]:
    """Variables for a while, and none of the names in ``without``."""
    saved = {name: os.environ.pop(name) for name in (*values, *without) if name in os.environ}
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]
        os.environ.update(saved)
