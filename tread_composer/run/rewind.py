"""``on_nonfinite: rewind``: back to the last checkpoint, without the batches that have followed it.

The run starts anew in the same process (``exec``), so that every object is made afresh and resumes as it would after a
kill. The batches between the checkpoint and the fault are read again and leave the weights alone; which they are stands
in ``rewinds.json`` beside the checkpoints, so a later resume leaves the same ones out.
"""

import atexit
import os
import sys
from typing import NoReturn

import torch.distributed as torch_dist
from composer import Trainer
from composer.utils import dist

from tread_composer.builders.run_folder import run_folder
from tread_composer.callbacks.checkpoint_saver import WholeCheckpointSaver
from tread_composer.callbacks.update_guard import RewindError
from tread_composer.config import Config
from tread_composer.core.errors import UserError
from tread_composer.io.files import read_json, write_json

__all__ = ['REWINDS_NAME', 'rewind', 'skipped_batches']

REWINDS_NAME = 'rewinds.json'
_MAX_REWINDS = 3  # to one checkpoint


def skipped_batches(config: Config) -> frozenset[int]:
    """Batches, counted from 0, that earlier rewinds of this run leave out.

    Raises:
        UserError: ``rewinds.json`` in the run's folder is damaged.
    """
    return frozenset(batch for entry in _read(config) for batch in range(entry['checkpoint'], entry['batch'] + 1))


def rewind(config: Config, trainer: Trainer, request: RewindError, began_at: int) -> NoReturn:
    """Note which batches to leave out, end this training and start it again. Called on all ranks.

    ``began_at`` is the batch at which this process began to train: that of the checkpoint it resumed from, or 0.

    Raises:
        UserError: There is no checkpoint yet, or the run has gone back to this one three times already.
    """
    savers = [callback for callback in trainer.state.callbacks if isinstance(callback, WholeCheckpointSaver)]
    checkpoint = next((int(saver.last_checkpoint_batch) for saver in savers if saver.last_checkpoint_batch), began_at)
    for saver in savers:
        saver.wait()
    rewinds = _read(config)
    if not checkpoint:
        raise UserError(f'{request.reason}\non_nonfinite: rewind has no checkpoint to go back to yet')
    if sum(entry['checkpoint'] == checkpoint for entry in rewinds) >= _MAX_REWINDS:
        raise UserError(
            f'{request.reason}\nThe run has gone back to its checkpoint at batch {checkpoint} {_MAX_REWINDS} times. '
            f'Lower the learning rate, or go on from an earlier checkpoint'
        )
    if dist.get_global_rank() == 0:
        entry = {'checkpoint': checkpoint, 'batch': request.batch, 'reason': request.reason}
        write_json(run_folder(config) / REWINDS_NAME, [*rewinds, entry])
        text = f'Back to the checkpoint at batch {checkpoint}; batches up to {request.batch} are left out'
        print(f'{request.reason}\n{text}', file=sys.stderr, flush=True)
    trainer.close()
    dist.barrier()  # nobody may start anew while another still needs this process group
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()
    sys.stdout.flush()
    atexit._run_exitfuncs()  # exec ends the process without them: shared memory would stay behind
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _read(config: Config) -> list[dict]:
    path = None if config.save_folder is None else run_folder(config) / REWINDS_NAME
    if path is None or not path.exists():
        return []
    try:
        return [{key: entry[key] for key in ('checkpoint', 'batch', 'reason')} for entry in read_json(path)]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f'{path}: damaged ({error}); it says which batches this run leaves out') from None
