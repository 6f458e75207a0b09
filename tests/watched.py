"""A real process that is watched from its first line: what it imports, what it looks up, what its environment says.

Its environment is made from nothing, so that no library takes it for a test or a CI job and behaves itself. No name
leaves the machine: a look-up of a foreign host is noted and fails.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.runs import ROOT

# Python imports `sitecustomize` before anything else; audit hooks see each import and each name look-up since.
_SITECUSTOMIZE = """
import atexit, json, os, sys

NOTES, LOCAL, STOP = os.environ['NOTES'], set(json.loads(os.environ['LOCAL'])), os.environ.get('STOP_AT')
LOOKUPS = ('socket.getaddrinfo', 'socket.gethostbyname', 'socket.gethostbyaddr')

def note(kind, what):
    keys = ('GOMP_SPINCOUNT', 'MLFLOW_DISABLE_TELEMETRY')
    entry = {'pid': os.getpid(), 'kind': kind, 'what': what, 'environment': {key: os.environ.get(key) for key in keys}}
    with open(NOTES, 'a') as file:
        file.write(json.dumps(entry) + '\\n')

def hook(event, args):
    if event == 'import' and args[0] in ('torch', 'mlflow'):
        note('import', args[0])
        if args[0] == STOP:
            os._exit(0)
    elif event in LOOKUPS or (event == 'socket.connect' and isinstance(args[1], tuple)):
        host = args[0] if event in LOOKUPS else args[1][0]
        host = host.decode() if isinstance(host, bytes) else host
        if host not in LOCAL:
            note('lookup', str(host))
            raise OSError(f'no look-ups here: {host}')

sys.addaudithook(hook)
atexit.register(lambda: note('end', sorted(sys.modules)))
"""


@dataclass(frozen=True)
class Watched:
    """A process that is over."""

    pid: int
    code: int
    out: str  # stdout before stderr
    entries: list[dict]  # what was noted, by it and its child processes

    @property
    def foreign_hosts(self) -> set[str]:
        return {entry['what'] for entry in self.entries if entry['kind'] == 'lookup'}

    @property
    def packages(self) -> set[str]:
        """Top-level packages that the process had imported when it ended."""
        (modules,) = [entry['what'] for entry in self.entries if entry['kind'] == 'end' and entry['pid'] == self.pid]
        return {module.partition('.')[0] for module in modules}

    def environment_at(self, package: str) -> list[dict[str, str | None]]:
        """The noted variables whenever a process began to import a package."""
        return [entry['environment'] for entry in self.entries if entry['what'] == package]


def watch(
    folder: Path, words: Sequence[str], variables: Mapping[str, str] | None = None, stop_at: str | None = None
) -> Watched:
    """Run Python with these words to its end.

    Args:
        folder: An empty one; also the working directory and the home of the process.
        words: Behind ``python``.
        variables: Added to its environment.
        stop_at: A package whose import ends the process.
    """
    place = folder / 'watch'
    place.mkdir(exist_ok=True)
    (place / 'sitecustomize.py').write_text(_SITECUSTOMIZE)
    notes = place / 'notes'
    notes.write_text('')
    local = ['', '0.0.0.0', '::', '127.0.0.1', '::1', 'localhost', socket.gethostname(), socket.getfqdn(), None]
    environment = {'PATH': os.environ['PATH'], 'HOME': str(folder), 'PYTHONPATH': f'{place}{os.pathsep}{ROOT}'}
    environment |= {'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    environment |= {'NOTES': str(notes), 'LOCAL': json.dumps(local), **({'STOP_AT': stop_at} if stop_at else {})}
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE}
    with subprocess.Popen(
        [sys.executable, *words], cwd=folder, env={**environment, **(variables or {})}, text=True, **pipes
    ) as process:
        out, err = process.communicate()
    entries = [json.loads(line) for line in notes.read_text().splitlines()]
    return Watched(process.pid, process.returncode, out + err, entries)
