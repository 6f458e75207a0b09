"""Each layout as its own code writes it, and what becomes of it."""

import io
import os
import pickle
import re
import tarfile
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from streaming import LocalDataset

from tests import warm
from tread_composer.cli.import_latents import main
from tread_composer.conversion.importers import Facts, Layout, import_latents, open_layout
from tread_composer.conversion.importers.pickled import array_from_pickle
from tread_composer.conversion.verify import verify
from tread_composer.core.errors import UserError
from tread_composer.data import Manifest

SAMPLES, CHANNELS, SIDE = 60, 3, 4
HASH = 'sha256:' + 64 * '0'
COMMON = ['--autoencoder-id', 'a/b', '--autoencoder-hash', HASH, '--resolution', '32', '--crop', 'center']
COMMON += ['--num-classes', '5']

random = np.random.default_rng(0)
LABELS = np.arange(SAMPLES) // 12  # in class order, as extraction scripts go through image folders
MEANS = random.normal(size=(2, SAMPLES, CHANNELS, SIDE, SIDE)).astype(np.float32)  # of images and of mirror images
LOGVARS = random.normal(size=MEANS.shape).astype(np.float32) * 20 - 8  # some beyond -30..20
MOMENTS = np.concatenate([MEANS, LOGVARS], axis=2)


def tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, 'w') as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def maskdit_lmdb(folder: Path, views: int) -> None:
    lmdb = pytest.importorskip('lmdb')
    environment = lmdb.open(str(folder), map_size=2**24)
    with environment.begin(write=True) as transaction:
        for index in range(SAMPLES * views):
            view, row = divmod(index, SAMPLES)
            transaction.put(f'z-{index}'.encode(), MOMENTS[view, row].tobytes())
            transaction.put(f'y-{index}'.encode(), str(LABELS[row]).encode())
        transaction.put(b'length', str(SAMPLES * views).encode())
    environment.close()


def maskdit_webdataset(folder: Path, views: int) -> None:
    folder.mkdir()
    for shard, start in enumerate(range(0, SAMPLES * views, 25)):
        members = {}
        for index in range(start, min(start + 25, SAMPLES * views)):
            view, row = divmod(index, SAMPLES)
            members[f'{index:07d}.latent'] = pickle.dumps(MOMENTS[view, row], protocol=3 + index % 3)
            members[f'{index:07d}.cls'] = str(LABELS[row]).encode()
        tar(folder / f'latent_imagenet_512_train-{shard:04d}.tar', members)


def tread_webdataset(folder: Path, views: int) -> None:
    del views
    folder.mkdir()
    for shard in range(3):
        rows = range(shard, SAMPLES, 3)
        members = {f'x/{row}.cls': str(LABELS[row]).encode() for row in rows}
        members |= {f'x/{row}.latent.npy': npy(MEANS[0, row] * np.float32(0.18215)) for row in rows}
        tar(folder / f'ImageNetTrain-train-{shard}.tar', members)


def lightningdit(folder: Path, views: int) -> None:
    save_file = pytest.importorskip('safetensors.torch').save_file
    folder.mkdir()
    for rank in range(2):
        rows = slice(rank, SAMPLES, 2)
        tensors = {'latents': MEANS[0][rows], 'latents_flip': MEANS[1][rows], 'labels': LABELS[rows]}
        if views == 1:
            del tensors['latents_flip']
        tensors = {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}
        save_file(tensors, folder / f'latents_rank{rank:02d}_shard000.safetensors')


WRITERS = {'maskdit-lmdb': maskdit_lmdb, 'maskdit-webdataset': maskdit_webdataset,
           'tread-webdataset': tread_webdataset, 'lightningdit': lightningdit}  # fmt: skip
OPTIONS = {
    'maskdit-lmdb': ['--channels', '3'],
    'maskdit-webdataset': [],
    'tread-webdataset': ['--kind', 'samples', '--stored-scale', '0.18215', '--stored-shift', '0'],
    'lightningdit': [],
}


