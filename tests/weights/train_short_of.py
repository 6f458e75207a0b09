"""``train.py x.yaml ...`` in a process that may have no more memory, or open files, from the look at its folder on.

LACKING=memory or files.
"""

import os
import resource
import sys

from tread_composer.callbacks.checkpoint_saver import WholeCheckpointSaver

lacking = os.environ['LACKING']
kind = resource.RLIMIT_AS if lacking == 'memory' else resource.RLIMIT_NOFILE
_before_load = WholeCheckpointSaver.before_load


def little():
    """What small objects need, but no map of a checkpoint of a megabyte; or one file at a time."""
    if lacking == 'memory':
        with open('/proc/self/statm') as file:
            return int(file.read().split()[0]) * resource.getpagesize() + 300_000
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    return free + 1


def before_load(self, state, logger):
    """Short of it only here."""
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (little(), hard))
    try:
        _before_load(self, state, logger)
    finally:
        resource.setrlimit(kind, (soft, hard))


WholeCheckpointSaver.before_load = before_load

if __name__ == '__main__':
    from tread_composer.cli import main

    sys.exit(main(['train', *sys.argv[1:]]))
