"""Every method that the YAML files offer, on the digits: it trains, goes on after a stop, and draws samples."""

from pathlib import Path

import pytest
import torch

from tests.runs import ROOT, SMALL, checkpoint
from tread_composer.cli import main

FAMILY = sorted(path.name for path in (ROOT / 'yamls').glob('digits*.yaml') if 'tuning' not in path.name)
QUIET = ('loggers.mlflow=null', 'progress_bar=false', 'device=cpu', 'data.local=data')
GRID = 'callbacks.sample_grid={interval: 100ba, samples_per_class: 1, num_steps: 2'
SIZES = 'patch_size: 2, hidden_size: 16, depth: 8, num_heads: 2'
BACKBONES = {  # a word in the file's name -> SMALL on that backbone
    'lightning': f'model={{name: lightning_dit, {SIZES}}}',
    'mamba2': 'model={name: mamba2_dit, patch_size: 2, hidden_size: 16, depth: 8, head_size: 8, state_size: 4}',
}


def words(name: str, *more: str) -> list[str]:
    sampler = 'ddpm' if 'ddpm' in name else 'euler'
    model = [text for word, text in BACKBONES.items() if word in name]
    model += ['model.learn_sigma=true'] if name == 'digits_ddpm.yaml' else []
    decoder = ()
    if 'maskdit' in name:
        decoder = (
            'algorithms.maskdit.decoder_depth=1',
            'algorithms.maskdit.decoder_hidden_size=16',
            'algorithms.maskdit.decoder_num_heads=2',
        )
    grid = f'{GRID}, sampler: {sampler}}}'
    return ['train', str(ROOT / 'yamls' / name), *SMALL, *QUIET, *model, *decoder, grid, *more]


@pytest.mark.parametrize('name', FAMILY)
def test_it_trains_resumes_and_samples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run = name.removesuffix('.yaml')
    assert main(words(name, 'max_duration=2ba')) == 0
    begun = checkpoint(tmp_path, run)
    assert main(words(name, 'max_duration=4ba')) == 0
    ended = checkpoint(tmp_path, run)
    assert [int(state['timestamp']['Timestamp']['batch']) for state in (begun, ended)] == [2, 4]
    assert any(not torch.equal(begun['model'][key], ended['model'][key]) for key in begun['model'])
    assert (tmp_path / 'runs' / run / 'samples' / 'ba000004.png').stat().st_size > 1000


def test_maskdit_is_tuned_from_its_first_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert main(words('digits_maskdit.yaml', 'max_duration=2ba')) == 0
    assert main(words('digits_maskdit_tuning.yaml', 'max_duration=2ba')) == 0
    first, tuned = (checkpoint(tmp_path, name)['model'] for name in ('digits_maskdit', 'digits_maskdit_tuning'))
    assert first.keys() == tuned.keys()