def source(tmp_path: Path, layout: str, views: int = 1) -> tuple[Path, list[str]]:
    folder = tmp_path / 'source'
    WRITERS[layout](folder, views)
    mirrors = ['--mirrors', 'second-half' if views == 2 else 'none'] if layout.startswith('maskdit') else []
    return folder, ['--layout', layout, *OPTIONS[layout], *mirrors]


def run(folder: Path, options: list[str], out: Path) -> int:
    return main([str(folder), *options, *COMMON, '--out', str(out), '--split', 'train'])


def rows_of(split: Path) -> list[dict]:
    return list(LocalDataset(str(split)))


@pytest.mark.parametrize(
    ('layout', 'views'),
    [(layout, views) for layout in WRITERS for views in (1, 2) if (layout, views) != ('tread-webdataset', 2)],
)
def test_every_sample_arrives_raw_with_its_label_and_mirror(layout: str, views: int, tmp_path: Path):
    folder, options = source(tmp_path, layout, views)
    assert run(folder, options, tmp_path / 'set') == 0
    split = tmp_path / 'set' / 'train'
    manifest, rows = Manifest.load(split), rows_of(split)
    moments = layout.startswith('maskdit')
    assert manifest.kind == ('moments' if moments else 'samples') and manifest.mirrored == (views == 2)
    assert manifest.latent_shape == (CHANNELS, SIDE, SIDE) and manifest.class_names == ('0', '1', '2', '3', '4')
    assert (manifest.autoencoder, manifest.autoencoder_hash) == ('a/b', HASH)
    wanted = np.concatenate([MEANS, LOGVARS.clip(-30, 20)], axis=2) if moments else MEANS
    seen = []
    for row in rows:
        (which,) = np.flatnonzero(np.abs(wanted[0, :, 0] - row['latents'][0]).max((1, 2)) < 0.01)
        seen.append(int(which))
        assert row['label'] == LABELS[which]
        for view, column in enumerate(('latents', 'latents_mirrored')[:views]):
            # half precision: 11 significant bits
            np.testing.assert_allclose(row[column].astype(np.float32), wanted[view, which], rtol=2**-11, atol=2e-4)
    assert sorted(seen) == list(range(SAMPLES)) and seen != sorted(seen)
    used = wanted[:views].astype(np.float64)
    mean, second = used[:, :, :CHANNELS], used[:, :, :CHANNELS] ** 2
    if moments:
        second = second + np.exp(used[:, :, CHANNELS:])
    mean, std = mean.mean((0, 1, 3, 4)), np.sqrt(second.mean((0, 1, 3, 4)) - mean.mean((0, 1, 3, 4)) ** 2)
    np.testing.assert_allclose(manifest.mean, mean, rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(manifest.std, std, rtol=1e-2)
    assert verify(split, say=lambda line: None) == []
    assert sorted(path.name for path in (tmp_path / 'set').iterdir()) == ['.train.lock', 'train']


def test_order_depends_on_the_seed_alone(tmp_path: Path):
    folder, options = source(tmp_path, 'lightningdit')
    names = []
    for out, seed in (('a', '1'), ('b', '1'), ('c', '2')):
        assert run(folder, [*options, '--seed', seed], tmp_path / out) == 0
        names.append([row['name'] for row in rows_of(tmp_path / out / 'train')])
    assert names[0] == names[1] != names[2] and set(names[0]) == set(names[2]) and len(set(names[0])) == SAMPLES
    assert 'latents_rank01_shard000.safetensors:29' in names[0]


def test_moments_that_were_scaled_are_raw_again(tmp_path: Path):
    scale, shift = np.array([0.5, -2, 4], np.float32), np.array([1, 0, -1], np.float32)
    stored = MOMENTS[0].copy()
    stored[:, :3] = (stored[:, :3] - shift[:, None, None]) * scale[:, None, None]
    stored[:, 3:] = LOGVARS[0].clip(-20, 10) + 2 * np.log(np.abs(scale))[:, None, None]
    folder = tmp_path / 'source'
    folder.mkdir()
    tar(folder / 'a.tar', {f'{row}.latent.npy': npy(stored[row]) for row in range(SAMPLES)}
        | {f'{row}.cls': b'0' for row in range(SAMPLES)})  # fmt: skip
    options = ['--layout', 'tread-webdataset', '--kind', 'moments', '--stored-scale=0.5,-2,4', '--stored-shift=1,0,-1']
    assert run(folder, options, tmp_path / 'set') == 0
    for row in rows_of(tmp_path / 'set' / 'train'):
        which = int(row['name'].split('/')[1])
        np.testing.assert_allclose(row['latents'][:3], MEANS[0, which], rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(row['latents'][3:], LOGVARS[0, which].clip(-20, 10), rtol=2e-3, atol=2e-3)


def test_the_autoencoder_itself_gives_hash_channels_and_size(tmp_path: Path, capsys: pytest.CaptureFixture):
    diffusers = pytest.importorskip('diffusers')
    block = {'down_block_types': ['DownEncoderBlock2D'] * 4, 'up_block_types': ['UpDecoderBlock2D'] * 4}
    vae = diffusers.AutoencoderKL(**block, block_out_channels=[4] * 4, norm_num_groups=2, latent_channels=CHANNELS)
    vae.save_pretrained(tmp_path / 'vae')
    folder, options = source(tmp_path, 'maskdit-webdataset')
    facts = ['--autoencoder-id', 'a/b', '--autoencoder', str(tmp_path / 'vae'), '--crop', 'center']
    facts += ['--num-classes', '5', '--out', str(tmp_path / 'set'), '--split', 'train']
    assert main([str(folder), *options, *facts, '--resolution', '64']) == 2
    assert '4 x 4 latent pixels are 32 pixels a side' in capsys.readouterr().err
    assert main([str(folder), *options, *facts, '--resolution', '32', '--kind', 'samples']) == 2
    assert 'as samples means 6 channels, 3 are stated. Twice as many are moments' in capsys.readouterr().err
    assert main([str(folder), *options, *facts, '--resolution', '32']) == 0
    from tread_composer.autoencoders import KL

    manifest = Manifest.load(tmp_path / 'set' / 'train')
    assert manifest.autoencoder_hash == KL(str(tmp_path / 'vae')).weight_hash()


def test_facts_that_no_file_carries_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture):
    expected = {
        'maskdit-lmdb': ['--channels or', '--mirrors'],
        'maskdit-webdataset': ['--mirrors'],
        'tread-webdataset': ['--kind', '--stored-scale', '--stored-shift'],
        'lightningdit': [],
    }
    for layout, own in expected.items():
        words = [str(tmp_path), '--layout', layout, '--out', str(tmp_path / 'set'), '--split', 'train']
        assert main(words) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 + 5 + len(own)
        for name in ['--autoencoder-id', '--autoencoder PATH or', '--resolution', '--crop', '--num-classes or', *own]:
            assert sum(line.startswith(f'  {name}') and len(line.split(': ')[1]) > 20 for line in lines) == 1, name
    assert not (tmp_path / 'set').exists()


@pytest.mark.parametrize(
    ('layout', 'options', 'message'),
    [
        ('lightningdit', ['--num-classes', '4'], r'label 4 with 4 classes .* and 11 more'),
        ('lightningdit', ['--autoencoder-hash', 'abc'], 'not of the form sha256'),
        ('lightningdit', ['--mirrors', 'none'], 'belongs to the MaskDiT layouts'),
        ('lightningdit', ['--stored-scale', '0'], 'no scale is zero'),
        ('lightningdit', ['--stored-scale', '1,2'], '2 numbers for 3 channels'),
        ('lightningdit', ['--stored-scale', '1e-9'], 'beyond 65504'),
        ('lightningdit', ['--split', '../train'], 'the name of a folder'),
        ('lightningdit', ['--files', 'x*'], r'no file there matches x\*'),
        ('lightningdit', ['--compression', 'rar'], "compression 'rar' is not known"),
        ('lightningdit', ['--kind', 'moments'], r'shape \(3, 4, 4\) cannot be channels, height, width of moments'),
        ('maskdit-lmdb', ['--channels', '4'], '384 bytes are no square of 8 channels'),
        ('maskdit-lmdb', ['--channels', '0'], 'must be at least 1'),
        ('tread-webdataset', ['--class-names', 'nowhere'], 'class names nowhere: cannot be read'),
    ],
)
def test_what_contradicts_the_files_is_refused(layout, options, message, tmp_path, capsys):
    folder, own = source(tmp_path, layout)
    words = [str(folder), *own, *COMMON, '--out', str(tmp_path / 'set'), '--split', 'train', *options]
    assert main(words) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.glob('set/[!.]*')) and not list(tmp_path.glob('set/.train.partial*'))


