"""``python -m tread_composer doctor [x.yaml]``: would a run fail on this machine? The questions that ``train`` asks."""

import functools
import os
from collections.abc import Callable, Iterator

import torch

from tread_composer.builders.run_data import planned_manifest
from tread_composer.builders.run_folder import check_load_path, check_run_folder, run_folder
from tread_composer.config import Config, check_files, check_machine
from tread_composer.config.registry import resolve
from tread_composer.core.errors import UserError
from tread_composer.io.files import check_writable
from tread_composer.metrics.inception import check_weights, find_weights
from tread_composer.run.machine import (
    check_disk,
    check_loopback,
    check_open_files,
    check_port,
    check_shared_memory,
    check_torch_build,
    check_versions,
)
from tread_composer.run.plan import data_state, make_plan

__all__ = ['check_run_machine', 'examine']

_Check = Callable[[], str]
_CHECKPOINTS_AT_ONCE = 2  # the new one is whole before the old one goes


def examine(config: Config | None, world_size: int = 1) -> Iterator[tuple[str, str, bool]]:
    """Every check in turn.

    Args:
        config: What is to be trained; without one, the machine alone is examined.
        world_size: Number of ranks on this machine.

    Yields:
        Name of the check, what is there or the cure, and whether a run would get past it.
    """
    checks = _machine_checks(config, world_size)
    if config is not None:
        checks |= _run_checks(config)
    for name, check in checks.items():
        try:
            yield name, check(), True
        except UserError as error:
            yield name, str(error), False


def check_run_machine(config: Config, world_size: int) -> None:
    """What ``train`` asks of the machine before it writes anything.

    Raises:
        UserError: The first fault, with its cure.
    """
    names = ('shared memory', 'open files', 'data folder', 'run folder', 'free disk')
    checks = _machine_checks(config, world_size) | _run_checks(config)
    for name, check in checks.items():
        if name in names or name.startswith('loggers.'):
            check()


def _machine_checks(config: Config | None, world_size: int) -> dict[str, _Check]:
    port = os.environ.get('MASTER_PORT')
    return {
        'versions': check_versions,
        'torch and GPU': lambda: check_torch_build(None if config is None else config.device),
        'shared memory': lambda: _shared_memory(config, world_size),
        'open files': check_open_files,
        'loopback': check_loopback,
        'rendezvous': lambda: check_port(None if port is None else int(port)),
        'Inception': _inception,
    }


def _run_checks(config: Config) -> dict[str, _Check]:
    checks: dict[str, _Check] = {'device and precision': lambda: _passes(lambda: check_machine(config), 'fit together')}
    checks['data'] = lambda: _data(config)
    is_made = config.data.name == 'digits' and not os.path.exists(config.data.local)
    if is_made or getattr(config.data, 'remote', None) is not None:
        checks['data folder'] = lambda: check_writable(config.data.local)
    if config.save_folder is not None and '://' not in config.save_folder:
        checks['run folder'] = lambda: _run_folder(config)
        checks['free disk'] = lambda: check_disk(run_folder(config), _CHECKPOINTS_AT_ONCE * _checkpoint_bytes(config))
    for name, logger in config.loggers.items():
        check_store = getattr(resolve('logger', logger.name), 'check_store', None)
        if check_store is not None:
            checks[f'loggers.{name}'] = functools.partial(check_store, **logger.kwargs)
    return checks


def _passes(check: Callable[[], None], text: str) -> str:
    check()
    return text


def _inception() -> str:
    """Absent weights are no fault here: only runs that measure FID need them, and `data` says so for those."""
    try:
        path = find_weights()
    except UserError:
        return 'weights are not here; only FID and its like need them (python -m tread_composer prefetch)'
    check_weights(path)
    return f'{path}: the published weights'


def _shared_memory(config: Config | None, world_size: int) -> str:
    if config is None:
        return check_shared_memory()
    per_rank = config.global_train_batch_size // world_size
    return check_shared_memory(per_rank * _sample_bytes(config), (config.data.num_workers or 0) * world_size)


def _sample_bytes(config: Config) -> int:
    try:
        manifest = planned_manifest(config)
    except UserError:  # `data` says so
        manifest = None
    if manifest is None:
        return 0
    values = manifest.channels * manifest.latent_height * manifest.latent_width
    return values * torch.float32.itemsize * (2 if manifest.kind == 'moments' else 1)


def _data(config: Config) -> str:
    check_files(config)
    state, problem = data_state(config)
    if problem is not None:
        raise problem
    return state


def _run_folder(config: Config) -> str:
    check_run_folder(config)
    check_load_path(config)
    return check_writable(run_folder(config))


def _checkpoint_bytes(config: Config) -> float:
    """Weights, moments and averages in float32, without what the optimizer's gradients take."""
    try:
        plan = make_plan(config, 1)
    except UserError:  # the data are not here yet, and their shape is not said
        return 0.0
    memory = plan['memory_gib']
    return (memory['weights_and_gradients'] / 2 + memory['optimizer'] + memory['average']) * 2**30
