"""Units of work on a Ray cluster, by workers that may be lost: each unit is finished whole or not at all.

For work that leaves whole files in a folder that all machines share, so that a unit that was begun twice is as good as
one. Ray starts a process for each GPU; the unit of one that dies, or whose machine is lost, is made by another.
"""

import contextlib
import logging
import math
import os
import socket
import sys
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tread_composer import __version__
from tread_composer.core.errors import UserError, first_line
from tread_composer.core.launch import world_size

__all__ = ['check_ray', 'on_ray']

Unit = TypeVar('Unit', bound=Hashable)
Result = TypeVar('Result')
Log = Callable[[str], None]

_ATTEMPTS = 3  # of one unit: what ends three workers would end all
_POLL_SECONDS, _REPORT_SECONDS = 1.0, 30.0
_START_SECONDS = 900.0  # a cluster that grows on demand takes minutes for a machine


def check_ray() -> None:
    """Refuse what can be known before any work.

    Raises:
        UserError: The package is not installed, or a launcher has started several of these processes.
    """
    if world_size() > 1:
        raise UserError('--engine ray: start it once, without composer, torchrun or srun; Ray starts the workers')
    # Ray reports home otherwise, from its import on.
    os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')
    try:
        import ray  # noqa: F401
    except ImportError:
        raise UserError("--engine ray: ray is not installed: pip install 'tread-composer[ray]'") from None


def on_ray(
    units: Sequence[Unit],
    make_worker: Callable[[int], Callable[[Unit], Result]],
    done: Callable[[Unit, Result], None],
    *,
    scratch: Path,
    workers: int | None,
    device: str | None,
    log: Log,
) -> None:
    """Do all units on the cluster that this program is connected to, that ``RAY_ADDRESS`` names, or on this machine.

    Args:
        units: What is to be done, in the order in which it is begun.
        make_worker: Called once in each worker with the number of workers on its machine; returns what does a unit.
            It, units and results travel as pickles.
        done: Called here for each finished unit.
        scratch: A folder of the output, which every machine must see.
        workers: How many; by default one for each GPU, or for each machine where there is none (or ``'cpu'``).
        device: ``'cuda'``, ``'cpu'`` or None for GPUs if there are any.

    Raises:
        UserError: The cluster cannot do it, a unit refuses its input, or one was lost with three workers.
    """
    with _connected() as ray, contextlib.ExitStack() as stack:
        token = scratch / f'.shared-{uuid.uuid4().hex}'
        token.touch()
        stack.callback(token.unlink, missing_ok=True)
        share = _share([node['Resources'] for node in ray.nodes() if node['Alive']], workers, device)
        log(f'Ray: {share.workers} workers with {"a GPU and " if share.gpus else ""}{share.cpus:g} cores each')
        origin = _Origin(os.getcwd(), token, _versions(), share.per_machine)
        _Pool(ray, share, ray.put(make_worker), origin, log).run(units, done)


@dataclass(frozen=True)
class _Origin:
    """What a worker needs of the process that asks: paths mean the same, and so does the code."""

    folder: str
    token: Path
    versions: Mapping[str, str]
    workers_here: int


class _Worker:
    """A process of Ray's."""

    def begin(self, make_worker: Callable[[int], Callable[[Any], Any]], origin: _Origin) -> None:
        """Stand where the command was started; ``UserError`` if this machine sees other files or has other versions."""
        host = socket.gethostname()
        try:
            os.chdir(origin.folder)
        except OSError as error:
            raise UserError(f'host {host}: {error}; start in a folder that all machines share') from None
        if not origin.token.exists():
            raise UserError(
                f'host {host} does not see what is written in {origin.token.parent}. All machines work in one folder: '
                f'give one on a disk that they share'
            )
        for name, version in _versions().items():
            if version != origin.versions[name]:
                raise UserError(f'{name} is {version} on host {host} and {origin.versions[name]} where it was started')
        self._work = make_worker(origin.workers_here)

    def do(self, unit: Any) -> Any:
        return self._work(unit)


@dataclass(frozen=True)
class _Share:
    """What each worker gets of the cluster."""

    workers: int
    per_machine: int  # workers of one machine, at the most
    cpus: float
    gpus: int


def _share(machines: Sequence[Mapping[str, float]], workers: int | None, device: str | None) -> _Share:
    """By the resources of all machines; refused if they are too few."""
    gpus = sum(int(resources.get('GPU', 0)) for resources in machines)
    if device == 'cuda' and not gpus:
        raise UserError('--device cuda: the Ray cluster has no GPU')
    if gpus and device != 'cpu':
        machines = [resources for resources in machines if resources.get('GPU', 0) >= 1]
        if (workers or 0) > gpus:
            raise UserError(f'--ray-workers {workers}: the Ray cluster has {gpus} GPUs; each worker takes one')
        per_machine = int(max(resources['GPU'] for resources in machines))
        cores = min(resources.get('CPU', 0) / resources['GPU'] for resources in machines)
        return _Share(workers or gpus, per_machine, math.floor(cores) if cores >= 1 else 0, 1)
    machines = [resources for resources in machines if resources.get('CPU', 0) >= 1]
    workers = workers or len(machines)
    per_machine = math.ceil(workers / max(len(machines), 1))
    cores = math.floor(min((resources['CPU'] for resources in machines), default=0) / max(per_machine, 1))
    if not cores:
        raise UserError(f'--ray-workers {workers}: more than the cores of the Ray cluster')
    return _Share(workers, per_machine, cores, 0)


