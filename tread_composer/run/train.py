"""A training run from start to end: what ``composer train.py`` does."""

import contextlib
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence

from composer import Trainer
from composer.utils import dist, get_device

from tread_composer.builders.model import check_fit
from tread_composer.builders.run_data import check_expectations, planned_manifest, prepare_data
from tread_composer.builders.run_folder import check_load_path, check_run_folder
from tread_composer.builders.trainer import build_trainer
from tread_composer.callbacks.update_guard import RewindError
from tread_composer.config import Config, check_files, check_machine, load_config
from tread_composer.core.errors import UserError
from tread_composer.data.checks import check_shards
from tread_composer.io.ranks import agreed
from tread_composer.routing import RoutingError
from tread_composer.run.plan import format_plan, make_plan
from tread_composer.run.rewind import rewind, skipped_batches

__all__ = ['data_state', 'train', 'world_size']

_PLAN_LINES = 10


def world_size() -> int:
    """Number of ranks that this process was launched with."""
    return int(os.environ.get('WORLD_SIZE', '1'))


def train(path: str, overrides: Sequence[str] = ()) -> None:
    """Load, check, train, report.

    Rank 0 checks everything that needs no other rank before the process group exists. The others wait there, so a
    refused configuration is reported once, and they are stopped by the launcher.

    Args:
        path: The YAML file.
        overrides: ``key=value`` texts.

    Raises:
        UserError: The input is at fault.
    """
    checked = _checked_config(path, overrides) if dist.get_global_rank() == 0 else _config_if_sound(path, overrides)
    with _stoppable():
        if checked is None:
            dist.initialize_dist(get_device(None))
        else:
            dist.initialize_dist(get_device(checked.device), timeout=checked.dist_timeout)
    config = agreed(lambda: checked or _checked_config(path, overrides))
    splits = agreed(lambda: prepare_data(config))
    # Of the last, smaller evaluation batch, which is as it should be.
    warnings.filterwarnings('ignore', message='Cannot split tensor of length')
    if dist.get_global_rank() == 0:
        print(_head_of_plan(config), file=sys.stderr, flush=True)
    trainer = build_trainer(config, splits, skipped_batches=skipped_batches(config))
    began = time.monotonic()
    assert trainer.state.max_duration is not None
    if trainer.state.timestamp < trainer.state.max_duration:
        begin = int(trainer.state.timestamp.batch)
        try:
            _fit(trainer)
        except RewindError as request:
            rewind(config, trainer, request, began_at=begin)
        end, seconds = int(trainer.state.timestamp.batch), time.monotonic() - began
        status = f'batches {begin} to {end} in {seconds:.0f} s, evaluation and samples included'
    else:
        status = f'was trained to {config.max_duration} before; a longer max_duration continues it'
        for logger in trainer.logger.destinations:
            getattr(logger, 'finished', lambda: None)()
    trainer.close()
    text = report(trainer, config, status)  # on all ranks: a metric may have to be gathered
    if dist.get_global_rank() == 0:
        print(text, flush=True)


def _head_of_plan(config: Config) -> str:
    """The first lines of what ``plan`` prints: data, model, route and cost, before the first batch."""
    try:
        lines = format_plan(config, make_plan(config, world_size()), data_state(config)[0]).splitlines()
    except UserError as error:  # what cannot be counted beforehand can be trained all the same
        return f'plan: {error}'
    return '\n'.join(lines[:_PLAN_LINES])


def _fit(trainer: Trainer) -> None:
    try:
        trainer.fit()
    except RoutingError as error:
        raise UserError(f'algorithms.tread: {error}') from error


def _config_if_sound(path: str, overrides: Sequence[str]) -> Config | None:
    try:
        return _checked_config(path, overrides)
    except UserError:
        return None  # it is rank 0's to say; if rank 0 sees none, this node's files differ, and `agreed` says so


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM ends the process at once: Composer's handler runs in Python, which waits for the rendezvous to return.

    Without this the launcher would give the waiting ranks 30 s after rank 0 has refused a configuration.
    """
    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def _checked_config(path: str, overrides: Sequence[str]) -> Config:
    config = load_config(path, overrides, world_size=world_size())
    check_machine(config, path)
    check_files(config, path)
    check_fit(config)
    if dist.get_global_rank() == 0:
        check_run_folder(config)
        check_load_path(config)
    return config


def data_state(config: Config) -> tuple[str, UserError | None]:
    """One line on the training data, and what is wrong with them, if anything is."""
    data = config.data
    folder = os.path.join(data.local, 'train' if data.name == 'digits' else data.train_split)
    if data.name == 'digits' and not os.path.exists(data.local):
        return f'{data.local}: not there yet, will be made from scikit-learn on first use', None
    try:
        check_files(config)
        manifest = planned_manifest(config)
        if manifest is None:
            return f'{folder}: no manifest', UserError(f'data.local: {folder!r} holds no manifest.json')
        check_shards(folder, manifest, remote=data.name == 'latents' and data.remote is not None)
        check_expectations(config, manifest)
    except UserError as error:
        return f'{folder}: NOT READY, see the message below', error
    return (
        f'{folder}: {manifest.num_samples:,} samples of {manifest.kind} from {manifest.source}, shards complete',
        None,
    )


def report(trainer: Trainer, config: Config, status: str) -> str:
    """What a person wants to know when a run ends: where everything is, and the figures of callbacks that have some."""
    rows = [('run', f'{config.run_name}: {status}')]
    for label, metrics in trainer.state.eval_metrics.items():
        if 'loss' in metrics and metrics['loss'].update_count:
            value = float(metrics['loss'].compute())
            rows.append(
                ('evaluation loss', f'{value:.4f} on {label!r}, at fixed noise and times: any two runs compare')
            )
    for part in (*trainer.state.callbacks, *trainer.logger.destinations):
        summary = getattr(part, 'summary', None)
        if summary is not None:
            rows += summary(trainer.state)
    if config.save_folder:
        rows.append(('checkpoints, config.yaml', config.save_folder.replace('{run_name}', config.run_name)))
    width = max(len(name) for name, _ in rows)
    rule = '-' * 72
    return '\n'.join([rule, *(f'{name:<{width}}  {text}' for name, text in dict.fromkeys(rows)), rule])