def test_no_labels_at_all(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder, options = source(tmp_path, 'lightningdit')
    words = [str(folder), *options, *COMMON, '--num-classes', '0', '--out', str(tmp_path / 'set'), '--split', 'train']
    assert main(words) == 0
    assert 'no classes: the labels of the source are left out' in capsys.readouterr().out
    assert {row['label'] for row in rows_of(tmp_path / 'set' / 'train')} == {0}
    assert Manifest.load(tmp_path / 'set' / 'train').class_names == ()


def test_halves_with_other_labels_are_no_mirror_images(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder, options = source(tmp_path, 'maskdit-webdataset', views=1)
    assert run(folder, [*options, '--mirrors', 'second-half'], tmp_path / 'set') == 2
    assert 'the labels are not the same. Say --mirrors none' in capsys.readouterr().err


def test_a_split_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder, options = source(tmp_path, 'lightningdit')
    assert run(folder, options, tmp_path / 'set') == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / 'set').rglob('*')}
    assert run(folder, options, tmp_path / 'set') == 2
    assert 'is there already and is never overwritten' in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / 'set').rglob('*')} == before


class Endless:
    """A layout that never gets to its end."""

    labels, mirrored, description = np.zeros(10**6, np.int64), False, 'endless'

    def name(self, position: int) -> str:
        return str(position)

    def read(self, position: int) -> list[np.ndarray]:
        time.sleep(0.001)
        return [np.ones((3, 4, 4), np.float32) * position]


