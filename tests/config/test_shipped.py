"""The shipped recipes: each loads, round-trips, and differs from its twin by the route alone."""

import inspect
import os
import pathlib
import subprocess
import sys

import pytest
import yaml

from tread_composer.config import load_config
from tread_composer.config.tree import EDMObjective, FlowMatchingObjective, LogitNormalTimes
from tread_composer.objectives import EDM, FlowMatching

YAMLS = pathlib.Path(__file__).parents[2] / 'yamls'
FILES = sorted(YAMLS.glob('*.yaml'))


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.name)
def test_loads_and_round_trips(path, tmp_path):
    config = load_config(path)
    again = tmp_path / 'again.yaml'
    again.write_text(config.to_yaml())
    assert load_config(again) == config
    assert load_config(again).to_dict() == config.to_dict() == yaml.safe_load(config.to_yaml())


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.name)
def test_header_says_what_to_expect(path):
    header = [line for line in path.read_text().splitlines() if line.startswith('#')]
    for word in ('Paper:', 'Command:', 'Hardware:', 'Expected:', 'Measured by us:'):
        assert any(word in line for line in header), word


@pytest.mark.parametrize('name', ['digits', 'dit_b', 'dit_xl'])
def test_routed_twin_differs_by_route_and_name_only(name):
    dense = load_config(YAMLS / f'{name}.yaml').to_dict()
    routed = load_config(YAMLS / f'{name}_tread.yaml').to_dict()
    assert routed['algorithms'].pop('tread')['selection_rate'] == 0.5
    assert routed.pop('run_name') == f'{name}_tread' != dense.pop('run_name')
    assert routed.pop('save_folder') == f'runs/{name}_tread' != dense.pop('save_folder')  # made from the name
    assert routed == dense


def test_published_hyperparameters():
    config = load_config(YAMLS / 'dit_xl_tread.yaml')
    assert config.global_train_batch_size == 256
    assert config.optimizer.kwargs['lr'] == 1e-4
    assert config.model.arguments()['depth'] == 28
    assert config.algorithms['ema'].kwargs['decay'] == 0.9999
    assert config.algorithms['tread'].kwargs['float32_after'] is True
    assert 'gradient_clipping' not in config.algorithms


def test_objective_sections_have_the_defaults_of_their_classes():
    fields = {name: field.default for name, field in EDMObjective.model_fields.items() if name != 'name'}
    assert fields == {name: parameter.default for name, parameter in inspect.signature(EDM).parameters.items()}
    times = FlowMatching().time_distribution
    assert FlowMatchingObjective().time_distribution == LogitNormalTimes(mean=times.mean, std=times.std)


def test_loading_imports_nothing_heavy_and_writes_nothing(tmp_path):
    code = (
        'import sys; from tread_composer.config import load_config, json_schema; load_config(sys.argv[1]);'
        'print([name for name in ("mlflow", "diffusers", "streaming") if name in sys.modules])'
    )
    command = [sys.executable, '-W', 'ignore', '-c', code, str(YAMLS / 'dit_xl_tread.yaml')]
    environment = {**os.environ, 'PYTHONPATH': str(YAMLS.parent)}
    out = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == '[]'
    assert list(tmp_path.iterdir()) == []
