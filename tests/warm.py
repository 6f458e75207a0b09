"""A process that has done the imports and forks one process for each command that the tests start.

A command of ours spends five seconds on imports and two on its work. The fork is taken from a process that has
imported everything and run nothing, with one thread: it behaves like a fresh one and ends like one, with its exit
handlers. Some tests start fresh processes all the same, through the ``composer`` launcher and without it.

The protocol, over a Unix socket: the client sends one JSON line and the descriptors for stdout and stderr; it gets the
process id as a line, and the exit status as another one.
"""

import json
import os
import runpy
import select
import signal
import socket
import sys
from typing import Any

from tread_composer.core.process import prepare_process

__all__ = ['serve']


def serve(path: str) -> dict[str, Any]:
    """Answer until stdin, and with it the tests, end. Returns only in a forked process: the command it is to run."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the supervisors
        print('ready', flush=True)
        while True:
            ready, _, _ = select.select([listening, sys.stdin], [], [])
            if sys.stdin in ready:
                sys.exit(0)
            connection, _ = listening.accept()
            if os.fork() == 0:
                return _supervise(connection)
            connection.close()


def _supervise(connection: socket.socket) -> dict[str, Any]:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    text, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 2)
    child = os.fork()
    if child == 0:
        connection.close()
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in zip((null, *descriptors), range(3), strict=True):
            os.dup2(source, target)
            os.close(source)
        return json.loads(text)
    connection.sendall(f'{child}\n'.encode())
    _, status = os.waitpid(child, 0)
    connection.sendall(f'{os.waitstatus_to_exitcode(status)}\n'.encode())
    os._exit(0)


if __name__ == '__main__':
    prepare_process()
    # What MLflow imports only when it opens a store takes as long as a run of ours.

    import tread_composer.cli
    import tread_composer.run.train  # noqa: F401

    asked = serve(sys.argv[1])
    os.chdir(asked['folder'])
    os.environ.clear()
    os.environ.update(asked['environment'])
    sys.argv[:] = asked['words']
    runpy.run_path(sys.argv[0], run_name='__main__')
