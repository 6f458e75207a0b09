"""``train.py x.yaml ...`` in a process that kills itself while it saves a checkpoint: DIE_AT=<place>:<batch>.

The places: ``half`` of the bytes written; ``written``, but not renamed; ``renamed``, but latest names the one before.
Two do not kill: ``late`` writes the checkpoint only when the run is two batches further, and fails if it never is;
``slow`` takes a second and a half for it.
"""

import io
import os
import signal
import sys
import threading
import time

import torch
from composer.core import Callback, State
from composer.loggers import Logger

place, batch = os.environ['DIE_AT'].split(':')
_save, _replace = torch.save, os.replace


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Further(Callback):
    """Tells the writer how far training is."""

    reached = threading.Event()

    def batch_end(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch == int(batch) + 2:
            self.reached.set()


def save(content, file, *arguments, **keywords):
    """Half of a checkpoint, and no more."""
    is_meant = f'-ba{batch}-' in str(getattr(file, 'name', ''))
    if place == 'late' and is_meant and not Further.reached.wait(timeout=60):
        raise AssertionError('training waited for the writer')
    if place == 'slow' and is_meant:
        time.sleep(1.5)
    if place != 'half' or not is_meant:
        return _save(content, file, *arguments, **keywords)
    buffer = io.BytesIO()
    _save(content, buffer)
    file.write(buffer.getvalue()[: buffer.tell() // 2])
    file.flush()
    die()


def replace(source, target, **keywords):
    """The last thing but one that this process does."""
    name = os.path.basename(target)
    if place == 'written' and f'-ba{batch}' in name:
        die()
    if place == 'renamed' and name.startswith('latest') and os.readlink(source).endswith(f'-ba{batch}-rank0.pt'):
        die()
    _replace(source, target, **keywords)


torch.save, os.replace = save, replace

if __name__ == '__main__':
    from tread_composer.cli import main

    sys.modules['tests.weights.train_and_die'] = sys.modules['__main__']
    sys.exit(main(['train', *sys.argv[1:]]))