FACTS = Facts('samples', 'a', HASH, 32, 'none', tuple('abcde'))


def test_a_killed_import_leaves_nothing_that_counts_and_can_be_run_again(tmp_path: Path):
    folder, options = source(tmp_path, 'lightningdit')
    arguments = (Endless(), tmp_path / 'set', 'train', FACTS)
    process = warm.start(import_latents, *arguments)
    assert warm.wait_until(lambda: list(tmp_path.glob('set/.train.partial-*/shards')), process)
    with pytest.raises(UserError, match='another import is writing this split'):
        import_latents(open_layout('lightningdit', folder), tmp_path / 'set', 'train', FACTS)
    process.kill()
    process.join()
    assert not (tmp_path / 'set' / 'train').exists() and list(tmp_path.glob('set/.train.partial-*'))
    assert run(folder, options, tmp_path / 'set') == 0
    assert not list(tmp_path.glob('set/.train.partial-*')) and verify(tmp_path / 'set', say=lambda line: None) == []


def damaged(layout: Layout, at: int, change) -> Layout:
    read = layout.read

    def changed(position: int) -> list[np.ndarray]:
        arrays = [array.copy() for array in read(position)]
        return change(arrays) if position == at else arrays

    layout.read = changed  # type: ignore[method-assign]
    return layout


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda arrays: [array * np.nan for array in arrays], 'rank00_shard000.safetensors:7: holds NaN'),
        (lambda arrays: [array[:, :2] for array in arrays], r':7: float32 values of shape \(3, 2, 4\), the first'),
        (lambda arrays: [array.astype(int) for array in arrays], ':7: int64 values'),
    ],
)
def test_a_damaged_sample_is_named_and_nothing_is_left(change, message, tmp_path: Path):
    folder, _ = source(tmp_path, 'lightningdit')
    layout = damaged(open_layout('lightningdit', folder), 7, change)
    with pytest.raises(UserError, match=message):
        import_latents(layout, tmp_path / 'set', 'train', FACTS)
    assert [path.name for path in (tmp_path / 'set').iterdir()] == ['.train.lock']


