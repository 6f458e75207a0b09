"""Every method that the YAML files offer, on the digits: it trains, resumes, draws, and logs what the glossary has."""

import re
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml
from composer.loggers import LoggerDestination

from tests.runs import ROOT, SMALL, YAMLS, checkpoint
from tread_composer.data.digits import load_digits_arrays
from tread_composer.weights.trained import load_trained

FAMILY = sorted(path.stem for path in YAMLS.glob('digits*.yaml') if 'tuning' not in path.name)
SIZES = 'patch_size: 2, hidden_size: 16, depth: 8, num_heads: 2'
BACKBONES = {  # a word in the file's name -> SMALL on that backbone
    'lightning': f'model={{name: lightning_dit, {SIZES}}}',
    'mamba2': 'model={name: mamba2_dit, patch_size: 2, hidden_size: 16, depth: 8, head_size: 8, state_size: 4}',
}
DECODER = ('decoder_depth=1', 'decoder_hidden_size=16', 'decoder_num_heads=2')
LOGGED = {
    'digits_tread': {'loss/train/total', 'tread/kept_tokens', 'gradient_norm', 'digits/recognised'},
    'digits_tread_fasterdit': {'loss/train/direction', 'loss/train/mse', 'direction/switch'},
    'digits_maskdit': {'maskdit/mask_ratio', 'maskdit/kept_tokens'},
}
MORE = {
    'digits_tread': ['callbacks.digits_quality={num_samples: 10, num_steps: 1, sampler: euler}'],
    'digits_tread_fasterdit': ['algorithms.direction_schedule={end_time: 0.5dur}'],
}


class Numbers(LoggerDestination):
    """Every value of every number that the last run has logged."""

    history: ClassVar[dict[str, list[float]]] = {}

    def __init__(self) -> None:
        self.history.clear()

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for key, value in metrics.items():
            self.history.setdefault(key, []).append(float(value))


def words(name: str, *more: str) -> list[str]:
    sampler = 'ddpm' if 'ddpm' in name else 'euler'
    numbers = f'loggers.numbers={{name: "{__name__}:Numbers"}}'
    chosen = ['progress_bar=false', 'device=cpu', 'data.local=data', 'loggers.mlflow=null', numbers]
    chosen += [f'callbacks.sample_grid={{interval: 100ba, samples_per_class: 1, num_steps: 2, sampler: {sampler}}}']
    chosen += [text for word, text in BACKBONES.items() if word in name]
    chosen += ['model.learn_sigma=true'] if name == 'digits_ddpm' else []
    chosen += [f'algorithms.maskdit.{word}' for word in DECODER] if 'maskdit' in name else []
    return ['train', str(YAMLS / f'{name}.yaml'), *SMALL, *chosen, *more]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


def glossary() -> set[str]:
    """The keys in the first column of the table."""
    rows = re.findall(r'^\| (`.*?) \|', (ROOT / 'docs' / 'metrics.md').read_text(), re.MULTILINE)
    return {key for row in rows for key in re.findall(r'`([^`]+)`', row)}


@pytest.mark.parametrize('name', FAMILY)
def test_it_trains_resumes_samples_and_logs_what_the_glossary_explains(name, tmp_path, cli):
    more = ['eval_interval=2ba', *MORE.get(name, ())]
    cli(*words(name, *more, 'max_duration=2ba'))
    begun = checkpoint(tmp_path, name)
    cli(*words(name, *more, 'max_duration=4ba'))
    ended = checkpoint(tmp_path, name)
    assert [int(state['timestamp']['Timestamp']['batch']) for state in (begun, ended)] == [2, 4]
    assert any(not torch.equal(begun['model'][key], ended['model'][key]) for key in begun['model'])
    assert (tmp_path / 'runs' / name / 'samples' / 'ba000004.png').stat().st_size > 1000
    logged = {*Numbers.history}
    assert logged >= LOGGED.get(name, {'loss/train/total', 'gradient_norm'})
    assert not logged - glossary() - {f'metrics/eval/loss_time_quarter_{quarter}' for quarter in (2, 3)}


def test_latent_strength_is_kept_as_numbers_and_a_run_resumes_from_them(tmp_path, cli):
    cli(*words('digits_fasterdit', 'max_duration=2ba'))
    pixels, _ = load_digits_arrays('train')
    written = tmp_path / 'runs/digits_fasterdit/config.yaml'
    saved = yaml.safe_load(written.read_text())
    assert 'latent_normalization' not in saved
    assert saved['latent_scale'] == [pytest.approx(0.82 / pixels.std(), rel=1e-5)]
    assert saved['latent_shift'] == [pytest.approx(pixels.mean(), rel=1e-5)]
    model = load_trained(written.parent).model
    assert model.latent_scale.tolist() == [[[pytest.approx(saved['latent_scale'][0])]]]
    # The recipe again, with its `latent_normalization`, and what the run wrote down: both continue it.
    for start, end in ((words('digits_fasterdit'), 3), (['train', str(written)], 4)):
        cli(*start, f'max_duration={end}ba')
        assert checkpoint(tmp_path, 'digits_fasterdit')['timestamp']['Timestamp']['batch'] == end
    stronger = words('digits_fasterdit', 'max_duration=4ba', 'latent_normalization.std=1.0')
    assert 'latent_scale: saved [1.0895' in cli.refusal(*stronger)


def test_both_losses_of_fasterdit_are_recorded_beside_a_route_and_a_window(cli):
    window = 'algorithms.direction_schedule={start_time: 1ba, end_time: 3ba}'
    cli(*words('digits_tread_fasterdit', window, 'max_duration=4ba'))
    total, mse, direction = (Numbers.history[f'loss/train/{name}'] for name in ('total', 'mse', 'direction'))
    assert Numbers.history['direction/switch'] == [0.0, 1.0, 1.0, 0.0]
    for step, on in enumerate((0, 1, 1, 0)):
        assert total[step] == pytest.approx(mse[step] + on * direction[step], rel=1e-5)
    assert set(Numbers.history['tread/kept_tokens']) == {8.0}


def test_one_channel_without_patches_is_refused_before_a_run(tmp_path, cli):
    refused = cli.refusal('train', YAMLS / 'digits_fasterdit.yaml', 'objective.direction_patch=1', 'device=cpu')
    assert 'Set direction_patch to 2' in refused and list(tmp_path.iterdir()) == []
