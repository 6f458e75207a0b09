from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conversion.small_sets import SAMPLES, make_rows, write_split
from tread_composer.autoencoders import KL, to_uint8
from tread_composer.cli.convert import inspect_main as main
from tread_composer.conversion.draw import draw
from tread_composer.core.errors import UserError


@pytest.fixture(scope='module')
def kl(vae: str) -> KL:
    return KL(vae)


def tile_of(pixels: torch.Tensor, scale: int) -> np.ndarray:
    """What a sample must look like in the picture: its bytes, enlarged."""
    array = to_uint8(pixels).permute(1, 2, 0).numpy()
    size = (array.shape[1] * scale, array.shape[0] * scale)
    return np.asarray(Image.fromarray(array).resize(size, Image.Resampling.BICUBIC))


def contains(picture: np.ndarray, tile: np.ndarray) -> tuple[int, int] | None:
    """Place of a tile in the picture, to the byte."""
    height, width, _ = tile.shape
    for y in range(picture.shape[0] - height + 1):
        for x in np.flatnonzero((picture[y, :, :] == tile[0, 0]).all(1)).tolist():
            if np.array_equal(picture[y : y + height, x : x + width], tile):
                return y, x
    return None


def test_each_sample_is_decoded_into_a_tile_of_its_own(kl: KL, tmp_path: Path):
    rows = make_rows()
    split = write_split(tmp_path / 'train', rows, autoencoder_hash=kl.weight_hash())
    drawn = draw(split, tmp_path / 'new' / 'x.png', autoencoder=kl, count=5, mirrored=True)
    picture = np.asarray(Image.open(tmp_path / 'new' / 'x.png'))
    places = []
    for position, found in drawn.items():
        row = rows[position]
        assert (found['label'], found['name']) == (row['label'], row['name'])
        for column in ('latents', 'latents_mirrored'):
            mean = torch.from_numpy(row[column][:3].astype(np.float32))
            # two tiles of 8 pixels side by side are enlarged six times to reach 96
            places.append(contains(picture, tile_of(kl.decode(mean[None])[0], 6)))
    assert None not in places and len(set(places)) == 10
    for own, mirror in zip(places[::2], places[1::2], strict=True):
        assert mirror == (own[0], own[1] + 8 * 6 + 2)
    assert places[::2] == sorted(places[::2])


def test_the_choice_depends_on_the_seed_and_a_picture_can_be_made_again(tmp_path: Path):
    split = write_split(tmp_path / 'train', kind='pixels')
    choices = [list(draw(split, tmp_path / f'{i}.png', count=9, seed=seed)) for i, seed in enumerate((0, 0, 1))]
    assert choices[0] == choices[1] != choices[2]
    assert (tmp_path / '0.png').read_bytes() == (tmp_path / '1.png').read_bytes() != (tmp_path / '2.png').read_bytes()
    assert len(choices[0]) == 9
    assert list(draw(split, tmp_path / 'all.png', count=1000)) == list(range(SAMPLES))
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.is_file()) == ['.png'] * 4


def test_pixels_need_no_autoencoder_and_read_compressed_shards(tmp_path: Path):
    rows = make_rows('pixels')
    split = write_split(tmp_path / 'train', rows, kind='pixels', compression='zstd:1')
    drawn = draw(split, tmp_path / 'x.png', count=1)
    picture = np.asarray(Image.open(tmp_path / 'x.png'))
    pixels = torch.from_numpy(rows[next(iter(drawn))]['latents'].astype(np.float32))
    assert contains(picture, tile_of(pixels, 24)) is not None
    assert not list(split.rglob('*.mds')), 'reading must not leave decompressed copies'


