"""Encoders other than a variational autoencoder, transparency, and scale and shift that the manifest says."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.autoencoders.test_taesd import write_pair
from tests.conversion.worlds import make_dc, make_images, make_tiny, make_vae, manifest, pixels_of, read, words
from tests.runs import SMALL, YAMLS
from tread_composer.autoencoders import PUBLISHED, Published, open_autoencoder
from tread_composer.cli.convert import convert_main as main
from tread_composer.cli.convert import inspect_main as inspect
from tread_composer.conversion.verify import verify
from tread_composer.data.manifest import Manifest


def make_taesd(folder: Path) -> str:
    folder.mkdir()
    write_pair(folder, 6, pooled=True)
    return str(folder / 'taef2_encoder.pth')


@pytest.mark.parametrize(
    ('make', 'name', 'shape'),
    [(make_tiny, 'tiny', (5, 4, 4)), (make_dc, 'tiny', (8, 4, 4)), (make_taesd, 'taef2_encoder', (6, 2, 2))],
)
def test_latents_without_variance_are_samples(
    make: Callable[[Path], str], name: str, shape: tuple[int, ...], source: Path, tmp_path: Path, refused
):
    path, out = make(tmp_path / 'tiny'), tmp_path / 'out'
    refused(main, words(source, out, path, store='sample'), 'have no variance to draw from; leave --store out')
    assert main(words(source, out, path)) == 0
    about, network, rows = Manifest.load(out / 'train'), open_autoencoder(path), read(out / 'train')
    assert (about.kind, about.autoencoder, about.latent_shape) == ('samples', name, shape)
    assert about.autoencoder_hash == network.weight_hash() and verify(out) == []
    pixels = pixels_of(source, rows['name'])
    for column, view in (('latents', pixels), ('latents_mirrored', pixels.flip(-1))):
        np.testing.assert_allclose(rows[column], network.encode(view).numpy(), rtol=1e-3, atol=2e-5)
    picture = tmp_path / 'look.png'
    assert inspect([str(out), '--autoencoder', path, '--count', '4', '--out', str(picture)]) == 0
    assert picture.stat().st_size > 1000


def test_transparent_images_stand_on_a_background_and_are_counted(tmp_path: Path, refused, capsys):
    source, out = make_images(tmp_path / 'in', 6, size=16), tmp_path / 'out'
    mask = Image.new('L', (16, 16), 255)
    mask.paste(0, (0, 0, 16, 8))
    for number in range(3):
        image = Image.new('RGB', (16, 16), (200, 0, 0))
        image.putalpha(mask if number < 2 else 255)
        image.save(source / 'n01440764' / f'{number}.png')
    for background, top, text in (('white', 255, 'on white'), ('#0000ff', 0, 'on #0000ff'), ('stored', 0, 'stored')):
        place = out / background
        assert main(words(source, place, None, background=background, workers=2)) == 0
        printed = capsys.readouterr().out
        assert f'train: 2 images are transparent in places: {"" if text == "stored" else text}' in printed
        assert text in printed and manifest(place / 'train')['background'] == background
        rows = read(place / 'train')
        green = {name: rows['latents'][index, 1] * 127.5 + 127.5 for index, name in enumerate(rows['name'])}
        assert (green['n01440764/0.png'][:8] == top).all() and (green['n01440764/0.png'][8:] == 0).all()
        assert (green['n01440764/2.png'] == 0).all()
    saved = "background: saved 'white', now 'black'"
    refused(main, words(source, out / 'white', None, background='black'), saved)
    refused(main, words(source, out / 'none', None, background='whiet'), '--background whiet: no colour')
    assert '"background": "stored"' in (out / 'stored' / 'conversion.json').read_text()


def test_the_manifest_says_which_scale_and_shift_training_takes(source: Path, tmp_path: Path, cli, monkeypatch):
    """Published ones by the hash of the file; the factor in ``config.json`` may be that of a parent."""
    vae, other = make_vae(tmp_path / 'my-vae', channels=2), make_vae(tmp_path / 'other', channels=2, seed=1)
    digest = hashlib.sha256((tmp_path / 'my-vae' / 'diffusion_pytorch_model.safetensors').read_bytes()).hexdigest()
    monkeypatch.setitem(PUBLISHED, digest, Published('a paper', 0.25, 0.5))
    monkeypatch.chdir(tmp_path)
    printed = {}
    for name, path in (('published', vae), ('measured', other)):
        assert main(words(source, tmp_path / name, path, held_out=9)) == 0
        autoencoder = f'autoencoder={{name: pretrained, path: {path}, id: {Path(path).name}}}'
        data = f'data={{name: latents, local: {tmp_path / name}}}'
        plan = ('plan', YAMLS / 'digits_tread.yaml', *SMALL, autoencoder, data, 'global_train_batch_size=16')
        printed[name] = cli(*plan, 'latent_scale=auto').out
        assert 'WARNING: outside of 0.5 to 2' in cli(*plan, 'latent_scale=40').out
    assert 'latent_scale 0.25, latent_shift 0.5 (published for a paper)' in printed['published']
    assert manifest(tmp_path / 'published' / 'train')['scaling']['scale'] == [0.25]
    assert 'latent_scale: 0.25\nlatent_shift: 0.5\n' in printed['published']
    about = manifest(tmp_path / 'measured' / 'train')
    assert about['scaling']['source'] == 'measured'
    assert 'std 1.000 for the network' in printed['measured'] and '(measured). WARN' not in printed['measured']
    np.testing.assert_allclose(about['scaling']['scale'], 1 / np.array(about['std']), rtol=1e-5)
    np.testing.assert_allclose(about['scaling']['shift'], about['mean'], rtol=1e-5)