def test_sources_that_are_not_of_the_layout_are_refused(tmp_path: Path):
    pytest.importorskip('lmdb')
    for name in ('empty', 'lmdb', 'tars', 'tensors'):
        (tmp_path / name).mkdir()
    maskdit_lmdb(tmp_path / 'lmdb' / 'train', 1)
    good = {'0.latent.npy': npy(MEANS[0, 0]), '0.cls': b'1'}
    tars = {
        'no label': ({'0.latent.npy': b''}, 'sample 0 has no .cls'),
        'label in words': ({**good, '0.cls': b'cat'}, "the label b'cat' is not a number"),
        'other members': ({**good, '0.jpg': b''}, "member '0.jpg' does not belong to this layout"),
        'twice': (None, 'two members 0.cls'),
        'leads out': ({'../0.cls': b'1'}, 'leads out of the archive'),
    }
    for members, message in tars.values():
        path = tmp_path / 'tars' / 'a.tar'
        if members is None:
            with tarfile.open(path, 'w') as file:
                for _ in range(2):
                    file.addfile(tarfile.TarInfo('0.cls'), io.BytesIO())
        else:
            tar(path, members)
        with pytest.raises(UserError, match=message):
            open_layout('tread-webdataset', tmp_path / 'tars')
    path.write_bytes(b'no tar' * 100)
    with pytest.raises(UserError, match=r'a\.tar: not a tar'):
        open_layout('tread-webdataset', tmp_path / 'tars')
    with pytest.raises(UserError, match=r'no data\.mdb, so no LMDB; there is one in train'):
        open_layout('maskdit-lmdb', tmp_path / 'lmdb', stored_channels=6)
    with pytest.raises(UserError, match='no such folder'):
        open_layout('maskdit-lmdb', tmp_path / 'nowhere', stored_channels=6)
    (tmp_path / 'tensors' / 'a.safetensors').write_text('x')
    with pytest.raises(UserError, match=r'a\.safetensors: cannot be read as safetensors'):
        open_layout('lightningdit', tmp_path / 'tensors')


def test_objects_in_npy_files_are_refused(tmp_path: Path):
    (tmp_path / 'source').mkdir()
    tar(tmp_path / 'source' / 'a.tar', {'0.latent.npy': npy(np.array([Trap()], object)), '0.cls': b'0'})
    layout = open_layout('tread-webdataset', tmp_path / 'source')
    with pytest.raises(UserError, match=r'a\.tar/0\.latent\.npy: .*allow_pickle=False'):
        layout.read(0)
    assert not Trap.sprung


class Trap:
    """Unpickled in the usual way, this runs code."""

    sprung: ClassVar[list[str]] = []

    def __reduce__(self):
        return (Trap.sprung.append, ('sprung',))


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
@pytest.mark.parametrize('dtype', ['<f4', '>f4', '<f2', '<f8'])
@pytest.mark.parametrize('order', ['C', 'F'])
def test_pickled_arrays_are_read_and_programs_are_not_run(protocol: int, dtype: str, order: str):
    array = np.asarray(MEANS[0, 0], dtype, order=order)  # type: ignore[call-overload]
    if protocol == 2:  # bytes are then spelled as a call of _codecs.encode
        with pytest.raises(ValueError, match=r'_codecs\.encode'):
            array_from_pickle(pickle.dumps(array, protocol))
        return
    found = array_from_pickle(pickle.dumps(array, protocol))
    assert found.dtype == array.dtype and np.array_equal(found, array)
    Trap.sprung.clear()
    for trap in (Trap(), [array, Trap()], np.array([Trap()], object), os.system, {'a': 1}, array.astype(int), None):
        data = pickle.dumps(trap, protocol) if trap is not os.system else b'cposix\nsystem\n.'
        with pytest.raises(ValueError, match='not a pickled array of floats'):
            array_from_pickle(data)
    with pytest.raises(ValueError, match='not a pickled array of floats'):
        array_from_pickle(pickle.dumps(array, protocol)[:-5])
    assert not Trap.sprung
