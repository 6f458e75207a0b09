"""Each layout as its own code writes it, and what becomes of it, by the function of the command line."""

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.conversion.layouts import write_tar
from tests.conversion.worlds import digests, make_vae, read
from tread_composer.autoencoders import KL
from tread_composer.cli.convert import import_main as main
from tread_composer.cli.convert import verify_main
from tread_composer.conversion.importers.layouts import array_from_pickle
from tread_composer.conversion.splits import permutation
from tread_composer.conversion.verify import verify
from tread_composer.data import Manifest

SAMPLES, CHANNELS, SIDE = 60, 3, 4
HASH = 'sha256:' + 64 * '0'
COMMON = f'--autoencoder-id a/b --autoencoder-hash {HASH} --resolution 32 --crop center --num-classes 5'.split()

random = np.random.default_rng(0)
LABELS = np.arange(SAMPLES) // 12  # in class order, as extraction scripts go through image folders
MEANS = random.normal(size=(2, SAMPLES, CHANNELS, SIDE, SIDE)).astype(np.float32)  # of images and of mirror images
LOGVARS = random.normal(size=MEANS.shape).astype(np.float32) * 20 - 8  # some beyond -30..20
MOMENTS = np.concatenate([MEANS, LOGVARS], axis=2)
SCALED = MEANS[0] * np.float32(0.18215)


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
    for shard, start in enumerate(range(0, SAMPLES * views, 25)):
        members = {}
        for index in range(start, min(start + 25, SAMPLES * views)):
            view, row = divmod(index, SAMPLES)
            members[f'{index:07d}.latent'] = pickle.dumps(MOMENTS[view, row], protocol=3 + index % 3)
            members[f'{index:07d}.cls'] = str(LABELS[row]).encode()
        write_tar(folder / f'latent_imagenet_512_train-{shard:04d}.tar', members)


def tread_webdataset(folder: Path, views: int) -> None:
    del views
    for shard in range(3):
        rows = range(shard, SAMPLES, 3)
        members = {f'x/{row}.cls': str(LABELS[row]).encode() for row in rows}
        write_tar(
            folder / f'ImageNetTrain-train-{shard}.tar',
            members | {f'x/{row}.latent.npy': npy(SCALED[row]) for row in rows},
        )


def lightningdit(folder: Path, views: int) -> None:
    folder.mkdir()
    for rank in range(2):
        rows = slice(rank, SAMPLES, 2)
        arrays = {'latents': MEANS[0][rows], 'labels': LABELS[rows]}
        if views == 2:
            arrays['latents_flip'] = MEANS[1][rows]
        tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
        save_file(tensors, folder / f'latents_rank{rank:02d}_shard000.safetensors')


def repa(folder: Path, views: int) -> None:
    del views
    labels = []
    for row in range(SAMPLES):
        name = f'{row // 25:05d}/img-mean-std-{row:08d}.npy'
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / name, np.concatenate([MEANS[0, row], np.exp(LOGVARS[0, row] / 2)]))
        labels.append([name, int(LABELS[row])])
    (folder / 'dataset.json').write_text(json.dumps({'labels': labels}))


def fast_dit(folder: Path, views: int) -> None:
    del views
    for kind, arrays in (('features', SCALED), ('labels', LABELS)):
        (folder / f'imagenet256_{kind}').mkdir(parents=True)
        for row in range(SAMPLES):
            np.save(folder / f'imagenet256_{kind}' / f'{row}.npy', arrays[row : row + 1])


WRITERS = {'repa': repa, 'fast-dit': fast_dit, 'maskdit-lmdb': maskdit_lmdb, 'maskdit-webdataset': maskdit_webdataset,
           'tread-webdataset': tread_webdataset, 'lightningdit': lightningdit}  # fmt: skip
HAVE_MIRRORS = ('maskdit-lmdb', 'maskdit-webdataset', 'lightningdit')
OPTIONS = {
    'maskdit-lmdb': '--channels 3',
    'tread-webdataset': '--kind samples --stored-scale 0.18215 --stored-shift 0',
    'lightningdit': f'--num-images {SAMPLES}',
    'fast-dit': f'--stored-scale 0.18215 --stored-shift 0 --num-images {SAMPLES}',
}


