"""This process among the ranks of its launcher: the variables that say which it is, and its end when the launcher dies.

Composer's launcher, torchrun and scripts under ``srun`` set the same variables. The standard library alone: a command
asks before it imports torch.
"""

import os
import re
import signal
import socket
import sys
import threading
import time

from tread_composer.core.errors import UserError, first_line

__all__ = ['global_rank', 'lost_connection', 'prepare_rank', 'refused', 'world_size']

_PATIENCE = 20.0  # seconds
_SECONDS_TO_CLOSE = 30.0  # as long as Composer's launcher itself gives its ranks
_START = "start the ranks by composer -n RANKS ..., by torchrun, or by srun with each task's variables exported"
_GONE = re.compile('by peer|Broken pipe|remote process exited|[Tt]imed out|[Tt]imeout')
# The launcher's variables that are numbers, with the least that each may be.
_LEAST = {'RANK': 0, 'WORLD_SIZE': 1, 'LOCAL_RANK': 0, 'LOCAL_WORLD_SIZE': 1, 'NODE_RANK': 0, 'MASTER_PORT': 0}


def global_rank() -> int:
    """This process's number among those of the launcher; 0 without one. Composer reads the same variable."""
    text = os.environ.get('RANK', '0')
    return int(text) if text.isdecimal() else 0


def world_size() -> int:
    """Number of ranks that this process was launched with; ``UserError`` if the launcher says none."""
    return _number('WORLD_SIZE') or 1


def prepare_rank() -> None:
    """Check the variables of the launcher, complete them, and end this rank when a launcher of several is killed.

    torchrun says ``GROUP_RANK`` where Composer and streaming read ``NODE_RANK``.

    Raises:
        UserError: They contradict each other, or Slurm started several tasks that do not know of each other.
    """
    _check_variables()
    if 'GROUP_RANK' in os.environ:
        os.environ.setdefault('NODE_RANK', os.environ['GROUP_RANK'])
    if int(os.environ.get('LOCAL_WORLD_SIZE', '1')) > 1:
        threading.Thread(target=_end_with_launcher, args=(os.getppid(),), daemon=True).start()


def refused(error: UserError) -> int:
    """Print what the user has to put right, once on each node; returns the exit code, 2."""
    rank = global_rank()
    if rank == 0:
        sys.stdout.flush()
        print(error, file=sys.stderr, flush=True)
        return 2
    if os.environ.get('LOCAL_RANK') != '0':
        # The launcher stops all ranks of its node as soon as one of them ends, and the first one must have printed
        # before. This rank is stopped within the wait; if not, the first one was not refused, and this one ends all.
        time.sleep(_PATIENCE)
    print(f'rank {rank} on host {socket.gethostname()}: {error}', file=sys.stderr, flush=True)
    return 2


def lost_connection(error: RuntimeError) -> UserError | None:
    """What torch's error of a collective means where another rank is gone or silent; None for any other error.

    gloo raises a bare ``RuntimeError`` that names it, NCCL ``torch.distributed.DistBackendError`` and the store of the
    first rank ``DistNetworkError``, which are known by their names: torch need not have been imported.
    """
    kinds, text = {kind.__name__ for kind in type(error).__mro__}, str(error)
    of_ranks = 'gloo' in text or kinds & {'DistBackendError', 'DistNetworkError'}
    if world_size() == 1 or not of_ranks or not _GONE.search(text):
        return None
    place = f'rank {global_rank()} of {world_size()} (host {socket.gethostname()})'
    return UserError(
        f'{place}: lost the connection to another rank, which died or hangs: what that rank or its node printed says '
        f'why ({first_line(error)}). What is finished is kept: run the same command again on all nodes'
    )


def _number(name: str) -> int | None:
    text, least = os.environ.get(name), _LEAST[name]
    if text is not None and not (text.isascii() and text.isdecimal() and int(text) >= least):
        raise UserError(f'{name}={text!r} in the environment is no whole number of {least} or more; {_START}')
    return None if text is None else int(text)


def _check_variables() -> None:
    tasks = os.environ.get('SLURM_STEP_NUM_TASKS') or os.environ.get('SLURM_NTASKS', '1')
    if 'WORLD_SIZE' not in os.environ and 'SLURM_STEP_ID' in os.environ and tasks.isdecimal() and int(tasks) > 1:
        raise UserError(
            f'WORLD_SIZE is not set, and srun has started {tasks} tasks: each would be a run of its own in the same '
            f'folder. Export for each task RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID '
            f'LOCAL_WORLD_SIZE=<tasks of this node> NODE_RANK=$SLURM_NODEID, and MASTER_ADDR and MASTER_PORT of the '
            f'first node; or let srun start one task for each node, and that one composer -n GPUS ...'
        )
    values = {name: _number(name) for name in _LEAST}
    size, size_here = values['WORLD_SIZE'] or 1, values['LOCAL_WORLD_SIZE'] or 1
    limits = {
        'RANK': ('WORLD_SIZE', size - 1),
        'LOCAL_RANK': ('LOCAL_WORLD_SIZE', size_here - 1),
        'LOCAL_WORLD_SIZE': ('WORLD_SIZE', size),
    }
    for name, (limit, most) in limits.items():
        if (values[name] or 0) > most:
            raise UserError(
                f'{name}={values[name]} in the environment does not go with {limit}={values[limit] or 1}; {_START}'
            )
    absent = [name for name in ('RANK', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT') if not os.environ.get(name)]
    if size > 1 and absent:
        raise UserError(f'WORLD_SIZE={size} in the environment, without {" and ".join(absent)}; {_START}')
    if (values['MASTER_PORT'] or 0) > 65535:
        raise UserError(f'MASTER_PORT={values["MASTER_PORT"]} in the environment is no port; take 1024 to 65535')


def _end_with_launcher(launcher: int) -> None:
    """Nobody else would end this rank, and it would hold its GPU.

    Only beside other ranks: a shell that began a single process with ``nohup`` may end before it.
    """
    while os.getppid() == launcher:
        time.sleep(0.5)
    text = f'rank {global_rank()}: its launcher (process {launcher}) is gone, so it ends, too'
    print(text, file=sys.stderr, flush=True)
    # Asked first: Composer then closes the run. A collective whose other ranks are gone may never return.
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_SECONDS_TO_CLOSE)
    os.kill(os.getpid(), signal.SIGKILL)