class _Pool:
    """Workers and what each of them does now."""

    def __init__(self, ray: Any, share: _Share, make_worker: Any, origin: _Origin, log: Log) -> None:
        self._ray, self._share, self._make_worker, self._origin, self._log = ray, share, make_worker, origin, log
        # Ray itself retries nothing: it does not know which units are finished.
        resources = {'num_cpus': share.cpus, 'num_gpus': share.gpus, 'scheduling_strategy': 'SPREAD'}
        self._remote = ray.remote(max_restarts=0, max_task_retries=0, **resources)(_Worker)
        self._busy: dict[Any, tuple[Any, Any]] = {}  # what is awaited -> worker, and its unit or None while it begins
        self._queue: deque[Any] = deque()
        self._losses: Counter[Any] = Counter()
        self._last_work = self._last_report = time.monotonic()

    def run(self, units: Sequence[Unit], done: Callable[[Unit, Any], None]) -> None:
        """Return when all are done."""
        self._queue.extend(units)
        for _ in range(min(self._share.workers, len(units))):
            self._start()
        while self._queue or self._has_work():
            ready, _ = self._ray.wait(list(self._busy), timeout=_POLL_SECONDS)
            for future in ready:
                self._take(future, done)
            self._watch()

    def _has_work(self) -> bool:
        return any(unit is not None for _, unit in self._busy.values())

    def _start(self) -> None:
        worker = self._remote.remote()
        self._busy[worker.begin.remote(self._make_worker, self._origin)] = (worker, None)

    def _take(self, future: Any, done: Callable[[Any, Any], None]) -> None:
        errors = self._ray.exceptions
        worker, unit = self._busy.pop(future)
        try:
            result = self._ray.get(future)
        except errors.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from None
            raise
        except errors.RayError as error:
            self._replace(worker, unit, error)
            return
        if unit is not None:
            done(unit, result)
        if self._queue:
            unit = self._queue.popleft()
            self._busy[worker.do.remote(unit)] = (worker, unit)
        else:
            self._ray.kill(worker)

    def _replace(self, worker: Any, unit: Any, error: Exception) -> None:
        """Another worker, and what the lost one had in hand goes first."""
        self._losses[unit] += 1
        name = 'while it started' if unit is None else f'with part {" ".join(map(str, unit))}'
        if self._losses[unit] == _ATTEMPTS * (self._share.workers if unit is None else 1):
            raise UserError(
                f'{self._losses[unit]} workers of Ray were lost {name}, the last one: {error}\nIs there too little '
                f'memory? Finished parts are kept: run the same command again'
            )
        self._log(f'a worker of Ray was lost {name} ({first_line(error)}); another one does it')
        if unit is not None:
            self._queue.appendleft(unit)
        self._ray.kill(worker)  # it may live on behind a connection that broke
        self._start()

    def _watch(self) -> None:
        """Say that nobody works, and end it after a while."""
        clock = time.monotonic()
        if self._has_work() or not self._queue:
            self._last_work = self._last_report = clock
        elif clock - self._last_work > _START_SECONDS:
            raise UserError(f'Ray has started no worker within {_START_SECONDS / 60:.0f} minutes; look at `ray status`')
        elif clock - self._last_report > _REPORT_SECONDS:
            self._last_report = clock
            free = self._ray.available_resources()
            self._log(f'waiting for Ray to start a worker: free are {free.get("CPU", 0):g} cores, '
                      f'{free.get("GPU", 0):g} GPUs')  # fmt: skip


@contextlib.contextmanager
def _connected() -> Iterator[Any]:
    """The package, connected to a cluster until the block ends, or as long as the program that had done so before."""
    check_ray()
    import ray

    if ray.is_initialized():
        yield ray
        return
    address = os.environ.get('RAY_ADDRESS', 'local')
    alone: dict[str, Any] = {'include_dashboard': False} if address == 'local' else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **alone)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f'RAY_ADDRESS={address}: {first_line(error)}; is a cluster running there (ray status)?'
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _versions() -> dict[str, str]:
    """What decides about the bytes."""
    import numpy
    import torch

    return {
        'python': '.'.join(map(str, sys.version_info[:3])),
        'tread_composer': __version__,
        'torch': torch.__version__,
        'numpy': numpy.__version__,
    }
