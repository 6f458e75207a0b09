import sys
from pathlib import Path

import pytest
import torch

from tests.conversion.worlds import make_vae
from tread_composer.autoencoders import KL, sample_moments
from tread_composer.core.errors import UserError

diffusers = pytest.importorskip('diffusers')


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_vae(tmp_path_factory.mktemp('kl') / 'vae')


def test_encode_gives_moments_and_decode_gives_pixels(folder: str):
    kl = KL(folder)
    pixels = torch.rand(2, 3, 8, 12) * 2 - 1
    moments = kl.encode(pixels)
    assert (moments.shape, moments.dtype) == ((2, 6, 4, 6), torch.float32)
    reference = diffusers.AutoencoderKL.from_pretrained(folder).eval()
    with torch.no_grad():
        posterior = reference.encode(pixels).latent_dist
        torch.testing.assert_close(moments, torch.cat([posterior.mean, posterior.logvar], dim=1), rtol=0, atol=1e-5)
        latents = sample_moments(moments, torch.ones(2, 3, 4, 6))
        torch.testing.assert_close(latents, posterior.mean + posterior.std)
        # raw in, raw out: no scaling factor on the way
        torch.testing.assert_close(kl.decode(latents), reference.decode(latents).sample, rtol=0, atol=1e-5)
    assert kl.decode(latents).shape == (2, 3, 8, 12)
    assert (kl.channels, kl.downsampling) == (3, 2)


def test_network_is_frozen_and_float32_even_under_autocast(folder: str):
    kl = KL(folder)
    assert not kl.network.training
    assert not any(parameter.requires_grad for parameter in kl.network.parameters())
    pixels = torch.rand(1, 3, 8, 8, requires_grad=True)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        moments = kl.encode(pixels)
        decoded = kl.decode(moments[:, :3])
    assert moments.dtype == decoded.dtype == torch.float32
    assert not moments.requires_grad
    assert torch.equal(moments, kl.encode(pixels))
    assert kl.encode(pixels.half()).dtype == torch.float32


def test_brain_floats_on_demand(folder: str):
    kl, pixels = KL(folder), torch.rand(2, 3, 8, 8) * 2 - 1
    latents = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for function, x in ((kl.encode, pixels), (kl.decode, latents)):
        exact, rough = function(x), function(x, dtype=torch.bfloat16)
        assert exact.dtype == rough.dtype == torch.float32 and 1e-4 < (exact - rough).abs().max() < 0.1
        with pytest.raises(ValueError, match='float32 or bfloat16; half precision overflows'):
            function(x, dtype=torch.float16)


def test_half_precision_weights_are_widened(folder: str, tmp_path: Path):
    diffusers.AutoencoderKL.from_pretrained(folder).half().save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in KL(str(tmp_path)).network.parameters()} == {torch.float32}


def test_weights_are_loaded_on_first_use(tmp_path: Path):
    kl = KL(str(tmp_path / 'later'))
    make_vae(tmp_path / 'later')
    assert kl.channels == 3


@pytest.mark.parametrize('path', ['./no/such/folder', '/no/such', 'no_such_folder', '~/vae'])
def test_a_mistyped_folder_is_refused_without_asking_the_network(path: str):
    with pytest.raises(ValueError, match='no such folder'):
        KL(path).network  # noqa: B018


def test_wrong_sizes_are_refused(folder: str):
    with pytest.raises(ValueError, match='8 x 9 pixels: both sides must be multiples of 2'):
        KL(folder).encode(torch.zeros(1, 3, 8, 9))
    with pytest.raises(ValueError, match=r'6 channels .* which decodes 3; moments must be sampled first'):
        KL(folder).decode(torch.zeros(1, 6, 4, 4))


def test_diffusers_is_needed_for_the_network_alone_and_its_absence_is_explained(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, 'diffusers', None)  # as if it were not installed
    kl = KL('a/b')
    with pytest.raises(ValueError, match=r"pip install 'tread_composer\[diffusers\]'"):
        kl.network  # noqa: B018


def test_weights_that_did_not_make_the_latents_are_refused(folder):
    autoencoder = KL(folder)
    autoencoder.expected_hash = KL(folder).weight_hash()
    assert autoencoder.decode(torch.zeros(1, autoencoder.channels, 2, 2)).shape[0] == 1
    other = KL(folder)
    other.expected_hash = 'sha256:0'
    with pytest.raises(UserError, match=r'not those that made the latents .*sha256:0.*other_weights: true'):
        other.decode(torch.zeros(1, 4, 2, 2))
