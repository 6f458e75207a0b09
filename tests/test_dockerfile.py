"""The Dockerfile, without a container engine: linted by hadolint, then its steps one after the other.

Performed here: ARG, FROM and ENV are expanded, WORKDIR made, COPY copies what ``.dockerignore`` leaves into a scratch
folder that stands for the image's root, and RUN runs every command that needs neither root nor a package index, by the
SHELL of the file, with the paths of the image moved into that folder. The interpreter of the tests stands for the
image's environment, so the packages are those of the tests. What is not performed, and why, is ``NOT_RUN``: a command
that is neither there nor in ``PROGRAMS`` fails the test, and so does a reason without a command.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from docker.utils.build import exclude_paths
from dockerfile_parse import DockerfileParser

from tests.runs import ROOT

NOT_RUN = {
    'apt-get ': 'installs system packages as root',
    'rm -rf /var/lib/apt': 'belongs to it',
    'userdel ': 'would change the users of this machine',
    'useradd ': 'would change the users of this machine',
    'chown ': 'the user does not exist here',
    'python3 -m venv ': 'the environment of the tests stands for it',
    'pip install ': 'a package index and a GB: see test_the_packages_resolve',
    'uv pip install ': 'several GB: see test_the_packages_resolve',
}
PROGRAMS = {'python', 'composer', 'mkdir', 'test', 'rm'}
BIN = Path(sys.executable).parent
OFFLINE = ['unshare', '--map-root-user', '--net', 'bash', '-c', 'ip link set lo up && exec "$@"', '-']


def steps() -> list[tuple[str, str]]:
    """Instructions in order with their text, comments left out."""
    with (ROOT / 'Dockerfile').open('rb') as file:
        structure = DockerfileParser(fileobj=file).structure
    return [(step['instruction'], step['value']) for step in structure if step['instruction'] != 'COMMENT']


def expand(text: str, variables: dict[str, str]) -> str:
    """``${NAME}`` as the builder replaces it; an unknown name is an error."""
    return re.sub(r'\$\{(\w+)\}', lambda match: variables[match[1]], text)


def context(folder: Path) -> set[str]:
    """The files below ``folder`` that the builder is sent."""
    patterns = [line for line in (ROOT / '.dockerignore').read_text().splitlines() if line and line[0] != '#']
    return {name for name in exclude_paths(str(folder), patterns) if (folder / name).is_file()}


def constraints(torch: str) -> Path:
    """The file that pins the stack of this torch."""
    return ROOT / 'constraints' / (f'torch{torch.replace(".", "")}.txt' if torch[0].isdigit() else f'{torch}.txt')


def copy(value: str, workdir: Path) -> None:
    """COPY of files, or of the content of folders."""
    *sources, target = value.split()
    for name in context(ROOT):
        for source in sources:
            inside = source == '.' or Path(source) == Path(name) or Path(source) in Path(name).parents
            if inside:
                base = ROOT / source
                place = Path(name).name if base.is_file() else (ROOT / name).relative_to(base)
                (workdir / target / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, workdir / target / place)


def without_network() -> list[str]:
    """The words that start a command in a network of its own, where the system lets us make one."""
    if shutil.which('unshare') and subprocess.run([*OFFLINE, 'true'], capture_output=True).returncode == 0:
        return OFFLINE
    warnings.warn('RUN --network=none ran with a network: unshare is not permitted here', stacklevel=2)
    return []


def test_hadolint_has_nothing_to_say():
    done = subprocess.run(
        [BIN / 'hadolint', '--no-color', ROOT / 'Dockerfile'],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_its_steps_build_a_working_folder(tmp_path):
    variables: dict[str, str] = {}
    environment = {'HOME': str(tmp_path), 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    shell, workdir, reasons, ran = ['/bin/sh', '-c'], tmp_path, set(), []
    for instruction, value in steps():
        if instruction == 'ARG':
            name, _, default = value.partition('=')
            variables[name] = default
        elif instruction == 'ENV':
            name, _, text = value.partition('=')
            text = expand(text, {**variables, 'PATH': os.defpath, **environment})
            environment[name] = text.replace('/opt/venv/bin', str(BIN))
        elif instruction == 'WORKDIR':
            workdir = tmp_path / value.lstrip('/')
            workdir.mkdir(parents=True)
            environment['PYTHONPATH'] = str(workdir)  # stands for the editable installation
        elif instruction == 'COPY':
            copy(expand(value, variables), workdir)
        elif instruction == 'SHELL':
            shell = eval(value)
        elif instruction == 'RUN':
            start = without_network() if value.startswith('--network=none ') else []
            for text in re.split(r'\s*&&\s*', value.removeprefix('--network=none ')):
                reason = next((prefix for prefix in NOT_RUN if text.startswith(prefix)), None)
                if reason:
                    reasons.add(reason)
                    continue
                assert shlex.split(text)[0] in PROGRAMS, f'neither run nor left out with a reason: {text}'
                moved = re.sub(r'(?<![\w.])/(app|tmp)\b', rf'{tmp_path}/\1', expand(text, variables))
                done = subprocess.run(
                    [*start, *shell, moved], cwd=workdir, env=environment, capture_output=True, text=True
                )
                assert done.returncode == 0, f'{text}\n{done.stdout}{done.stderr}'
                ran.append((text, done.stdout))
        elif instruction == 'FROM':
            base = expand(value, variables)
    assert reasons == set(NOT_RUN)
    assert base == f'nvidia/cuda:{variables["CUDA"]}-base-ubuntu24.04'
    (smoke,) = [output for text, output in ran if text.startswith('composer ')]
    assert 'smoke: batches 0 to 3' in smoke
    assert not (tmp_path / 'tmp' / 'smoke').exists()
    assert not list(workdir.glob('runs/*')), 'the smoke check left something in the volume'


def test_the_last_step_is_the_smoke_check_as_an_ordinary_user():
    names = [name for name, _ in steps()]
    value = dict(steps())
    assert names[-1] == 'RUN' and value['RUN'].startswith('--network=none composer train.py')
    assert names.count('USER') == 1 and value['USER'] == '${UID}' and 'UID=0' not in (ROOT / 'Dockerfile').read_text()
    assert value['VOLUME'] == '["/app/runs", "/app/data"]'


@pytest.mark.parametrize(('torch', 'cuda'), [(None, None), ('2.11', '13.0.2'), ('2.7', '12.6.3')])
def test_cuda_is_the_one_that_torch_was_built_for(torch, cuda):
    """Of the defaults, and of the other stacks that the file names in its comments."""
    variables = dict(value.split('=', 1) for name, value in steps() if name == 'ARG')
    if torch:
        assert {torch, cuda} <= set(re.findall(r'[\d.]+\d', (ROOT / 'Dockerfile').read_text()))
        variables = {**variables, 'TORCH': torch, 'CUDA': cuda}
    pins = constraints(variables['TORCH']).read_text()
    runtime = re.search(r'^(?:nvidia-cuda-runtime(?:-cu\d+)?|cuda-toolkit)==(\d+\.\d+)', pins, re.MULTILINE)
    assert runtime is not None and variables['CUDA'].startswith(f'{runtime[1]}.')


def test_what_commands_write_stays_out_of_the_image(tmp_path):
    junk = [
        '.git/config', '.venv-tread/bin/python', 'runs/x/latest-rank0.pt', 'data/digits/train/shard.00000.mds',
        'tread_composer/__pycache__/cli.pyc', 'tread_composer.egg-info/PKG-INFO', 'samples/grid.png',
        'sweep/sweep.png', 'comparison/page.html', 'inspection/inspection.json', 'model.safetensors', 'snr.png',
    ]  # fmt: skip
    needed = ['train.py', 'tread_composer/data/digits.py', 'tread_composer/cli/sweep.py', 'docs/digits_tread.png']
    for name in (*junk, *needed):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert context(tmp_path) - {'.dockerignore', 'Dockerfile'} == set(needed)
    shipped = {
        str(path.relative_to(ROOT))
        for pattern in ('tread_composer/**/*.py', 'yamls/*.yaml', 'streaming_data/*.py', 'constraints/*.txt')
        for path in ROOT.glob(pattern)
    }
    assert shipped <= context(ROOT)


@pytest.mark.skipif('TREAD_TEST_NETWORK' not in os.environ, reason='asks a package index: TREAD_TEST_NETWORK=1 runs it')
@pytest.mark.parametrize('torch', ['newest', '2.11', '2.7'])
def test_the_packages_resolve(torch, tmp_path):
    (command,) = [
        text
        for name, value in steps()
        if name == 'RUN'
        for text in re.split(r'\s*&&\s*', value)
        if text.startswith('uv pip install') and '--requirement' in text
    ]
    variables = {**dict(value.split('=', 1) for name, value in steps() if name == 'ARG'), 'TORCH': torch}
    image = ['--python-version', '3.12', '--python-platform', 'x86_64-manylinux_2_28']
    words = ['bash', '-c', f'{command} {shlex.join(["--dry-run", "--target", str(tmp_path), *image])}']
    environment = {**os.environ, **variables, 'PATH': f'{BIN}:{os.environ["PATH"]}'}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (pin,) = re.findall(r'^torch==[\d.]+', constraints(torch).read_text(), re.MULTILINE)
    assert f' + {pin}' in done.stderr
