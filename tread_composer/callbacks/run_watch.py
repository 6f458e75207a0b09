"""A tiny second process that marks a tracked run FAILED when the training process dies without a word.

``kill -9`` and the out-of-memory killer leave no time for a last message, so MLflow would show the run as RUNNING for
ever. The watcher waits on a pipe from the training process. The word ``finished`` means that training has set the
status itself; a pipe that closes without it, or a parent that is gone, means that it could not.

The file is started as a script and imports the standard library alone until it has something to report (10 MB). Where
everything dies (a container, a batch system's whole job) the run stays RUNNING until the next start says it.
"""

import json
import os
import select
import subprocess
import sys
import time

__all__ = ['DEATH', 'END_TAG', 'OWNER_TAG', 'RunWatch']

OWNER_TAG = 'tread_composer.process'
"""The run's tag that names the process which writes to it: a watcher leaves a run alone that another has resumed."""

END_TAG = 'tread_composer.end'
"""The run's tag that says how it ended where it could not say so itself."""
DEATH = 'the process died without a word (kill -9, out of memory?)'

_WORD = b'finished\n'
_POLL_SECONDS = 1.0


class RunWatch:
    """The training process's end of the pipe.

    ``owner`` is the value of ``OWNER_TAG`` on the run as long as this process owns it. The store's address goes into
    the pipe, not into the command: it may hold a password.
    """

    def __init__(self, tracking_uri: str, run_id: str, owner: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in the terminal must not reach it
        )
        task = {'tracking_uri': tracking_uri, 'run_id': run_id, 'owner': owner, 'parent': os.getpid()}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task).encode() + b'\n')
        self._process.stdin.flush()

    def finished(self) -> None:
        """Dismiss the watcher: the run's status has been set. Waits for its end, at most 10 s."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(_WORD)
            self._process.stdin.close()
            self._process.wait(timeout=10)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()


def _wait_for_the_end(parent: int) -> bytes:
    """What the pipe said before it closed, or before the parent died.

    The pipe alone is not enough: data-loading workers are forked and hold its other end open for some seconds.
    """
    word = b''
    while os.getppid() == parent:
        if select.select([0], [], [], _POLL_SECONDS)[0]:
            piece = os.read(0, 4096)
            if not piece:
                break
            word += piece
    while select.select([0], [], [], 0)[0] and (piece := os.read(0, 4096)):
        word += piece
    return word


def _mark_failed(tracking_uri: str, run_id: str, owner: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri)
    run = client.get_run(run_id)
    if run.info.status == 'RUNNING' and run.data.tags.get(OWNER_TAG) == owner:
        client.set_tag(run_id, END_TAG, DEATH)
        client.set_terminated(run_id, status='FAILED')


def _watch() -> None:
    # Byte by byte: what follows the line is read with the descriptor, which knows nothing of a buffer.
    with open(0, 'rb', buffering=0, closefd=False) as stream:
        line = stream.readline()
    if not line.endswith(b'\n'):
        return
    task = json.loads(line)
    if _WORD in _wait_for_the_end(task.pop('parent')):
        return
    for pause in (1, 5, 20, 0):  # the store may be locked by another run
        try:
            return _mark_failed(**task)
        except Exception:
            time.sleep(pause)


if __name__ == '__main__':
    # Python put this file's folder first; its neighbours (progress.py, ...) must not stand for other packages.
    folder = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or '.') != folder]
    _watch()
