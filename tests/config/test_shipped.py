"""The shipped recipes: each loads, round-trips, and differs from its twin by the route alone."""

import subprocess
import sys

import pytest
import torch
import yaml

from tests.runs import YAMLS, environment
from tread_composer.builders.model import build_denoiser
from tread_composer.config import load_config
from tread_composer.config.tree import backbone_arguments
from tread_composer.objectives import DDPM, FlowMatching, LogitNormal, Uniform

FILES = sorted(YAMLS.glob('*.yaml'))


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.name)
def test_loads_round_trips_and_says_in_its_header_what_to_expect(path, tmp_path):
    config = load_config(path)
    (tmp_path / 'again.yaml').write_text(config.to_yaml())
    again = load_config(tmp_path / 'again.yaml')
    assert again == config
    assert again.to_dict() == config.to_dict() == yaml.safe_load(config.to_yaml())

    header = [line for line in path.read_text().splitlines() if line.startswith('#')]
    for word in ('Paper:', 'Command:', 'Hardware:', 'Expected:', 'Measured by us:'):
        assert any(word in line for line in header), word


PLAIN = ['digits', *(f'{family}_{size}' for family in ('dit', 'sit') for size in ('s', 'b', 'l', 'xl'))]
TWINS = [
    *((name, f'{name}_tread') for name in PLAIN),
    ('digits_fasterdit', 'digits_tread_fasterdit'),
    ('digits_lightning', 'digits_lightning_tread'),
    ('lightning_dit_xl', 'lightning_dit_xl_tread'),
    ('digits_mamba2', 'digits_mamba2_tread'),
    ('mamba2_dit_b', 'mamba2_dit_b_tread'),
    ('dit_xl_fasterdit', 'dit_xl_tread_fasterdit'),
    *((name, f'{name}_tread') for images in ('cifar10', 'tiny_imagenet') for name in (images, f'{images}_edm')),
    *((f'{images}_fasterdit', f'{images}_tread_fasterdit') for images in ('cifar10', 'tiny_imagenet')),
]


@pytest.mark.parametrize(('name', 'twin'), TWINS, ids=[twin for _, twin in TWINS])
def test_routed_twin_differs_by_route_and_name_only(name, twin):
    dense = load_config(YAMLS / f'{name}.yaml').to_dict()
    routed = load_config(YAMLS / f'{twin}.yaml').to_dict()
    tread = routed['algorithms'].pop('tread')
    assert tread['selection_rate'] == 0.5 and tread.get('float32_after', False) == (not name.startswith('digits'))
    assert routed.pop('run_name') == twin != dense.pop('run_name')
    assert routed.pop('save_folder') == f'runs/{twin}' != dense.pop('save_folder')  # made from the name
    assert routed == dense


@pytest.mark.parametrize('size', ['s', 'b', 'l', 'xl'])
def test_the_dit_and_sit_recipes_differ_by_size_and_objective_only(size):
    def recipe(name):
        tree = load_config(YAMLS / f'{name}.yaml').to_dict()
        objective, model = tree.pop('objective'), tree.pop('model')
        return {key: value for key, value in tree.items() if key not in ('run_name', 'save_folder')}, objective, model

    common, edm, model = recipe(f'dit_{size}')
    same, flow, network = recipe(f'sit_{size}')
    assert same == common == recipe('dit_b')[0]
    assert edm == recipe('dit_b')[1] and edm['name'] == 'edm'
    assert model == network and model['preset'] == f'DiT-{size.upper()}/2'
    assert load_config(YAMLS / f'sit_{size}.yaml').objective.instance == FlowMatching(Uniform())
    assert flow['time_distribution'] == {'name': 'uniform'}


def test_fasterdit_is_what_its_paper_says():
    config = load_config(YAMLS / 'dit_xl_fasterdit.yaml')
    assert config.objective.instance == FlowMatching(LogitNormal(0.0, 1.0), direction_weight=1.0)
    assert config.latent_scale == 0.18215 and 'gradient_clipping' not in config.algorithms
    digits = load_config(YAMLS / 'digits_fasterdit.yaml')
    assert digits.objective.instance == FlowMatching(LogitNormal(0.0, 1.0), direction_weight=1.0, direction_patch=2)


def test_published_hyperparameters():
    config = load_config(YAMLS / 'dit_xl_tread.yaml')
    assert config.global_train_batch_size == 256
    assert config.optimizer.kwargs['lr'] == 1e-4
    assert backbone_arguments(config.model)['depth'] == 28
    assert config.algorithms['ema'].kwargs['decay'] == 0.9999
    assert config.algorithms['tread'].kwargs['float32_after'] is True
    assert 'gradient_clipping' not in config.algorithms


def test_dit_s_own_recipe():
    config = load_config(YAMLS / 'dit_xl_ddpm.yaml')
    dense = load_config(YAMLS / 'dit_xl.yaml')
    assert config.objective.instance == DDPM(num_timesteps=1000, beta_start=1e-4, beta_end=0.02, learned_variance=True)
    assert (config.optimizer, config.algorithms, config.label_dropout) == (
        dense.optimizer, dense.algorithms, dense.label_dropout,
    )  # fmt: skip
    with torch.device('meta'):
        network = build_denoiser(config, channels=4, latent_size=32, num_classes=1000)
    assert sum(p.numel() for p in network.parameters()) == 675_129_632


def test_loading_imports_nothing_heavy_and_writes_nothing(tmp_path):
    code = (
        'import sys; from tread_composer.config import load_config, json_schema; load_config(sys.argv[1]);'
        'print([name for name in ("mlflow", "diffusers", "streaming") if name in sys.modules])'
    )
    command = [sys.executable, '-W', 'ignore', '-c', code, str(YAMLS / 'dit_xl_tread.yaml')]
    out = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True)
    assert out.stdout.strip() == '[]'
    assert list(tmp_path.iterdir()) == []
