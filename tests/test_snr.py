"""``python -m tread_composer snr``: figures from the data's own statistics, a picture, and what it refuses."""

import math

import numpy as np
import pytest
import torch

from tests.runs import YAMLS
from tread_composer.config import load_config
from tread_composer.data.digits import digits_manifest, load_digits_arrays
from tread_composer.run.snr import latent_std, make_snr


@pytest.fixture
def snr(cli, tmp_path, monkeypatch):
    """What the command prints in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *words, code=0: cli('snr', *(YAMLS / w if w.endswith('.yaml') else w for w in words), code=code)


def row(text, name):
    """Mean, standard deviation and quantiles that a run's line shows."""
    (line,) = [line for line in text.splitlines() if line.startswith(f'{name} ')]
    return [float(word) for word in line.split(')')[1].split()[:5]]


def test_figures_and_picture(snr, tmp_path):
    text = snr('digits.yaml', 'digits_fasterdit.yaml', 'digits_ddpm.yaml').out
    pixels, _ = load_digits_arrays('train')
    strength = 20 * math.log10(pixels.std(dtype=np.float64))
    assert row(text, 'digits') == pytest.approx([strength, 8.7, strength - 14.3, strength, strength + 14.3], abs=0.1)
    assert row(text, 'digits_fasterdit')[0] == pytest.approx(20 * math.log10(0.82), abs=0.06)
    assert row(text, 'digits_ddpm')[:2] == pytest.approx([strength - 11.7, 16.9], abs=0.1)
    assert 'from the manifest' in text and 'dB below' in text and 'lognorm(0, 1), latent std 0.70 to 0.82' in text
    assert [path.name for path in tmp_path.iterdir()] == ['snr.png']
    assert (tmp_path / 'snr.png').read_bytes().startswith(b'\x89PNG')


def test_overrides_hold_for_all_files_and_the_picture_goes_where_it_should(snr, tmp_path):
    picture = tmp_path / 'there' / 'both.png'
    words = ('digits.yaml', 'digits_tread.yaml', 'latent_scale=10.0', '--out', str(picture), 'latent_shift=3.0')
    text = snr(*words).out
    assert row(text, 'digits') == row(text, 'digits_tread')
    assert row(text, 'digits')[0] == pytest.approx(20 - 2.5, abs=0.1)
    assert picture.exists()


def test_the_suffix_says_what_is_written(snr, tmp_path):
    for name, begin in (('x.jpg', b'\xff\xd8\xff'), ('x.PDF', b'%PDF'), ('x.svg', b'<?xml')):
        snr('digits.yaml', '--out', name)
        assert (tmp_path / name).read_bytes().startswith(begin)
    for name in ('x.gif', 'x'):
        assert f"--out: '{name}' names no picture that can be drawn" in snr('digits.yaml', '--out', name, code=2).err
        assert not (tmp_path / name).exists()


def test_a_file_whose_name_holds_an_equals_sign_is_a_file(snr, tmp_path):
    (tmp_path / 'lr=0.1').mkdir()
    (tmp_path / 'lr=0.1' / 'config.yaml').write_text(f'extends: {YAMLS}/digits.yaml')
    assert row(snr(str(tmp_path / 'lr=0.1' / 'config.yaml')).out, 'digits')


def test_without_data_the_strength_must_be_given_and_that_is_said(snr, tmp_path):
    output = snr('dit_xl.yaml', code=2)
    assert 'holds no manifest' in output.err and '--std' in output.err and output.out == ''
    assert list(tmp_path.iterdir()) == []
    text = snr('dit_xl.yaml', 'dit_xl_fasterdit.yaml', '--std', '1.0').out
    assert row(text, 'dit_xl') == [10.4, 10.4, -6.7, 10.4, 27.6]
    assert text.count('1.000 (from --std, not from data)') == 2


def test_strength_counts_what_scaling_and_shifting_leave(tmp_path):
    """Two channels with means of their own: the standard deviation of all values together."""
    draws = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0)).double()
    raw = draws * torch.tensor([[3.0], [0.5]]) + torch.tensor([[1.0], [-2.0]])
    given = digits_manifest('train').model_dump() | {'channels': 2, 'mean': (1.0, -2.0), 'std': (3.0, 0.5)}
    manifest = type(digits_manifest('train'))(**given)
    for override, latents in (
        ('latent_scale=0.5', raw * 0.5),
        ('latent_shift=[1.0, -1.0]', raw - torch.tensor([[1.0], [-1.0]])),
        ('latent_normalization={name: per_channel, std: 0.7}', draws * 0.7),
    ):
        config = load_config(YAMLS / 'digits.yaml', [override])
        assert latent_std(config, manifest) == pytest.approx(float(latents.std()), rel=0.01), override


def test_a_weighting_and_a_shift_are_in_the_density():
    plain = make_snr(load_config(YAMLS / 'digits.yaml'), 1.0).distribution
    shifted = make_snr(load_config(YAMLS / 'digits.yaml', ['objective.time_shift=2.0']), 1.0).distribution
    weighted = make_snr(load_config(YAMLS / 'digits.yaml', ['objective.weighting={name: min_snr}']), 1.0).distribution
    assert shifted.mean - plain.mean == pytest.approx(-20 * math.log10(2), abs=1e-3)
    assert weighted.std < plain.std - 2


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['latent_scale=2.0'], 'give a YAML file before the settings'),
        ([], 'required: YAML'),
        (['digits.yaml', '--std', '0'], '--std: 0.0 must be above 0'),
        (['digits.yaml', '--std', 'nan'], '--std: nan must be above 0'),
        (['digits.yaml', 'latent_scale=[1.0, 2.0]'], 'latent_scale: 2 numbers for 1 channels'),
        (['digits.yaml', '--out', '/dev/null/x.png'], "--out: '/dev/null/x.png' cannot be written"),
    ],
)
def test_refused(snr, words, message):
    assert message in snr(*words, code=2).err