def described(folder: Path, layout: str, options: str | None = None) -> list[str]:
    """The words that name a source and say what it is."""
    return [str(folder), '--layout', layout, *(OPTIONS.get(layout, '') if options is None else options).split()]


def source(tmp_path: Path, layout: str, views: int = 1) -> list[str]:
    """Writes ``tmp_path / 'source'``, and describes it."""
    WRITERS[layout](tmp_path / 'source', views)
    mirrors = ['--mirrors', 'second-half' if views == 2 else 'none'] if layout.startswith('maskdit') else []
    return [*described(tmp_path / 'source', layout), *mirrors]


def into(out: Path, *options: str) -> list[str]:
    return [*COMMON, '--out', str(out), '--split', 'train', *options]


@pytest.fixture
def rejected(refused: Callable[..., str], tmp_path: Path) -> Callable[..., str]:
    """An import into ``tmp_path / 'set'`` that is refused with a message that matches."""
    return lambda words, match, *options: refused(main, [*words, *into(tmp_path / 'set', *options)], match=match)


def test_the_home_folder_is_meant_wherever_it_is_written(tmp_path: Path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    names = [*'abcde']
    (tmp_path / 'names.txt').write_text('\n'.join(names))
    words = source(tmp_path, 'fast-dit')
    # Only the first of them would be expanded by a shell.
    assert main(['~/source', *words[1:], *COMMON, '--out=~/set', '--class-names=~/names.txt', '--split=train']) == 0
    assert Manifest.load(tmp_path / 'set' / 'train').class_names == tuple(names)
    assert verify_main(['~/set']) == 0


@pytest.mark.parametrize(
    ('layout', 'views'),
    [(layout, views) for layout in WRITERS for views in (1, 2) if views < 2 or layout in HAVE_MIRRORS],
)
def test_every_sample_arrives_raw_with_its_label_and_mirror(layout: str, views: int, tmp_path: Path):
    assert main([*source(tmp_path, layout, views), *into(tmp_path / 'set', '--part-size', '25')]) == 0
    split = tmp_path / 'set' / 'train'
    manifest, rows = Manifest.load(split), read(split)
    moments = layout.startswith(('maskdit', 'repa'))
    assert manifest.kind == ('moments' if moments else 'samples') and manifest.mirrored == (views == 2)
    assert manifest.latent_shape == (CHANNELS, SIDE, SIDE) and manifest.class_names == ('0', '1', '2', '3', '4')
    assert (manifest.autoencoder, manifest.autoencoder_hash) == ('a/b', HASH)
    assert manifest.source.startswith('imported: ') and manifest.permutation_seed == 0
    expected = np.concatenate([MEANS, LOGVARS.clip(-30, 20)], axis=2) if moments else MEANS
    samples = []
    for row in range(SAMPLES):
        (which,) = np.flatnonzero(np.abs(expected[0, :, 0] - rows['latents'][row, 0]).max((1, 2)) < 0.01)
        samples.append(int(which))
        assert rows['label'][row] == LABELS[which]
        for view, column in enumerate(('latents', 'latents_mirrored')[:views]):
            # half precision: 11 significant bits
            stored = rows[column][row].astype(np.float32)
            np.testing.assert_allclose(stored, expected[view, which], rtol=2**-11, atol=2e-4)
    assert sorted(samples) == list(range(SAMPLES)) and samples != sorted(samples)
    used = expected[:views].astype(np.float64)
    mean, second = used[:, :, :CHANNELS], used[:, :, :CHANNELS] ** 2
    if moments:
        second = second + np.exp(used[:, :, CHANNELS:])
    mean, std = mean.mean((0, 1, 3, 4)), np.sqrt(second.mean((0, 1, 3, 4)) - mean.mean((0, 1, 3, 4)) ** 2)
    np.testing.assert_allclose(manifest.mean, mean, rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(manifest.std, std, rtol=1e-2)
    assert verify(split) == []
    assert sorted(path.name for path in (tmp_path / 'set').iterdir()) == ['.lock', 'conversion.json', 'train']


def test_order_depends_on_the_seed_alone(tmp_path: Path):
    words, names = source(tmp_path, 'lightningdit'), []
    for out, seed, part_size in (('a', '1', '8192'), ('b', '1', '7'), ('c', '2', '8192')):
        assert main([*words, *into(tmp_path / out, '--seed', seed, '--part-size', part_size)]) == 0
        names.append(read(tmp_path / out / 'train')['name'])
    stored = [f'latents_rank{rank:02d}_shard000.safetensors:{row}' for rank in range(2) for row in range(SAMPLES // 2)]
    assert names[0] == names[1] == [stored[position] for position in permutation(SAMPLES, 1, 'train')] != names[2]
    assert set(names[2]) == set(stored)


def test_moments_that_were_scaled_are_raw_again(tmp_path: Path):
    scale, shift = np.array([0.5, -2, 4], np.float32), np.array([1, 0, -1], np.float32)
    stored = MOMENTS[0].copy()
    stored[:, :3] = (stored[:, :3] - shift[:, None, None]) * scale[:, None, None]
    stored[:, 3:] = LOGVARS[0].clip(-20, 10) + 2 * np.log(np.abs(scale))[:, None, None]
    members = {f'{row}.latent.npy': npy(stored[row]) for row in range(SAMPLES)}
    write_tar(tmp_path / 'source' / 'a.tar', members | {f'{row}.cls': b'0' for row in range(SAMPLES)})
    options = '--kind moments --stored-scale 0.5 -2 4 --stored-shift 1 0 -1'
    assert main([*described(tmp_path / 'source', 'tread-webdataset', options), *into(tmp_path / 'set')]) == 0
    rows = read(tmp_path / 'set' / 'train')
    which = [int(name.split('/')[1]) for name in rows['name']]
    np.testing.assert_allclose(rows['latents'][:, :3], MEANS[0, which], rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(rows['latents'][:, 3:], LOGVARS[0, which].clip(-20, 10), rtol=2e-3, atol=2e-3)


def test_the_autoencoder_itself_gives_hash_channels_and_size(tmp_path: Path, refused):
    vae = make_vae(tmp_path / 'vae', levels=4, channels=CHANNELS)
    words = [*source(tmp_path, 'maskdit-webdataset'), '--autoencoder-id', 'a/b', '--autoencoder', vae, '--crop']
    words += ['center', '--num-classes', '5', '--out', str(tmp_path / 'set'), '--split', 'train', '--resolution']
    refused(main, [*words, '64'], '4 x 4 latent pixels are 32 pixels a side')
    wrong = 'as samples means 6 channels, 3 are stated; is --kind right'
    refused(main, [*words, '32', '--kind', 'samples'], wrong)
    assert main([*words, '32']) == 0
    assert Manifest.load(tmp_path / 'set' / 'train').autoencoder_hash == KL(vae).weight_hash()


@pytest.mark.parametrize(
    ('layout', 'particular'),
    [
        ('maskdit-lmdb', ['--channels or', '--mirrors']),
        ('maskdit-webdataset', ['--mirrors']),
        ('tread-webdataset', ['--kind', '--stored-scale', '--stored-shift']),
        ('lightningdit', ['--num-images']),
        ('repa', []),
        ('fast-dit', ['--stored-scale', '--stored-shift', '--num-images']),
    ],
)
def test_facts_that_no_file_carries_are_asked_for(layout: str, particular: list[str], tmp_path: Path, refused):
    out = tmp_path.parent / 'x'
    lines = refused(main, [*described(tmp_path, layout, '--split train'), '--out', str(out)]).splitlines()
    common = ['--autoencoder-id', '--autoencoder or --autoencoder-hash', '--resolution', '--crop', '--num-classes or']
    assert len(lines) == 1 + 5 + len(particular)
    for name in [*common, *particular]:
        assert sum(line.startswith(f'  {name}') and len(line.split(': ')[1]) > 20 for line in lines) == 1, name
    assert not out.exists()


@pytest.mark.parametrize(
    ('layout', 'options', 'message'),
    [
        ('lightningdit', '--num-classes 4', r'label 4 with 4 classes .* and 11 more'),
        ('lightningdit', '--autoencoder-hash abc', 'not of the form sha256'),
        ('lightningdit', '--autoencoder x/y', '--autoencoder or --autoencoder-hash, not both'),
        ('lightningdit', '--mirrors none', 'belongs to the MaskDiT layouts'),
        ('lightningdit', '--stored-scale 0', 'no scale is zero'),
        ('lightningdit', '--stored-scale 1 2', '2 numbers for 3 channels'),
        ('lightningdit', '--split ../train', r"invalid choice: '\.\./train'"),
        ('lightningdit', '--files x*', r'no file there matches x\*'),
        ('lightningdit', '--kind moments', r'shape \(3, 4, 4\) cannot be channels, height, width of moments'),
        ('maskdit-lmdb', '--channels 4', '384 bytes are no square of 8 channels'),
        ('maskdit-lmdb', '--channels 0', '--channels: 0 must be at least 1'),
        ('maskdit-webdataset', '--mirrors second-half', 'the labels are not the same. Say --mirrors none'),
        ('tread-webdataset', '--class-names nowhere', '--class-names nowhere: cannot be read'),
    ],
)
def test_what_contradicts_the_files_is_refused_and_leaves_no_trace(layout, options, message, tmp_path, rejected):
    rejected(source(tmp_path, layout), message, *options.split())
    assert not (tmp_path / 'set').exists()


def test_labels_that_are_left_out_are_zeros_and_absent_ones_are_not(tmp_path: Path, rejected, capsys):
    assert main([*source(tmp_path, 'lightningdit'), *into(tmp_path / 'none', '--num-classes', '0')]) == 0
    assert 'no classes: the labels of the source are left out' in capsys.readouterr().out
    assert set(read(tmp_path / 'none' / 'train')['label']) == {0}
    assert Manifest.load(tmp_path / 'none' / 'train').class_names == ()
    repa(tmp_path / 'repa', 1)
    (tmp_path / 'repa' / 'dataset.json').write_text('{"labels": null}')
    rejected(described(tmp_path / 'repa', 'repa'), 'label -1 with 5 classes')


def test_a_split_is_never_overwritten(tmp_path: Path, rejected, capsys):
    words, out = source(tmp_path, 'lightningdit'), tmp_path / 'set'
    assert main([*words, *into(out)]) == 0
    before = digests(out)
    assert main([*words, *into(out)]) == 0 and 'finished already, nothing to do' in capsys.readouterr().out
    rejected(words, 'seed: saved 0, now 1', '--seed', '1')
    rejected(words, r'stored_scale: saved \[1.0\], now \[2.0\]', '--stored-scale', '2')
    assert digests(out) == before
    assert main([*words, *into(out, '--split', 'val')]) == 0  # a second one of the same data set is added
    assert Manifest.load(out / 'val').num_samples == SAMPLES


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda array: array * np.nan, r'a\.tar/7: channel 0 .* half precision cannot \(NaN, or beyond'),
        (lambda array: array * 1e9, r'a\.tar/7: channel \d .* beyond 65504\).*--stored-scale is wrong'),
        (lambda array: array[:, :2], r'a\.tar/7: cannot be read: float32 values of shape \(3, 2, 4\), the first'),
        (lambda array: array.astype(int), r'a\.tar/7: cannot be read: int64 values'),
    ],
)
def test_a_damaged_sample_is_named_and_no_split_comes_of_it(change, message, tmp_path: Path, rejected):
    arrays = [change(array) if row == 7 else array for row, array in enumerate(MEANS[0, :9])]
    members = {f'{row}.latent.npy': npy(array) for row, array in enumerate(arrays)}
    write_tar(tmp_path / 'source' / 'a.tar', members | {f'{row}.cls': b'0' for row in range(9)})
    rejected(described(tmp_path / 'source', 'tread-webdataset'), message)
    assert not list((tmp_path / 'set' / 'train').iterdir())


class Trap:
    """Unpickled in the usual way, this runs code."""

    sprung: ClassVar[list[str]] = []

    def __reduce__(self):
        return (Trap.sprung.append, ('sprung',))


def test_sources_that_are_not_of_the_layout_are_refused(tmp_path: Path, rejected):
    good = {'0.latent.npy': npy(MEANS[0, 0]), '0.cls': b'1'}
    tars, words = tmp_path / 'tars' / 'a.tar', described(tmp_path / 'tars', 'tread-webdataset')
    for members, message in (
        ({'0.latent.npy': b''}, "have no label, such as '0.latent.npy'"),
        ({**good, '0.cls': b'cat'}, "is b'cat', not a whole number"),
        ({**good, '0.jpg': b''}, "member '0.jpg' does not belong to this layout"),
        ({'../0.cls': b'1'}, 'is no plain relative path'),
        ({**good, '0.latent.npy': b'x'}, 'a.tar/0: cannot be read: latent.npy'),
        ({**good, '0.latent.npy': npy(np.array([Trap()], object))}, 'allow_pickle=False'),
    ):
        write_tar(tars, members)
        rejected(words, message)
    assert not Trap.sprung
    with tarfile.open(tars, 'w') as file:
        for _ in range(2):
            file.addfile(tarfile.TarInfo('0.cls'), io.BytesIO())
    rejected(words, "two cls files of key '0'")
    tars.write_bytes(b'no tar' * 100)
    rejected(words, 'a.tar: not a tar')
    (tmp_path / 'tensors').mkdir()
    (tmp_path / 'tensors' / 'a.safetensors').write_text('x')
    rejected(described(tmp_path / 'tensors', 'lightningdit'), 'a.safetensors: cannot be read as safetensors')
    for labels in ([0, 1.5], [[0], [1]]):
        tensors = {'latents': torch.zeros(2, 3, 4, 4), 'labels': torch.tensor(labels)}
        save_file(tensors, tmp_path / 'tensors' / 'a.safetensors')
        rejected(
            described(tmp_path / 'tensors', 'lightningdit'), 'a.safetensors: its labels are .*, not a list of whole'
        )
    (tmp_path / 'lmdb').mkdir()
    maskdit_lmdb(tmp_path / 'lmdb' / 'train', 1)
    for name, message in (('lmdb', 'no data.mdb, so no LMDB; there is one in train'), ('nowhere', 'no such folder')):
        rejected(described(tmp_path / name, 'maskdit-lmdb', '--channels 3 --mirrors none'), message)


@pytest.mark.parametrize(
    ('layout', 'message'),
    [
        ('lightningdit', '--num-images 60: '),  # the last of its files: no number is missing
        ('repa', r'labels images that are missing: 00002/img-mean-std-00000059\.npy'),
        ('fast-dit', r'features without labels, or the reverse: 9\. '),
        ('tread-webdataset', '--num-images 60: .*holds 40 samples'),
    ],
)
def test_a_missing_file_is_an_error(layout: str, message: str, tmp_path: Path, rejected):
    words = source(tmp_path, layout)
    if layout == 'lightningdit':  # repeated images are none
        assert main([*words, *into(tmp_path / 'out', '--num-images', str(SAMPLES - 1))]) == 0
    last = max(path for path in (tmp_path / 'source').rglob('*') if path.suffix in ('.safetensors', '.npy', '.tar'))
    last.unlink()
    rejected(words, message, *(['--num-images', '60'] if layout == 'tread-webdataset' else []))
    if layout == 'fast-dit':  # as several GPUs leave them: each wrote over the other's
        (tmp_path / 'source' / 'imagenet256_features' / '9.npy').unlink()
        rejected(words, 'the numbers of its files have gaps, such as 9')


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
@pytest.mark.parametrize('dtype', ['<f4', '>f4', '<f2', '<f8'])
@pytest.mark.parametrize('order', ['C', 'F'])
def test_pickled_arrays_are_read_and_programs_are_not_run(protocol: int, dtype: str, order: str):
    array = np.asarray(MEANS[0, 0], dtype, order=order)  # type: ignore[call-overload]
    if protocol == 2:  # bytes are then spelled as a call of _codecs.encode
        with pytest.raises(ValueError, match=r'_codecs\.encode'):
            array_from_pickle(pickle.dumps(array, protocol))
        return
    result = array_from_pickle(pickle.dumps(array, protocol))
    assert result.dtype.newbyteorder('=') == array.dtype.newbyteorder('=') and np.array_equal(result, array)
    Trap.sprung.clear()
    wrong = [Trap(), [array, Trap()], np.array([Trap()], object), {'a': 1}, array.astype(int), None]
    cut_off = pickle.dumps(array, protocol)[:-5]
    for data in (*(pickle.dumps(trap, protocol) for trap in wrong), b'cposix\nsystem\n.', cut_off):
        with pytest.raises(ValueError, match='not a pickled array of floats'):
            array_from_pickle(data)
    assert not Trap.sprung
