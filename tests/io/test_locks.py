"""Real processes: one at a time, and nothing of a killed one is in the way."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.warm import exit_codes, start
from tread_composer.core.errors import UserError
from tread_composer.io.locks import locked, node_lock_path

BUSY = 'in use by {holder}; wait'

# Holds the lock; with a forked child, which outlives it.
HOLDER = """
import os, sys, time
from pathlib import Path
from tread_composer.io.locks import locked
with locked(Path(sys.argv[1])):
    if os.fork() == 0:
        print('held', flush=True)  # said by the child: what a fork has to let go of is let go of by now
        time.sleep(20)
        os._exit(0)
    time.sleep(60)
"""


def hold(path: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, '-c', HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == 'held\n'
    return process


def count_up(path: Path, times: int) -> None:
    """Lets others in between reading and writing, if the lock lets them."""
    for _ in range(times):
        with locked(path.with_suffix('.lock')):
            number = int(path.read_text())
            time.sleep(0.001)
            path.write_text(str(number + 1))


def test_a_holder_is_named_and_its_death_is_enough(tmp_path: Path):
    path = tmp_path / '{odd} name.lock'
    holder = hold(path)
    with pytest.raises(UserError, match=f'in use by host .*, process {holder.pid}; wait'), locked(path, BUSY):
        pass
    holder.kill()
    holder.wait()
    with locked(path, BUSY):  # although the child that it forked is still alive
        assert f'process {os.getpid()}' in path.read_text()


def test_processes_wait_for_each_other(tmp_path: Path):
    path = tmp_path / 'number'
    path.write_text('0')
    assert exit_codes([start(count_up, path, 30) for _ in range(3)]) == [0, 0, 0]
    assert path.read_text() == '90'


def test_a_lock_that_its_holder_removed_is_another_one(tmp_path: Path):
    """As ``sample`` does at its end; who has waited must not hold a file that nobody else will ever see."""
    path = tmp_path / 'lock'
    with locked(path, BUSY):
        path.unlink()
        with locked(path, BUSY):
            assert path.exists()


def test_the_lock_of_a_node_does_not_depend_on_the_temporary_folder(tmp_path: Path):
    code = 'from tread_composer.io.locks import node_lock_path; print(node_lock_path("x"))'
    environment = {**os.environ, 'TMPDIR': str(tmp_path)}
    path = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True, check=True)
    assert path.stdout.strip() == str(node_lock_path('x'))
