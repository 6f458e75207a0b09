"""A training run from start to end: what ``composer train.py`` does.

``on_nonfinite: rewind`` goes back to the last checkpoint, without the batches that have followed it: the run starts
anew in the same process (``exec``), so that every object is made afresh and resumes as it would after a kill. The
batches between the checkpoint and the fault are read again and leave the weights alone; which they are stands in
``rewinds.json`` beside the checkpoints, so a later resume leaves the same ones out.
"""

import atexit
import contextlib
import hashlib
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as torch_dist
from composer import Trainer
from composer.utils import dist, get_device

from tread_composer.algorithms.rules import evaluated_weights
from tread_composer.builders.model import check_fit
from tread_composer.builders.run_data import prepare_data, split_folders
from tread_composer.builders.run_folder import environment, locked_run, run_folder
from tread_composer.builders.trainer import build_trainer
from tread_composer.callbacks.checkpoint_saver import WholeCheckpointSaver
from tread_composer.callbacks.update_guard import RewindError
from tread_composer.config import Config, check_files, check_machine, load_config
from tread_composer.core.errors import UserError
from tread_composer.core.flatten import flatten
from tread_composer.core.launch import world_size
from tread_composer.data.manifest import Manifest
from tread_composer.io.files import read_json, write_json
from tread_composer.io.ranks import agreed, check_equal
from tread_composer.io.rendezvous import Rendezvous
from tread_composer.io.table import text_table
from tread_composer.routing import RoutingError
from tread_composer.run.doctor import check_run_machine
from tread_composer.run.plan import data_state, format_plan, make_plan

__all__ = ['report', 'train']

_PLAN_LINES = 11
_DIST_TIMEOUT = 300.0  # seconds, Composer's default
_REWINDS = 'rewinds.json'
_MAX_REWINDS = 3  # to one checkpoint


def train(path: str, overrides: Sequence[str] = ()) -> None:
    """Load, check, train, report.

    Rank 0 checks everything that needs no other rank before the process group exists. The others wait there, so a
    refused configuration is reported once, and they are stopped by the launcher.

    Raises:
        UserError: Input, data or machine are at fault.
    """
    with contextlib.ExitStack() as held:
        config = _agreed_config(path, overrides, held)
        splits = agreed(lambda: prepare_data(config))
        check_equal(_facts_of_data(config, splits))
        # Of the last, smaller evaluation batch, which is as it should be.
        warnings.filterwarnings('ignore', message='Cannot split tensor of length')
        if dist.get_global_rank() == 0:
            print(_head_of_plan(config), file=sys.stderr, flush=True)
        trainer = build_trainer(config, splits, skipped_batches=_skipped_batches(config))
        status = _fit(trainer, config)
        trainer.close()
        text = report(trainer, config, status)  # on all ranks: a metric may have to be gathered
        if dist.get_global_rank() == 0:
            print(text, flush=True)


def _agreed_config(path: str, overrides: Sequence[str], held: contextlib.ExitStack) -> Config:
    """The configuration that all ranks have checked, with the process group made; ``held`` keeps the run's lock."""
    with _stoppable():
        ranks = Rendezvous()
        checked = None
        if ranks.rank == 0:
            with ranks.refusals():
                checked = _checked_config(path, overrides)
                held.enter_context(locked_run(checked))
        else:
            # A refusal is rank 0's to say; if it sees none, this node's files differ, and `agreed` says so.
            with contextlib.suppress(UserError):
                checked = _checked_config(path, overrides)
        device = get_device(None if checked is None else checked.device)
        timeout = _DIST_TIMEOUT if checked is None else checked.dist_timeout
        ranks.join(device.dist_backend, timeout)
        dist.initialize_dist(device, timeout=timeout)  # of the only rank; else it finds the group made
    config = agreed(lambda: checked or _checked_config(path, overrides))
    check_equal(_facts_of_code(config))
    return config


def _fit(trainer: Trainer, config: Config) -> str:
    """Train to the end, and say in words what was done."""
    began, begin = time.monotonic(), int(trainer.state.timestamp.batch)
    assert trainer.state.max_duration is not None
    if trainer.state.timestamp >= trainer.state.max_duration:
        for logger in trainer.logger.destinations:
            getattr(logger, 'finished', lambda: None)()
        return f'was trained to {config.max_duration} before; a longer max_duration continues it'
    try:
        trainer.fit()
    except RoutingError as error:
        raise UserError(f'algorithms.tread: {error}') from error
    except RewindError as request:
        _rewind(config, trainer, request, began_at=begin)
    end, seconds = int(trainer.state.timestamp.batch), time.monotonic() - began
    return f'batches {begin} to {end} in {seconds:.0f} s, evaluation and samples included'


