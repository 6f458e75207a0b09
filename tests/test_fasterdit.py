"""FasterDiT's digits recipes trained: latent strength as numbers that a run keeps, and both losses in the record."""

import pytest
import yaml

from tests.runs import ROOT, SMALL, history, train
from tread_composer.builders.run_folder import check_run_folder
from tread_composer.builders.trainer import build_trainer
from tread_composer.cli import main
from tread_composer.config import load_config
from tread_composer.core.errors import ResumeError
from tread_composer.data.digits import load_digits_arrays
from tread_composer.latent_diffusion import LatentDiffusion

YAMLS = ROOT / 'yamls'
QUIET = (*SMALL, 'loggers.mlflow=null', 'progress_bar=false', 'device=cpu')


def config_of(name, *overrides):
    return load_config(YAMLS / name, [*QUIET, *overrides])


def run_of(config):
    trainer = build_trainer(config)
    trainer.fit()
    trainer.close()
    return trainer


def test_latent_strength_is_kept_as_numbers_and_a_run_resumes_from_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = run_of(config_of('digits_fasterdit.yaml', 'max_duration=2ba', 'save_interval=2ba'))
    pixels, _ = load_digits_arrays('train')
    saved = yaml.safe_load((tmp_path / 'runs/digits_fasterdit/config.yaml').read_text())
    assert 'latent_normalization' not in saved
    assert saved['latent_scale'] == [pytest.approx(0.82 / pixels.std(), rel=1e-5)]
    assert saved['latent_shift'] == [pytest.approx(pixels.mean(), rel=1e-5)]
    model = trainer.state.model
    assert isinstance(model, LatentDiffusion)
    assert model.latent_scale.tolist() == [[[pytest.approx(saved['latent_scale'][0])]]]

    # The recipe again, with its `latent_normalization`, and what the run wrote down: both continue it.
    again = run_of(config_of('digits_fasterdit.yaml', 'max_duration=3ba', 'save_interval=1ba'))
    assert again.state.timestamp.batch == 3
    written = load_config(tmp_path / 'runs/digits_fasterdit/config.yaml', ['max_duration=4ba'])
    check_run_folder(written)
    assert run_of(written).state.timestamp.batch == 4
    stronger = config_of('digits_fasterdit.yaml', 'latent_normalization.std=1.0')
    with pytest.raises(ResumeError, match=r'latent_scale: saved \[1.0895'):
        check_run_folder(stronger)


def test_the_plan_shows_the_numbers(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(['plan', str(YAMLS / 'digits_fasterdit.yaml')]) == 0
    text = capsys.readouterr().out
    assert (
        'latent_normalization:' not in text
        and 'std 0.820 for the network' in text
        and '1.0895' in text
        and '-0.389027' in text
    )
    words = ['algorithms.direction_schedule={start_time: 0.1dur, end_time: 0.5dur}']
    assert main(['plan', str(YAMLS / 'digits_fasterdit.yaml'), *words]) == 0
    assert 'end_time: 0.5dur' in capsys.readouterr().out


def test_one_channel_without_patches_is_refused_before_a_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(['train', str(YAMLS / 'digits_fasterdit.yaml'), 'objective.direction_patch=1', 'device=cpu']) == 2
    assert 'Set direction_patch to 2' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_main_door_records_both_losses(tmp_path):
    """TREAD, FasterDiT and a window together, as a user runs them."""
    window = 'algorithms.direction_schedule={start_time: 1ba, end_time: 3ba}'
    train(tmp_path, 'digits_tread_fasterdit.yaml', window, 'max_duration=4ba')
    total, mse, direction = (history(tmp_path, f'loss/train/{name}') for name in ('total', 'mse', 'direction'))
    assert list(history(tmp_path, 'direction/switch').values()) == [0.0, 1.0, 1.0, 0.0]
    for step, on in enumerate((0, 1, 1, 0)):
        assert total[step] == pytest.approx(mse[step] + on * direction[step], rel=1e-5)
    assert set(history(tmp_path, 'tread/kept_tokens').values()) == {8.0}
