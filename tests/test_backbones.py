"""Backbones other than DiT, from configuration to exported file. What they refuse: ``config/test_refusals.py``."""

from pathlib import Path

import pytest
import torch

from tests.runs import SMALL, YAMLS, Run, export, launch_here, predict, run
from tread_composer.builders.model import build_denoiser
from tread_composer.config import json_schema, load_config, restore_config
from tread_composer.models import BACKBONES, LightningDiT
from tread_composer.objectives import FlowMatching
from tread_composer.routing import apply_tread
from tread_composer.weights.exported import read_exported
from tread_composer.weights.trained import load_trained

LIGHTNING = 'model={name: lightning_dit, patch_size: 2, hidden_size: 16, depth: 8, num_heads: 2}'


@pytest.mark.parametrize('words', [[], ['algorithms.tread.token_arguments=[rope]']])
def test_a_route_follows_what_the_network_declares(words):
    config = load_config(YAMLS / 'digits_tread.yaml', [LIGHTNING, *words])
    network = build_denoiser(config, channels=1, latent_size=8, num_classes=10)
    tread, seen = config.algorithms['tread'].instance, []
    apply_tread(network, tread.routes, token_arguments=tread.token_arguments)
    network.blocks[2].register_forward_pre_hook(lambda _, inputs: seen.extend(x.shape[1] for x in inputs[::2]))
    network.train()(torch.empty(4, 1, 8, 8), torch.empty(4), torch.zeros(4, dtype=torch.int64))
    assert seen == [8, 8]  # the tokens of the route, and their rotary rows


def test_tables_that_do_not_fit_the_route_end_a_run_with_the_reason(digits, tmp_path):
    """Only the first training forward can tell: one message, no traceback."""
    words = (LIGHTNING, 'algorithms.tread.token_arguments={rope: -1}', f'data.local={digits}')
    done = launch_here(tmp_path, YAMLS / 'digits_lightning_tread.yaml', *SMALL, *words)
    assert done.returncode == 2, done.stderr
    assert "algorithms.tread: token argument 'rope': expected a tensor with 16 tokens" in done.stderr
    assert 'Traceback' not in done.stderr


def test_every_backbone_says_what_belongs_to_its_tokens_and_has_a_section():
    sections = json_schema()['properties']['model']['oneOf']
    assert {section['properties']['name'].get('const') for section in sections} - {None} == BACKBONES.keys()
    assert all(isinstance(backbone.token_arguments, tuple) for backbone in BACKBONES.values())
    assert BACKBONES['lightning_dit'].token_arguments == ('rope',)


def test_a_model_without_a_name_is_a_dit():
    config = load_config(YAMLS / 'digits.yaml')
    tree = config.to_dict()
    assert tree['model'].pop('name') == 'dit' and restore_config(tree) == config


def test_all_settings_reach_the_network():
    words = ['model.qk_norm=true', 'model.mlp_ratio=3.0', 'model.learn_sigma=true', 'objective={name: ddpm}',
             'callbacks.sample_grid.sampler=ddpm']  # fmt: skip
    config = load_config(YAMLS / 'digits_lightning.yaml', words)
    network = build_denoiser(config, channels=1, latent_size=8, num_classes=10)
    assert isinstance(network, LightningDiT) and network.out_channels == 2
    shapes = {name: tuple(value.shape) for name, value in network.blocks[0].state_dict().items()}
    assert shapes['mlp.w12.weight'] == (2 * 192, 96) and shapes['attn.q_norm.weight'] == (24,)


def test_the_recipe_is_the_published_one():
    config = load_config(YAMLS / 'lightning_dit_xl.yaml')
    assert config.optimizer.kwargs == {'lr': 2e-4, 'betas': [0.9, 0.95], 'eps': 1e-8, 'weight_decay': 0.0}
    assert (config.global_train_batch_size, config.max_duration) == (1024, '80000ba')
    objective = config.objective.instance
    assert isinstance(objective, FlowMatching) and objective.direction_weight == 1
    assert objective.sampling_shift == pytest.approx(1 / 0.3)
    assert 'gradient_clipping' not in config.algorithms and config.algorithms['ema'].kwargs == {'decay': 0.9999}
    with torch.device('meta'):
        network = build_denoiser(config, channels=32, latent_size=16, num_classes=1000)
    assert sum(p.numel() for p in network.parameters()) == 675_256_736


@pytest.fixture(scope='module')
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    words = [LIGHTNING, 'algorithms.ema.decay=0.5', 'model.qk_norm=true']
    return run(tmp_path_factory.mktemp('lightning'), 'digits_lightning_tread.yaml', *words)


def test_a_run_is_loaded_exported_and_loaded_again(trained: Run, tmp_path: Path):
    assert torch.equal(predict(load_trained(trained.folder, weights='raw').model.denoiser), predict(trained.denoiser))
    made = export(trained.folder, tmp_path / 'ema.safetensors')
    again = load_trained(made['out'])
    assert torch.equal(predict(again.model.denoiser), predict(load_trained(trained.folder).model.denoiser))
    assert read_exported(made['out']).config.model.name == 'lightning_dit'
    assert again.model.denoiser(torch.randn(1, 1, 12, 6), torch.rand(1), torch.tensor([3])).shape == (1, 1, 12, 6)


def test_sparse_guidance_routes_it(trained: Run, tmp_path: Path, cli):
    def images(name: str, *words: str) -> list[bytes]:
        shown = ['--count', '2', '--steps', '2', '--device', 'cpu', '--guidance-scale', '3']
        cli('sample', trained.folder, '--out', tmp_path / name, *shown, *words)
        return [path.read_bytes() for path in sorted((tmp_path / name).rglob('*.png'))]

    sparse = images('sparse', '--guidance', 'sparse', '--strong-rate', '0.25', '--weak-rate', '0.75')
    assert len(sparse) >= 2 and sparse != images('plain')