def _facts_of_code(config: Config) -> dict[str, Any]:
    """What decides the numbers and must be the same on all nodes: the resolved configuration, code, versions."""
    settings = config.to_dict()
    settings['data'].pop('local')  # a node's own disk may have another name
    software = environment()
    facts = {'python': software['python'], 'packages': software['packages'], 'code': software['code']}
    # The order of algorithms is part of the run, and the equality of mappings would not see it.
    return {**flatten(settings), 'order of algorithms': list(config.algorithms), **flatten(facts)}


def _facts_of_data(config: Config, splits: Mapping[str, Manifest]) -> dict[str, Any]:
    """What the data set of this node is: its manifests, and the shards that each index lists."""
    folders, facts = split_folders(config), {}
    for split, manifest in splits.items():
        facts |= flatten(manifest.model_dump(mode='json'), f'data.{split}.manifest.')
        index = Path(config.data.local) / folders[split] / 'index.json'
        facts[f'data.{split}.index.json'] = hashlib.sha256(index.read_bytes()).hexdigest()[:16]
    return facts


def _head_of_plan(config: Config) -> str:
    """The first lines of what ``plan`` prints: data, model, route and cost, before the first batch."""
    try:
        lines = format_plan(config, make_plan(config, world_size(), memory=False), data_state(config)[0]).splitlines()
    except UserError as error:  # what cannot be counted beforehand can be trained all the same
        return f'plan: {error}'
    return '\n'.join(lines[:_PLAN_LINES])


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
    config = load_config(path, overrides)
    check_machine(config, path)
    check_files(config, path)
    check_fit(config)
    if dist.get_global_rank() == 0:
        check_run_machine(config, world_size())
    return config


def report(trainer: Trainer, config: Config, status: str) -> str:
    """What a person wants to know when a run ends: where everything is, and the figures of callbacks that have some."""
    rows = [('run', f'{config.run_name}: {status}')]
    for label, metrics in trainer.state.eval_metrics.items():
        if 'loss' in metrics and metrics['loss'].update_count:
            value = float(metrics['loss'].compute())
            weights = evaluated_weights(trainer.state)
            text = f'{value:.4f} of the {weights} on {label!r}, at fixed noise and times: any two runs compare'
            rows.append(('evaluation loss', text))
    for part in (*trainer.state.callbacks, *trainer.logger.destinations):
        summary = getattr(part, 'summary', None)
        if summary is not None:
            rows += summary(trainer.state)
    if config.save_folder:
        rows.append(('checkpoints, config.yaml', config.save_folder.replace('{run_name}', config.run_name)))
    rule = '-' * 72
    return f'{rule}\n{text_table((), list(dict.fromkeys(rows)), "ll")}\n{rule}'


def _skipped_batches(config: Config) -> frozenset[int]:
    """Batches, counted from 0, that earlier rewinds leave out; ``UserError`` if ``rewinds.json`` is damaged."""
    return frozenset(batch for entry in _rewinds(config) for batch in range(entry['checkpoint'], entry['batch'] + 1))


def _rewind(config: Config, trainer: Trainer, request: RewindError, began_at: int) -> NoReturn:
    """Note which batches to leave out, end this training and start it again. Called on all ranks.

    ``began_at`` is the batch at which this process began to train: that of the checkpoint it resumed from, or 0.

    Raises:
        UserError: There is no checkpoint yet, or the run has gone back to this one three times already.
    """
    savers = [callback for callback in trainer.state.callbacks if isinstance(callback, WholeCheckpointSaver)]
    checkpoint = next((int(saver.last_checkpoint_batch) for saver in savers if saver.last_checkpoint_batch), began_at)
    for saver in savers:
        saver.wait()
    rewinds = _rewinds(config)
    if not checkpoint:
        raise UserError(f'{request.reason}\non_nonfinite: rewind has no checkpoint to go back to yet')
    if sum(entry['checkpoint'] == checkpoint for entry in rewinds) >= _MAX_REWINDS:
        raise UserError(
            f'{request.reason}\nThe run has gone back to its checkpoint at batch {checkpoint} {_MAX_REWINDS} times. '
            f'Lower the learning rate, or go on from an earlier checkpoint'
        )
    if dist.get_global_rank() == 0:
        entry = {'checkpoint': checkpoint, 'batch': request.batch, 'reason': request.reason}
        write_json(run_folder(config) / _REWINDS, [*rewinds, entry])
        text = f'Back to the checkpoint at batch {checkpoint}; batches up to {request.batch} are left out'
        print(f'{request.reason}\n{text}', file=sys.stderr, flush=True)
    trainer.close()
    dist.barrier()  # nobody may start anew while another still needs this process group
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()
    sys.stdout.flush()
    atexit._run_exitfuncs()  # exec ends the process without them: shared memory would stay behind
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _rewinds(config: Config) -> list[dict]:
    path = None if config.save_folder is None else run_folder(config) / _REWINDS
    if path is None or not path.exists():
        return []
    try:
        return [{key: entry[key] for key in ('checkpoint', 'batch', 'reason')} for entry in read_json(path)]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f'{path}: damaged ({error}); it says which batches this run leaves out') from None
