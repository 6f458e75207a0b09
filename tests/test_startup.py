"""What the programs import, set and look up, in real processes outside of pytest and CI."""

import json
import re
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT, SMALL, command
from tests.watched import watch

# Nothing of these takes less than a tenth of a second, most take seconds.
HEAVY = {'torch', 'numpy', 'composer', 'streaming', 'mlflow', 'transformers', 'torchvision', 'torchmetrics', 'sklearn',
         'scipy', 'matplotlib', 'diffusers', 'pandas', 'pydantic', 'omegaconf'}  # fmt: skip
YAML = str(ROOT / 'yamls' / 'digits_tread.yaml')
PROGRAM = ('-m', 'tread_composer')


_EACH = """
import json, sys
from tread_composer.cli import main
groups, yaml = json.loads(sys.argv[1]), sys.argv[2]
for commands, codes, absent in groups:
    ended = []
    for command in commands.split(';'):
        try:
            ended.append(main([yaml if word == 'YAML' else word for word in command.split()]))
        except SystemExit as end:
            ended.append(end.code)
    brought = sorted(sys.modules.keys() & set(absent))
    assert (ended, brought) == (codes, []), (commands, ended, brought)
"""


def call(folder, *groups):
    """Groups of commands, all in one process; behind each group, its exit codes, and packages that must be absent."""
    listed = [(commands, codes, sorted(absent)) for commands, codes, absent in groups]
    done = watch(folder, ['-c', _EACH, json.dumps(listed), YAML])
    assert done.code == 0 and 'Traceback' not in done.out, done.out
    return done


def test_help_of_every_command_imports_nothing_heavy(tmp_path):
    everything = watch(tmp_path, [*PROGRAM, '--help'])
    assert everything.code == 0 and not everything.packages & HEAVY
    names = re.findall(r'^    (\w+) ', everything.out, re.MULTILINE)
    assert {'train', 'plan', 'sample', 'evaluate', 'sweep', 'inspect', 'import'} <= set(names)
    each = call(tmp_path, ('; '.join(f'{name} --help' for name in names), [0] * len(names), HEAVY))
    assert each.out.count('show this help message') == len(names)
    assert each.out.count('example: python -m tread_composer ') == len(names)


def test_a_command_imports_only_what_it_uses(tmp_path):
    """The lightest first: a later group may bring all that an earlier one may, so nothing is hidden by the order."""
    slips = 'train YAML --lr 1; sample run --steps x --out o; compare only; export run --allow-inexact'
    for_sampling = {'composer', 'streaming', 'mlflow', 'diffusers', 'lmdb'}
    call(
        tmp_path,
        (slips, [2] * 4, HEAVY),
        ('prefetch', [0], for_sampling | {'transformers', 'matplotlib', 'sklearn'}),
        ('sample run --out o --guidance sparse', [2], for_sampling),
        ('plan YAML; train YAML optimzer.lr=1', [0, 2], {'mlflow', 'diffusers', 'lmdb'}),
    )


def test_a_training_run_looks_up_no_foreign_host_and_its_threads_do_not_spin(tmp_path):
    training = watch(tmp_path, command(YAML, *SMALL, 'max_duration=2ba')[1:])
    assert training.code == 0 and 'evaluation loss' in training.out, training.out
    assert 'mlflow' in training.packages and training.foreign_hosts == set()
    settings = training.environment_at('torch')
    assert settings and {values['GOMP_SPINCOUNT'] for values in settings} == {'100000'}


_UNTIL_A_LOOKUP = """
import os, time
from tread_composer.core.process import prepare_process
prepare_process()
from tread_composer.callbacks.mlflow_run import MLflowRun
MLflowRun('x')
end = time.monotonic() + 60
while 'lookup' not in open(os.environ['NOTES']).read() and time.monotonic() < end:
    time.sleep(0.1)
os._exit(0)  # MLflow would try again for 20 s
"""


def test_who_wants_to_report_to_mlflow_may(tmp_path):
    """Also the proof that the watch sees what it is to see."""
    done = watch(tmp_path, ['-c', _UNTIL_A_LOOKUP], {'MLFLOW_DISABLE_TELEMETRY': 'false'})
    assert done.code == 0, done.out
    assert any('mlflow' in host for host in done.foreign_hosts)


