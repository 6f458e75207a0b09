import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from tests.data.worlds import flip_last_byte, prepare_many_times
from tests.warm import exit_codes, start, wait_until
from tread_composer.core.batch import LABELS, RAW_LATENTS, SAMPLE_IDS
from tread_composer.data.checks import check_shards
from tread_composer.data.digits import SPLITS, load_digits_arrays, prepare_digits
from tread_composer.data.loaders import eval_loader, train_loader
from tread_composer.data.manifest import Manifest


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob('*')) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() + str(path.stat().st_mtime_ns) for path in files}


def test_splits_hold_every_digit_once_and_classes_evenly():
    (train_images, train_labels), (eval_images, eval_labels) = (load_digits_arrays(split) for split in SPLITS)
    assert (train_images.shape, eval_images.shape) == ((1500, 1, 8, 8), (297, 1, 8, 8))
    assert (train_images.dtype, train_labels.dtype) == (np.float32, np.int64)
    assert (train_images.min(), train_images.max()) == (-1, 1)
    values, labels = load_digits(return_X_y=True)
    rows = np.concatenate([train_images, eval_images]).reshape(-1, 64) * 8 + 8
    both = np.concatenate([rows, np.concatenate([train_labels, eval_labels])[:, None]], axis=1)
    assert sorted(map(tuple, both)) == sorted(map(tuple, np.concatenate([values, labels[:, None]], axis=1)))
    shares = np.bincount(eval_labels) / np.bincount(labels)
    assert np.abs(shares - 297 / 1797).max() < 1 / np.bincount(labels).min()
    for part in (train_labels[:100], eval_labels[:100]):
        assert np.bincount(part, minlength=10).min() >= 3  # well mixed: 10 of each are expected
    with pytest.raises(ValueError, match="'test' is not known"):
        load_digits_arrays('test')


def test_the_split_never_changes():
    # Published numbers depend on it.
    digest = hashlib.sha256(load_digits_arrays('eval')[0].tobytes()).hexdigest()
    assert digest == 'eaa4d5263c3c40f031256bd9d3e159d9ea6a00f2378a48b7f085b66adf966fed'


@pytest.mark.parametrize(('split', 'num_workers'), [('train', 0), ('train', 2), ('eval', 0)])
def test_what_is_read_is_exactly_what_was_written(digits: Path, split: str, num_workers: int):
    images, labels = load_digits_arrays(split)
    loader = train_loader if split == 'train' else eval_loader
    batches = list(loader(digits / split, batch_size=50 if split == 'train' else 64, num_workers=num_workers))
    ids = torch.cat([batch[SAMPLE_IDS] for batch in batches]).numpy()
    assert sorted(ids) == list(range(len(images)))
    assert np.array_equal(torch.cat([batch[RAW_LATENTS] for batch in batches]).float().numpy(), images[ids])
    read_labels = torch.cat([batch[LABELS] for batch in batches]).numpy()
    assert np.array_equal(read_labels, labels[ids])
    assert np.array_equal(np.bincount(read_labels), np.bincount(labels))


def test_the_manifests_describe_the_data(digits: Path):
    train, evaluation = (Manifest.load(digits / split) for split in SPLITS)
    images, _ = load_digits_arrays('train')
    assert (train.num_samples, evaluation.num_samples) == (1500, 297)
    assert (train.kind, train.latent_shape, train.num_classes) == ('pixels', (1, 8, 8), 10)
    assert train.class_names == tuple('0123456789')
    assert train.mean == evaluation.mean == pytest.approx((images.mean(),), abs=1e-6)
    assert train.std == evaluation.std == pytest.approx((images.std(),), abs=1e-6)
    for split, manifest in zip(SPLITS, (train, evaluation), strict=True):
        check_shards(digits / split, manifest, hashes=True)


def test_a_second_call_changes_nothing_and_damaged_data_are_refused_and_left_alone(tmp_path: Path):
    digits = tmp_path / 'digits'
    prepare_digits(digits)
    before = contents(digits)
    prepare_digits(digits)
    assert contents(digits) == before
    flip_last_byte(digits / 'eval' / 'shard.00000.mds')
    before = contents(digits)
    with pytest.raises(ValueError, match=r'(?s)not an undamaged copy.*shard.00000.mds.*Move it away'):
        prepare_digits(digits)
    assert contents(digits) == before
    (digits / 'train' / 'manifest.json').unlink()
    with pytest.raises(ValueError, match=r'manifest.json'):
        prepare_digits(digits)


def test_an_empty_folder_is_filled_and_foreign_ones_are_left_alone(tmp_path: Path, split: Path):
    for name in ('digits', 'mine', 'other'):
        (tmp_path / name).mkdir()
    prepare_digits(tmp_path / 'digits')
    assert sorted(os.listdir(tmp_path / 'digits')) == ['eval', 'train']
    (tmp_path / 'mine' / 'thesis.txt').write_text('x')
    (tmp_path / 'file').write_text('x')
    split.rename(tmp_path / 'other' / 'train')
    said = {'mine': 'mine', 'file': 'file', 'other': r"holds other data .'a test', 200 samples"}
    for name, message in said.items():
        with pytest.raises(ValueError, match=message):
            prepare_digits(tmp_path / name)
    assert os.listdir(tmp_path / 'mine') == ['thesis.txt']


def test_two_processes_at_once_both_succeed(tmp_path: Path):
    processes = [start(prepare_many_times, tmp_path / 'many', 5, tmp_path / f'started{n}') for n in range(2)]
    assert exit_codes(processes) == [0, 0]
    names = [name for name in os.listdir(tmp_path / 'many') if not name.endswith('.lock')]
    assert sorted(names) == list('01234')


def test_a_killed_preparation_leaves_nothing_that_disturbs_the_next(tmp_path: Path):
    killed = start(prepare_many_times, tmp_path, 1000, tmp_path / 'started')
    assert wait_until(lambda: (tmp_path / 'started').exists() and list(tmp_path.glob('.*.partial')), killed)
    killed.kill()
    killed.join()
    (left_over,) = tmp_path.glob('.*.partial')
    name = left_over.name.removeprefix('.').split('.partial')[0]
    prepare_digits(tmp_path / name)
    assert not list(tmp_path.glob('.*.partial'))
    assert sorted(os.listdir(tmp_path / name)) == ['eval', 'train']