def test_labels_and_names_are_in_the_picture(tmp_path: Path):
    pictures = []
    for index, names in enumerate([('a', 'b', 'c', 'd'), ('e', 'b', 'c', 'd'), ('a', 'b', 'c', 'x' * 300)]):
        write_split(tmp_path / str(index), make_rows('pixels'), kind='pixels', class_names=names)
        drawn = draw(tmp_path / str(index), tmp_path / f'{index}.png', count=30)
        pictures.append(np.asarray(Image.open(tmp_path / f'{index}.png')))
    rows = [row['label'] for row in drawn.values()]
    assert {0, 3} <= set(rows)
    for other, label in ((pictures[1], 0), (pictures[2], 3)):
        assert other.shape == pictures[0].shape, 'a long name must not widen the picture'
        changed = np.argwhere((other != pictures[0]).any(2))
        # only below samples of that class (and in the title, which names the split)
        across = (pictures[0].shape[1] - 8) // 104
        top = pictures[0].shape[0] - -(-30 // across) * 140
        columns = {(y // 140, (x - 8) // 104) for y, x in (changed[changed[:, 0] >= top] - [top, 0]).tolist()}
        assert columns == {divmod(i, across) for i, found in enumerate(rows) if found == label}


def test_other_weights_are_refused(kl: KL, tmp_path: Path, refused, capsys: pytest.CaptureFixture):
    write_split(tmp_path / 'set' / 'val')  # says that its weights have another hash
    words = [str(tmp_path / 'set'), '--split', 'val', '--autoencoder', kl.path, '--out', str(tmp_path / 'x.png')]
    refused(main, [*words, '--count', '2'], f'autoencoder_hash: the run expects {kl.weight_hash()!r}')
    refused(main, [*words, '--seed', '-1'], '--seed: -1 must be at least 0')
    split = f'{tmp_path}/set/val'
    refused(main, [split, *words[1:]], f'{split}: is one split; give the folder of the whole data set, {tmp_path}/set')
    refused(main, ['s3://bucket/set', *words[1:]], 's3://bucket/set is a URL; give the folder')
    assert not (tmp_path / 'x.png').exists()
    write_split(tmp_path / 'own' / 'val', autoencoder_hash=kl.weight_hash())
    words[0] = str(tmp_path / 'own')
    assert main([*words, '--count', '2', '--mirrored', '--device', 'cpu']) == 0
    assert capsys.readouterr().out == f'{tmp_path / "x.png"}: 2 samples\n'
    assert Image.open(tmp_path / 'x.png').format == 'PNG'


def test_what_cannot_be_drawn_is_refused(kl: KL, tmp_path: Path):
    latents = write_split(tmp_path / 'latents', make_rows(mirrored=False), autoencoder_hash=kl.weight_hash())
    pixels = write_split(tmp_path / 'pixels', kind='pixels')
    out = tmp_path / 'x.png'
    cases = [
        ((latents, out), {}, 'holds latents of a/b; give it as --autoencoder'),
        ((latents, out), {'autoencoder': kl, 'mirrored': True}, 'holds no latents of mirrored images'),
        ((pixels, out), {'autoencoder': kl}, 'no autoencoder decodes'),
        ((tmp_path / 'nowhere', out), {}, 'no such folder'),
        ((pixels, tmp_path), {}, 'is a folder; give the name of the picture'),
        ((tmp_path, out), {}, 'manifest.json: no such file'),
    ]
    for arguments, keywords, message in cases:
        with pytest.raises(UserError, match=message):
            draw(*arguments, **keywords)
    shard = next(pixels.rglob('*.mds'))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r'the index says .*; copy or prepare the data again'):
        draw(pixels, out, count=SAMPLES)
    assert not out.exists()


def test_a_sample_that_is_not_finite_is_drawn_grey(tmp_path: Path):
    rows = make_rows('pixels', samples=1)
    rows[0]['latents'][:] = 0.5
    split = write_split(tmp_path / 'train', rows, 'pixels', lambda rows: rows[0]['latents'].fill(np.nan), parts=1)
    draw(split, tmp_path / 'x.png', mirrored=True)
    picture = np.asarray(Image.open(tmp_path / 'x.png'))
    assert contains(picture, np.full((48, 48, 3), 128, np.uint8)) is not None
    sound = write_split(tmp_path / 'sound' / 'train', make_rows('pixels', samples=1), 'pixels', parts=1)
    draw(sound, tmp_path / 'y.png', mirrored=True)
    assert Image.open(tmp_path / 'y.png').height < Image.open(tmp_path / 'x.png').height  # whose title warns
