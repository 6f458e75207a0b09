"""Folders of diffusers: which networks are read, and that nothing is filled in, dropped or taken from elsewhere."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conversion.worlds import make_dc, make_tiny, make_vae
from tread_composer.autoencoders import KL, open_autoencoder
from tread_composer.core.errors import UserError

diffusers = pytest.importorskip('diffusers')

WEIGHTS = 'diffusion_pytorch_model.safetensors'


def refusal(path: Path | str, **options: str) -> str:
    with pytest.raises(UserError) as caught:
        _ = open_autoencoder(str(path), **options).network
    return str(caught.value)


@pytest.mark.parametrize(
    ('make', 'kind', 'output', 'channels'),
    [(make_tiny, 'AutoencoderTiny', 'latents', 5), (make_dc, 'AutoencoderDC', 'latent', 8)],
)
def test_latents_without_variance(make: Callable[[Path], str], kind: str, output: str, channels: int, tmp_path: Path):
    folder = make(tmp_path / 'vae')
    ours, reference = open_autoencoder(folder), getattr(diffusers, kind).from_pretrained(folder).eval()
    assert (ours.is_variational, ours.channels, ours.downsampling) == (False, channels, 4)
    pixels = torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        latents = getattr(reference.encode(pixels), output)
        torch.testing.assert_close(ours.encode(pixels), latents, rtol=0, atol=1e-5)
        assert latents.shape == (2, channels, 4, 6)
        torch.testing.assert_close(ours.decode(latents), reference.decode(latents).sample, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match=f'7 channels .* which decodes {channels}$'):
        ours.decode(torch.zeros(1, 7, 4, 4))


@pytest.mark.parametrize('make', [make_vae, make_tiny, make_dc])
def test_a_tensor_that_is_missing_or_left_over_is_named(make: Callable[[Path], str], tmp_path: Path):
    file = Path(make(tmp_path / 'vae')) / WEIGHTS
    tensors = load_file(file)
    missing = sorted(tensors)[1]
    kept = {name: value for name, value in tensors.items() if name != missing}
    save_file({**kept, 'bn.running_mean': torch.zeros(3)}, file)
    message = refusal(tmp_path / 'vae')
    assert f'{missing}: missing' in message and 'bn.running_mean: no such tensor in this network' in message
    save_file({**kept, missing: torch.zeros(3, 1, 2)}, file)
    assert missing in refusal(tmp_path / 'vae')
    file.write_bytes(file.read_bytes()[:1000])
    assert 'safetensors' in refusal(tmp_path / 'vae')


@pytest.mark.parametrize(
    ('name', 'reason'),
    [
        ('VQModel', 'entries of a table'),
        ('AutoencoderKLQwenImage', 'made for video'),
        ('AutoencoderKLFlux2', 'normalised with statistics that lie in its weights'),
        ('AutoencoderOfTomorrow', 'cannot be used here. Supported: AutoencoderKL, AutoencoderTiny, AutoencoderDC, '),
        (None, '_class_name None'),
    ],
)
def test_networks_of_another_kind_are_refused_in_words(name: str | None, reason: str, tmp_path: Path):
    config = Path(make_vae(tmp_path / 'vae')) / 'config.json'
    config.write_text(json.dumps({**json.loads(config.read_text()), '_class_name': name}))
    message = refusal(tmp_path / 'vae')
    assert f'_class_name {name!r}' in message and reason in message


def test_moments_are_promised_by_the_class(tmp_path: Path):
    with pytest.raises(UserError, match=r"'AutoencoderTiny', which cannot be used here\. Supported: AutoencoderKL,"):
        KL(make_tiny(tmp_path / 'tiny')).encode(torch.zeros(1, 3, 8, 8))


def test_a_subfolder_is_the_one_that_was_named(tmp_path: Path):
    make_vae(tmp_path / 'pipeline' / 'vae')
    assert open_autoencoder(str(tmp_path / 'pipeline'), subfolder='vae').channels == 3
    assert '--autoencoder-subfolder vae' in refusal(tmp_path / 'pipeline')
    make_tiny(tmp_path / 'pipeline')  # diffusers would take it, where the subfolder does not exist
    message = refusal(tmp_path / 'pipeline', subfolder='vea')
    assert "no subfolder 'vea'; folders in it with a config.json: vae" in message


def run_remedy(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that a refusal ends with; a program of Python in this process, which has torch."""
    words = shlex.split(message.splitlines()[-1])
    if words[:2] == ['python', '-c']:
        monkeypatch.setattr(sys, 'argv', ['-c', *words[3:]])
        exec(words[2], {})
    else:
        subprocess.run(words, check=True)


@pytest.mark.parametrize('kind', ['variant', 'pickled', 'renamed'])
def test_the_remedy_for_weights_in_another_file_works(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "it's mine"
    make_vae(folder, **({'safe_serialization': False} if kind == 'pickled' else {}))
    if kind == 'variant':
        (folder / WEIGHTS).unlink()
        diffusers.AutoencoderKL.from_pretrained(make_vae(tmp_path / 'whole')).half().save_pretrained(
            folder, variant='fp16'
        )
    if kind == 'renamed':
        (folder / WEIGHTS).rename(folder / 'model.safetensors')
    message = refusal(folder)
    assert 'no autoencoder with safetensors weights' in message
    run_remedy(message, monkeypatch)
    if kind != 'variant':
        assert open_autoencoder(str(folder)).weight_hash() == KL(make_vae(tmp_path / 'same')).weight_hash()
    assert open_autoencoder(str(folder)).channels == 3


def test_weights_of_diffusers_without_their_configuration(tmp_path: Path):
    folder = Path(make_vae(tmp_path / 'vae'))
    assert 'give the folder that holds both' in refusal(folder / WEIGHTS)
    (folder / 'config.json').unlink()
    assert 'no config.json' in refusal(folder)
    (folder / WEIGHTS).unlink()
    assert re.search('no config.json', refusal(folder))
    (folder / 'config.json').write_text('{"_class_name": "AutoencoderKL"}')
    assert f'{WEIGHTS} is missing; the folder holds config.json' in refusal(folder)
