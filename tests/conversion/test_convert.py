"""Images in, latents out: what is written, what is refused. In this process, by the command line's own function."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conversion.worlds import CLASSES, digests, make_images, make_vae, manifest, pixels_of, read, words
from tread_composer.autoencoders import KL
from tread_composer.cli.convert import convert_main as main
from tread_composer.conversion.verify import verify
from tread_composer.data import Manifest
from tread_composer.data.checks import check_shards

IMAGES = 40


@pytest.fixture(scope='module')
def out(source, vae, tmp_path_factory) -> Path:
    """The plain conversion, which others are compared with."""
    out = tmp_path_factory.mktemp('plain') / 'out'
    assert main(words(source, out, vae)) == 0
    return out


def assert_half_precision(stored: np.ndarray, exact: torch.Tensor) -> None:
    """Rounded once to float16: 11 significant bits, or the smallest number. Encoding in other batches costs 1e-5."""
    error = np.abs(stored.astype(np.float64) - exact.double().numpy())
    assert (error <= np.abs(exact.numpy()) * 2.0**-11 + 2.0**-25 + 1e-5).all(), error.max()


def test_moments_of_image_and_mirror_with_labels_and_names(source, vae, out):
    rows = read(out / 'train')
    expected = {f'{path.parent.name}/{path.name}' for path in source.glob('*/*')}
    assert len(rows['name']) == IMAGES and set(rows['name']) == expected
    assert rows['label'] == [CLASSES.index(name.split('/')[0]) for name in rows['name']]
    assert len(set(rows['label'][:10])) == 3 and rows['name'] != sorted(rows['name'])
    pixels = pixels_of(source, rows['name'])
    kl = KL(vae)
    assert_half_precision(rows['latents'], kl.encode(pixels))
    assert_half_precision(rows['latents_mirrored'], kl.encode(pixels.flip(-1)))
    flipped = kl.encode(pixels).flip(-1).numpy()
    assert np.abs(rows['latents_mirrored'] - flipped).max() > 0.01  # a latent's own mirror image is something else


def test_manifest_and_shards_say_what_they_are(vae, out):
    folder = out / 'train'
    found = Manifest.load(folder)
    check_shards(folder, found, hashes=True)
    assert (found.kind, found.autoencoder, found.autoencoder_hash) == ('moments', 'my-vae', KL(vae).weight_hash())
    assert (found.latent_shape, found.resolution, found.crop, found.mirrored) == ((3, 8, 8), 16, 'center', True)
    assert (found.num_samples, found.class_names, found.permutation_seed) == (IMAGES, CLASSES, 0)
    assert found.source == f'class folders at few: {IMAGES} images, 3 classes'  # no path of this machine
    index = json.loads((folder / 'index.json').read_text())
    assert [shard['raw_data']['basename'] for shard in index['shards']] == [
        f'0000{n}/shard.00000.mds' for n in range(4)
    ]
    assert json.loads((folder / 'unreadable.json').read_text()) == {'images': IMAGES, 'unreadable': 0, 'list': []}
    assert sorted(path.name for path in out.iterdir()) == ['.lock', 'conversion.json', 'train']
    assert not [path for path in folder.iterdir() if path.name.startswith('.')]
    rows = read(folder)  # statistics are those of draws from what was written
    moments = np.concatenate([rows['latents'], rows['latents_mirrored']]).astype(np.float64)
    mean, logvar = np.split(moments, 2, axis=1)
    second = (mean**2 + np.exp(logvar)).mean(axis=(0, 2, 3))
    np.testing.assert_allclose(found.mean, mean.mean(axis=(0, 2, 3)), rtol=1e-10)
    np.testing.assert_allclose(found.std, np.sqrt(second - mean.mean(axis=(0, 2, 3)) ** 2), rtol=1e-10)


@pytest.mark.parametrize('options', [{'workers': 2}, {'batch_size': 7}, {'batch_size': 40, 'workers': 1}, {'seed': 1}])
def test_the_result_depends_on_the_seed_and_not_on_workers_or_batches(source, vae, out, options, tmp_path):
    assert main(words(source, tmp_path / 'out', vae, **options)) == 0
    plain, result = read(out / 'train'), read(tmp_path / 'out' / 'train')
    assert manifest(tmp_path / 'out' / 'train')['permutation_seed'] == options.get('seed', 0)
    if 'seed' in options:
        assert plain['name'] != result['name'] and sorted(plain['name']) == sorted(result['name'])
        return
    assert plain['name'] == result['name'] and plain['label'] == result['label']
    for column in ('latents', 'latents_mirrored'):  # other batches: convolutions sum in another order
        np.testing.assert_allclose(plain[column], result[column], rtol=2e-3, atol=1e-4)
    if 'batch_size' not in options:
        assert digests(out / 'train') == digests(tmp_path / 'out' / 'train')


def test_an_unusual_autoencoder(source, tmp_path):
    vae = make_vae(tmp_path / 'f4d5', levels=3, channels=5)
    arguments = words(source, tmp_path / 'out', vae, vae_id='org/f4d5', no_mirror=True, resolution=20)
    assert main(arguments) == 0
    rows = read(tmp_path / 'out' / 'train')
    assert rows['latents'].shape == (IMAGES, 10, 5, 5) and 'latents_mirrored' not in rows
    assert_half_precision(rows['latents'], KL(vae).encode(pixels_of(source, rows['name'], 20)))
    found = Manifest.load(tmp_path / 'out' / 'train')
    assert (found.latent_shape, found.autoencoder, found.mirrored) == ((5, 5, 5), 'org/f4d5', False)
    assert main(words(source, tmp_path / 'other', vae, resolution=18)) == 2 and not (tmp_path / 'other').exists()


def test_images_without_classes(vae, tmp_path):
    flat, split = make_images(tmp_path / 'flat', 5, classes=()), tmp_path / 'out' / 'train'
    assert main(words(flat, split.parent, vae)) == 0
    assert (manifest(split)['num_classes'], manifest(split)['class_names'], read(split)['label']) == (0, [], [0] * 5)


def test_means_draws_and_brain_floats(source, vae, out, tmp_path):
    exact = read(out / 'train')
    for store, options in {'mean': {}, 'sample': {}, 'moments': {'precision': 'bf16'}}.items():
        assert main(words(source, tmp_path / store, vae, store=store, **options)) == 0
    mean, logvar = np.split(exact['latents'].astype(np.float32), 2, axis=1)
    means, draws, bf16 = (read(tmp_path / store / 'train') for store in ('mean', 'sample', 'moments'))
    np.testing.assert_array_equal(means['latents'], mean.astype(np.float16))
    noise = {}
    for column in ('latents', 'latents_mirrored'):
        mean, logvar = np.split(exact[column].astype(np.float32), 2, axis=1)
        noise[column] = (draws[column] - mean) / np.exp(logvar / 2)
        assert abs(noise[column].mean()) < 0.05 and abs(noise[column].std() - 1) < 0.05
    assert np.abs(noise['latents'] - noise['latents_mirrored']).max() > 1
    assert np.abs(noise['latents'][0] - noise['latents'][1]).max() > 1
    assert manifest(tmp_path / 'sample' / 'train')['kind'] == 'samples'
    assert manifest(tmp_path / 'mean' / 'train')['source'].endswith('posterior means')
    difference = np.abs(bf16['latents'].astype(np.float32) - exact['latents'])
    assert 1e-3 < difference.max() < 0.1
    part = json.loads((tmp_path / 'moments' / 'train' / '00000' / 'part.json').read_text())
    assert part['content']['precision'] == 'bf16'
    again = words(source, tmp_path / 'sample2', vae, store='sample', batch_size=10, part_size=40)
    assert main(again) == 0  # draws belong to images, not to batches
    np.testing.assert_allclose(read(tmp_path / 'sample2' / 'train')['latents'], draws['latents'], rtol=2e-3, atol=1e-3)


def test_pixels_without_an_autoencoder(source, tmp_path):
    assert main(words(source, tmp_path / 'out', None)) == 0
    rows = read(tmp_path / 'out' / 'train')
    pixels = pixels_of(source, rows['name'])
    np.testing.assert_array_equal(rows['latents'], pixels.half().numpy())
    np.testing.assert_array_equal(rows['latents_mirrored'], pixels.half().flip(-1).numpy())
    found = manifest(tmp_path / 'out' / 'train')
    assert (found['kind'], found['autoencoder'], found['autoencoder_hash']) == ('pixels', None, None)
    both = np.concatenate([rows['latents'], rows['latents_mirrored']]).astype(np.float64)
    np.testing.assert_allclose(found['std'], both.std(axis=(0, 2, 3)), rtol=1e-10)


def test_splits_of_the_source_and_held_out_images(source, vae, out, tmp_path, refused, capsys):
    both = tmp_path / 'both'
    make_images(both / 'train', 9), make_images(both / 'val', 6, seed=1)
    assert main(words(both, tmp_path / 'one', vae, splits='train')) == 0
    assert not (tmp_path / 'one' / 'val').exists()
    assert main(words(both, tmp_path / 'one', vae)) == 0  # the other one is added
    assert [manifest(tmp_path / 'one' / split)['num_samples'] for split in ('train', 'val')] == [9, 6]
    refused(main, words(both, tmp_path / 'two', vae, held_out=3))
    assert main(words(source, tmp_path / 'held', vae, held_out=7)) == 0
    train, val = (read(tmp_path / 'held' / split) for split in ('train', 'val'))
    assert (len(train['name']), len(val['name'])) == (33, 7)
    assert train['name'] + val['name'] == read(out / 'train')['name']
    assert 'no evaluation split' not in capsys.readouterr().out
    assert manifest(tmp_path / 'held' / 'val')['source'].endswith('only 7 of them, held out by seed 0')


def test_a_dry_run_writes_nothing_and_says_the_size_of_the_result(tmp_path, capsys):
    source, out = make_images(tmp_path / 'in', 150), tmp_path / 'out'
    arguments = words(source, out, None, no_mirror=True, resolution=32, part_size=50, batch_size=25)
    assert main([*arguments, '--dry-run']) == 0 and not out.exists()
    text = capsys.readouterr().out
    for part in ('class folders', '150 images, 3 classes', '3 x 32 x 32', 'expected in 3 parts', 'fits'):
        assert part in text
    assert main(arguments) == 0
    expected = re.search(r'train: ([\d.]+) (k|M)B expected', capsys.readouterr().out)
    assert expected
    written = sum(path.stat().st_size for path in out.rglob('*') if path.is_file())
    assert float(expected[1]) * {'k': 1e3, 'M': 1e6}[expected[2]] == pytest.approx(written, rel=0.05)


def spoil(folder: Path, count: int) -> list[str]:
    paths = sorted(folder.glob('*/*'))[:count]
    for path in paths:
        path.write_text('no image at all')
    return [f'{path.parent.name}/{path.name}' for path in paths]


def test_too_many_unreadable_images_stop_and_a_larger_share_goes_on(vae, tmp_path, refused):
    source = make_images(tmp_path / 'in', 20)
    spoil(source, 4)
    path = tmp_path / 'out' / 'train' / 'unreadable.json'
    arguments = words(source, tmp_path / 'out', vae, part_size=4)
    refused(main, [*arguments, '--max-unreadable', '0.1'], '3 images so far are unreadable', str(path))
    assert len(json.loads(path.read_text())['list']) == 3 and not (path.parent / 'manifest.json').exists()
    assert not list(path.parent.glob('.writing-*'))
    kept = sum(1 for _ in path.parent.glob('0*'))
    assert main([*arguments, '--max-unreadable', '0.2']) == 0
    assert manifest(path.parent)['num_samples'] == 16 and kept < 5


def test_unreadable_images_are_left_out_with_a_report_until_they_are_repaired(source, tmp_path, capsys):
    whole, broken, split = tmp_path / 'whole', tmp_path / 'in', tmp_path / 'out' / 'train'
    assert main(words(source, whole, None, part_size=4)) == 0
    shutil.copytree(source, broken)
    lost = spoil(broken, 2)
    arguments = words(broken, tmp_path / 'out', None, part_size=4, max_unreadable=0.1)
    assert main(arguments) == 0 and '2 images were unreadable' in capsys.readouterr().out
    report = json.loads((split / 'unreadable.json').read_text())
    assert (report['images'], report['unreadable'], [entry['name'] for entry in report['list']]) == (IMAGES, 2, lost)
    assert all('not an image' in entry['reason'] for entry in report['list'])
    names = read(split)['name']
    assert len(names) == IMAGES - 2 == manifest(split)['num_samples'] and not set(names) & set(lost)
    (split / 'manifest.json').unlink()  # as if it had been interrupted before
    shutil.copy(source / lost[0], broken / lost[0])
    assert main(arguments) == 0
    assert '1 images that were unreadable can be read now; their parts are made anew' in capsys.readouterr().out
    assert manifest(split)['num_samples'] == IMAGES - 1
    shutil.copy(source / lost[1], broken / lost[1])
    remedy = f'to take them in, remove {split / "manifest.json"} and run the same command again'
    assert main(arguments) == 0 and remedy in capsys.readouterr().out
    (split / 'manifest.json').unlink()
    assert main([*arguments, '--dry-run']) == 0 and main(arguments) == 0
    repaired, undamaged = read(split), read(whole / 'train')
    assert repaired['name'] == undamaged['name']
    np.testing.assert_array_equal(repaired['latents'], undamaged['latents'])


@pytest.mark.parametrize('is_finished', [True, False])
def test_a_part_that_was_damaged_later_is_asked_for_alone(is_finished, source, out, vae, tmp_path, refused):
    copy = tmp_path / 'out'
    shutil.copytree(out, copy)
    shard, described = copy / 'train' / '00002' / 'shard.00000.mds', copy / 'train' / 'manifest.json'
    os.truncate(shard, 100)
    if not is_finished:
        described.unlink()
    refused(main, words(source, copy, vae), str(shard), 'Remove the folder of the part', 'only that part is made anew')
    assert described.exists() == is_finished
    note = f'note: 1 parts are damaged: {shard.parent}. Remove these folders and run the conversion again'
    lines = []
    assert verify(copy, say=lines.append) and any(note in line for line in lines)
    times = {path: path.stat().st_mtime_ns for path in (copy / 'train').glob('0000[013]/*')}
    shutil.rmtree(shard.parent)
    assert main(words(source, copy, vae)) == 0 and digests(copy) == digests(out)
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_latents_beyond_half_precision_name_the_image(source, tmp_path, refused):
    from diffusers import AutoencoderKL

    network = AutoencoderKL.from_pretrained(make_vae(tmp_path / 'vae'))
    with torch.no_grad():
        network.quant_conv.weight[1] *= 1e6
    network.save_pretrained(tmp_path / 'vae')
    error = refused(main, words(source, tmp_path / 'out', str(tmp_path / 'vae')), 'channel 1')
    assert re.search(r'n\d+/n\d+_\d+\.JPEG', error) and not list((tmp_path / 'out' / 'train').iterdir())


def test_finished_data_are_left_alone_and_other_settings_or_images_refused(source, vae, out, tmp_path, refused, capsys):
    before = digests(out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob('*') if path.name != '.lock'}
    assert main(words(source, out, vae)) == 0
    assert 'finished already, nothing to do' in capsys.readouterr().out
    for change, message in (
        ({'resolution': 8}, 'resolution: saved 16, now 8'),
        ({'precision': 'bf16'}, "precision: saved 'fp32', now 'bf16'"),
        ({'seed': 3}, 'seed: saved 0, now 3'),
        ({'held_out': 3}, 'held_out: saved 0, now 3'),
        ({'part_size': 20}, 'part_size: saved 10, now 20'),
        ({'no_mirror': True}, 'mirrored: saved True, now False'),
    ):
        refused(main, words(source, out, vae, **change), message, 'choose another --out')
    refused(main, words(source, out, make_vae(tmp_path / 'my-vae', seed=1)), 'autoencoder_hash: saved')
    more = make_images(tmp_path / 'more', IMAGES + 1)
    refused(main, words(more, out, vae), f'train.images: saved {IMAGES}, now {IMAGES + 1}')
    assert digests(out) == before and {path: path.stat().st_mtime_ns for path in times} == times
    assert sorted(path.name for path in out.iterdir()) == ['.lock', 'conversion.json', 'train']


def test_a_finished_part_that_was_damaged_is_named_with_the_remedy(source, tmp_path, refused):
    arguments = words(source, tmp_path / 'out', None)
    assert main(arguments) == 0
    before = digests(tmp_path / 'out')
    split = tmp_path / 'out' / 'train'
    (split / 'manifest.json').unlink()
    for content in (None, '{}', '[]'):
        (split / '00001' / 'index.json').unlink(missing_ok=True)
        if content:
            (split / '00001' / 'index.json').write_text(content)
        refused(main, arguments, f'{split}/00001/index.json: ', 'Remove the folder of the part')
    (split / '00001' / 'part.json').write_text('{}')
    refused(main, arguments, f'{split}/00001: has no part.json of a conversion')
    shutil.rmtree(split / '00001')
    assert main(arguments) == 0 and digests(tmp_path / 'out') == before


def test_places_that_are_refused_stay_as_they_are(source, vae, tmp_path, refused):
    foreign = tmp_path / 'foreign'
    foreign.mkdir()
    (foreign / 'thesis.txt').write_text('dear')
    for place, message in (
        (foreign, 'holds thesis.txt'),
        (foreign / 'thesis.txt', 'is a file'),
        (source / 'out', 'inside the source'),
        (source, 'inside the source'),
        ('s3://bucket/x', 'also give --work'),
    ):
        refused(main, words(source, place, vae), message)
    refused(main, words(source, 'nfs://x', vae, work=tmp_path / 'work'), "no uploader for 'nfs'")
    assert [path.name for path in tmp_path.iterdir()] == ['foreign'] and os.listdir(foreign) == ['thesis.txt']
    (foreign / 'conversion.json').write_text('{}')
    refused(main, words(source, foreign, None), f'{foreign}/conversion.json: no conversion of this tool wrote it')
    assert not (source / 'out').exists()
    (tmp_path / 'empty').mkdir()
    assert main(words(source, tmp_path / 'empty', vae)) == 0


def test_wrong_words_and_sources_are_refused_and_leave_no_trace(source, vae, tmp_path, refused):
    out, both = tmp_path / 'a' / 'out', tmp_path / 'in'
    for options, message in (
        ({'batch_size': 0}, '--batch-size: 0 must be at least 1'),
        ({'max_unreadable': 1.5}, '--max-unreadable: 1.5 must be at least 0 and below 1'),
        ({'splits': 'test'}, '--splits test'),
        ({'held_out': 40}, 'hold out fewer'),
        ({'precison': 'fp32'}, "unrecognized arguments: --precison fp32. Did you mean '--precision'?"),
    ):
        refused(main, words(source, out, vae, **options), message)
    if not torch.cuda.is_available():
        refused(main, words(source, out, vae, device='cuda'), 'finds no GPU')
    refused(main, words(source, out, None, store='mean'), '--store has no effect without an autoencoder')
    neither = ['--source', str(source), '--out', str(out)]
    refused(main, neither, 'give one of --autoencoder and --pixels')
    refused(main, words(source, out, str(tmp_path / 'no' / 'vae')), 'no such folder')
    # Before the autoencoder, which the hub would be asked for.
    arguments = ['--source', str(tmp_path / 'no'), '--out', str(out), '--autoencoder', str(tmp_path / 'vae')]
    assert refused(main, arguments) == f'--source {tmp_path / "no"}: no such file or folder\n'
    make_images(both / 'train', 6), make_images(both / 'val', 6, classes=CLASSES[1:])
    refused(main, words(both, out, vae), 'n01440764')
    (tmp_path / 'empty').mkdir()
    refused(main, words(tmp_path / 'empty', out, vae), 'no image in it')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['empty', 'in']


def test_output_elsewhere(source, vae, out, tmp_path, capsys, refused):
    remote, work = tmp_path / 'bucket#1', tmp_path / 'work'
    arguments = words(source, f'file://{remote}', vae, work=work)
    assert main(arguments) == 0
    assert main(arguments) == 0 and 'finished already' in capsys.readouterr().out
    assert not list(work.rglob('*.mds'))  # moved, not copied
    assert sorted(path.name for path in (remote / 'train').iterdir()) == [
        *(f'0000{part}' for part in range(4)), 'index.json', 'manifest.json', 'unreadable.json'
    ]  # fmt: skip
    assert verify(f'file://{remote}') == []
    there, here = read(remote / 'train'), read(out / 'train')
    assert there['name'] == here['name']
    np.testing.assert_array_equal(there['latents'], here['latents'])
    assert Manifest.load(remote / 'train') == Manifest.load(out / 'train')
    before = digests(remote)
    refused(main, words(source, f'file://{remote}', vae, work=tmp_path / 'other'), 'is there already')
    assert digests(remote) == before and not (tmp_path / 'other').exists()
    (tmp_path / 'file').touch()
    unwritable = words(source, f'file://{tmp_path}/file/x', vae, work=tmp_path / 'bad')
    refused(main, unwritable, 'file/x/conversion.json: upload failed')
    assert not (tmp_path / 'bad').exists()
