"""Conversion and sampling by workers of Ray: what they write is what ranks write, also if one of them is killed."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.conversion.worlds import SCRIPT, digests, make_images, make_vae, words
from tests.runs import environment, launch
from tests.warm import start_program, wait_until

pytest.importorskip('ray', reason='the extra `ray`, which `dev` holds, is not installed')


@pytest.fixture
def ray_variables() -> Iterator[dict[str, str]]:
    """A place for Ray of the test's own; behind the test, nothing of Ray runs any more."""
    with tempfile.TemporaryDirectory(prefix='ray') as place:  # not pytest's: sockets have short names
        yield environment(RAY_TMPDIR=place, HOME=place, RAY_AUTH_MODE='disabled')
        assert wait_until(lambda: not processes_of(place), pause=0.1)


CONNECTED = """
import sys
import ray
from tread_composer.cli import main
ray.init('auto')
code = main(sys.argv[1:])
assert ray.is_initialized()
sys.exit(code)
"""


def processes_of(place: str) -> list[int]:
    """Whose words name this folder, as those of all processes of Ray's do, or whose parents' do."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(place in word for word in process.cmdline()) or process.environ().get('RAY_TMPDIR') == place:
                found.append(process.pid)
    return found


def test_a_killed_worker_costs_its_part_and_the_bytes_are_those_of_ranks(tmp_path, ray_variables):
    source, vae = make_images(tmp_path / 'images', 40), make_vae(tmp_path / 'vae')
    options = {'part_size': 2, 'batch_size': 2, 'device': 'cpu'}
    done = launch(tmp_path, [sys.executable, SCRIPT, *words(source, tmp_path / 'ranks', vae, **options)], ranks=2)
    assert done.returncode == 0, done.stderr
    # Relative, as a user types it: workers of Ray have a folder of their own.
    arguments = words(Path('images'), 'ray', 'vae', **options, engine='ray', ray_workers=2)
    log = [tmp_path / 'out', tmp_path / 'err']
    process = start_program([SCRIPT, *arguments], tmp_path, ray_variables, log)

    writers: list[int] = []

    def is_writing() -> bool:
        writers.extend(int(path.name.split('-')[2]) for path in (tmp_path / 'ray' / 'train').glob('.writing-*'))
        return bool(writers)

    assert wait_until(is_writing, process), log[1].read_text()
    os.kill(writers[0], signal.SIGKILL)
    process.join()
    printed = log[0].read_text()
    assert process.exitcode == 0, printed + log[1].read_text()
    assert 'Ray: 2 workers with 1 cores each' in printed and 'a worker of Ray was lost with part train' in printed
    assert digests(tmp_path / 'ray') == digests(tmp_path / 'ranks')


def test_a_cluster_that_runs_already_draws_the_images_of_ranks(routed, tmp_path, ray_variables):
    sample = ['-m', 'tread_composer', 'sample', str(routed.folder), '--count', '70', '--steps', '2', '--device', 'cpu']
    sample += ['--batch-size', '16', '--format', 'png', 'npz', '--out']
    done = launch(tmp_path, [sys.executable, *sample, 'ranks'], ranks=2)
    assert done.returncode == 0, done.stderr
    head = [sys.executable, '-m', 'ray.scripts.scripts', 'start', '--head', '--block', '--port=0', '--num-cpus=2']
    head += ['--include-dashboard=false', '--disable-usage-stats', '--node-ip-address=127.0.0.1']
    cluster = subprocess.Popen(head, env=ray_variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert wait_until(Path(ray_variables['RAY_TMPDIR'], 'ray', 'ray_current_cluster').exists)
        variables = {key: ray_variables[key] for key in ('RAY_TMPDIR', 'HOME', 'RAY_AUTH_MODE')}
        engine = ['ray', '--engine', 'ray', '--ray-workers', '2']
        done = launch(tmp_path, [sys.executable, *sample, *engine], RAY_ADDRESS='auto', **variables)
        assert done.returncode == 0, done.stderr
        assert digests(tmp_path / 'ray') == digests(tmp_path / 'ranks')
        (tmp_path / 'connected.py').write_text(CONNECTED)  # a program that has called Ray itself
        many = [sys.executable, 'connected.py', *sample[2:], 'x', '--engine', 'ray', '--ray-workers', '3']
        wrong = launch(tmp_path, many, **variables)
        assert wrong.returncode == 2 and '--ray-workers 3: more than the cores' in wrong.stderr
    finally:
        cluster.terminate()
        cluster.wait()


def test_what_ray_cannot_do_is_refused_before_the_work(tmp_path, ray_variables):
    source = make_images(tmp_path / 'images', 4)
    arguments = [sys.executable, SCRIPT, *words(source, tmp_path / 'out', None)]
    done = launch(tmp_path, [*arguments, '--ray-workers', '2'])
    assert done.returncode == 2 and '--ray-workers: only with --engine ray' in done.stderr
    done = launch(tmp_path, [*arguments, '--engine', 'ray'], ranks=2)
    assert done.returncode == 2 and 'start it once, without composer, torchrun or srun' in done.stderr
    assert not (tmp_path / 'out').exists()