# Each with what it does not bring along, from the ground up: none is imported by one before it.
_LARGE = ('composer', 'streaming', 'mlflow', 'transformers', 'diffusers', 'matplotlib', 'sklearn')
_ROOMS = {
    'routing': sorted(HEAVY - {'torch', 'numpy'}),
    'models': _LARGE,
    'objectives': _LARGE,
    'samplers': _LARGE,
    'autoencoders': _LARGE,
    'advisor': _LARGE,
    'data': ('mlflow', 'diffusers'),
    'algorithms': ('mlflow', 'diffusers'),
    'callbacks': (),
}
_SCRIPT = """
import importlib, json, pkgutil, sys, time
import torch
import tread_composer
brought = {}
for name, absent in json.loads(sys.argv[1]).items():
    assert f'tread_composer.{name}' not in sys.modules, name
    assert getattr(tread_composer, name).__name__ == f'tread_composer.{name}' and name in dir(tread_composer)
    brought[name] = [package for package in absent if package in sys.modules]
print('brought', json.dumps(brought))
import diffusers, torch_fidelity
from diffusers import AutoencoderKL
for module in pkgutil.walk_packages(tread_composer.__path__, 'tread_composer.'):
    if not module.name.endswith('__main__'):
        importlib.import_module(module.name)
from tread_composer.callbacks.mlflow_run import MLflowRun
MLflowRun('x')
tread_composer.cli.main(['prefetch'])
time.sleep(1)  # telemetry looks up its host in a thread, at once
"""


@pytest.fixture(scope='module')
def script(tmp_path_factory):
    """A user's script, which has torch before anything of ours."""
    folder = tmp_path_factory.mktemp('script')
    (folder / 'script.py').write_text(_SCRIPT)
    done = watch(folder, ['script.py', json.dumps(_ROOMS)])
    assert done.code == 0, done.out
    return done


def test_the_package_alone_leads_to_its_rooms_and_each_brings_only_what_it_needs(script):
    (brought,) = re.findall('^brought (.*)', script.out, re.MULTILINE)
    assert json.loads(brought) == {name: [] for name in _ROOMS}


def test_no_import_of_ours_nor_our_mlflow_logger_in_a_users_script_looks_up_a_foreign_host(script):
    assert {'mlflow', 'transformers', 'diffusers', 'streaming'} <= script.packages
    assert script.foreign_hosts == set()


def test_a_process_that_has_torch_keeps_its_threads(script):
    assert script.entries[-1]['kind'] == 'end'
    assert {entry['environment']['GOMP_SPINCOUNT'] for entry in script.entries} == {None}


_FILES = [path for folder in ('streaming_data', 'benchmarks') for path in sorted((ROOT / folder).glob('*.py'))]
_SCRIPTS = [str(path) for path in _FILES if "__name__ == '__main__'" in path.read_text()]
_PROGRAMS = {
    'module': [*PROGRAM, 'plan', YAML],
    'console script': [str(Path(sys.executable).parent / 'tread_composer'), 'plan', YAML],
    # These two load no torch, and what they start settles its own.
    **{Path(script).stem: [script, '--help'] for script in _SCRIPTS if Path(script).stem not in ('startup', 'gpu')},
}


@pytest.mark.parametrize('name', _PROGRAMS)
def test_every_program_settles_both_before_torch_and_mlflow_are_loaded(tmp_path, name):
    done = watch(tmp_path, _PROGRAMS[name], stop_at='torch')
    assert done.code == 0 and done.entries, done.out
    assert done.entries[-1]['kind'] in ('import', 'end')  # a parser that needs no torch comes to its end
    for entry in done.entries:
        assert entry['environment'] == {'GOMP_SPINCOUNT': '100000', 'MLFLOW_DISABLE_TELEMETRY': 'true'}, entry['what']


@pytest.mark.parametrize(
    ('variables', 'expected'),
    [
        ({'GOMP_SPINCOUNT': '7', 'MLFLOW_DISABLE_TELEMETRY': 'false'}, ['7', 'false']),
        ({'OMP_WAIT_POLICY': 'active', 'DO_NOT_TRACK': 'true'}, [None, 'true']),
        # MLflow knows no DO_NOT_TRACK but `true`, so ours has to say it.
        *(({'DO_NOT_TRACK': value}, ['100000', 'true']) for value in ('1', 'yes', '')),
        *(({'DO_NOT_TRACK': value}, ['100000', None]) for value in ('0', 'false')),
        ({'DO_NOT_TRACK': '1', 'MLFLOW_DISABLE_TELEMETRY': 'false'}, ['100000', 'false']),
    ],
)
def test_the_users_own_settings_win(tmp_path, variables, expected):
    done = watch(tmp_path, [*PROGRAM, 'plan', YAML], variables, stop_at='torch')
    (settings,) = done.environment_at('torch')
    assert [settings['GOMP_SPINCOUNT'], settings['MLFLOW_DISABLE_TELEMETRY']] == expected
