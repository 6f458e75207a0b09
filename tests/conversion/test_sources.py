import multiprocessing
import os
import pickle
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conversion import layouts
from tests.conversion.layouts import CLASSES, Pictures, tar_bytes, without, write_tar, write_tree, write_zip
from tests.conversion.worlds import manifest, words
from tread_composer.cli.convert import convert_main
from tread_composer.core.errors import UserError


def _ilsvrc(root: Path, splits: dict[str, Pictures], truth: str) -> dict[str, Any]:
    truths = layouts.write_ground_truths(root / 'truth', splits['val'])
    return {'path': layouts.write_ilsvrc(root / 'in', splits), 'ground_truth': truths[truth]}


def _kaggle(root: Path, splits: dict[str, Pictures], zipped: bool = False) -> dict[str, Any]:
    """Kaggle's: validation images in no class folders, deep inside, beside annotations and a test split."""
    truths = layouts.write_ground_truths(root / 'truth', splits['val'])
    data = 'ILSVRC/Data/CLS-LOC'
    files = {f'{data}/train/{name}': content for name, content in splits['train'].items()}
    files |= {f'{data}/val/{name.rpartition("/")[2]}': content for name, content in splits['val'].items()}
    files |= {f'{data}/test/a.JPEG': b'', 'ILSVRC/Annotations/a.xml': b'', 'LOC_sample_submission.csv': b''}
    path = write_zip(root / 'in.zip', files) if zipped else write_tree(root / 'in', files)
    return {'path': path, 'ground_truth': truths['kaggle']}


def _webdataset(root: Path, splits: dict[str, Pictures], **options: Any) -> dict[str, Any]:
    names = layouts.write_class_names(root / 'names.txt')
    return {'path': layouts.write_webdataset(root / 'in', splits, **options), 'class_names': names}


def _zip(root: Path, splits: dict[str, Pictures], **options: Any) -> dict[str, Any]:
    return {'path': layouts.zip_of_splits(root / 'in.zip', splits, **options)}


def _parquet(root: Path, splits: dict[str, Pictures], place: str = '', **options: Any) -> dict[str, Any]:
    layouts.write_parquet(root / 'in' / place, splits, **options)
    return {'path': root / 'in'}


def _tiny(root: Path, splits: dict[str, Pictures], zipped: bool = False) -> dict[str, Any]:
    files = layouts.tiny_imagenet(splits)
    return {'path': write_zip(root / 'in.zip', files) if zipped else write_tree(root / 'in', files)}


def _with_test(root: Path, splits: dict[str, Pictures], write: Callable[[Path, Any], Path]) -> dict[str, Any]:
    name = 'in.zip' if write is layouts.zip_of_splits else 'in'
    return {'path': write(root / name, {'train': splits['train'], 'test': splits['val']})}


Build = Callable[..., dict[str, Any]]
LAYOUTS: dict[str, tuple[str, Build, dict[str, Any]]] = {
    'folders': ('class folders', lambda root, splits: {'path': layouts.write_folders(root / 'in', splits)}, {}),
    'folders kaggle': ('class folders', _kaggle, {}),
    'zip stored': ('zip', _zip, {}),
    'zip deflated, wrapped': ('zip', _zip, {'prefix': 'a/b/', 'compression': zipfile.ZIP_DEFLATED}),
    'zip kaggle': ('zip', _kaggle, {'zipped': True}),
    'webdataset': ('webdataset tars', _webdataset, {}),
    'webdataset json': ('webdataset tars', _webdataset, {'labels': 'json'}),
    'webdataset folders': ('webdataset tars', _webdataset, {'name': '{split}/{number:06d}.tar'}),
    'parquet': ('parquet files', _parquet, {}),
    'parquet in data': ('parquet files', _parquet, {'place': 'data'}),
    'parquet of a configuration': ('parquet files', _parquet, {'place': 'plain_text'}),
    'arrow': ('arrow files', _parquet, {'arrow': True}),
    'Tiny-ImageNet': ('class folders', _tiny, {}),
    'Tiny-ImageNet zip': ('zip', _tiny, {'zipped': True}),
    'folders with test for val': ('class folders', _with_test, {'write': layouts.write_folders}),
    'zip with test for val': ('zip', _with_test, {'write': layouts.zip_of_splits}),
    'parquet with test for val': ('parquet files', _with_test, {'write': layouts.write_parquet}),
} | {
    f'ILSVRC {truth}': ('ILSVRC tars', _ilsvrc, {'truth': truth})
    for truth in ('devkit', 'devkit folder', 'kaggle', 'synsets', 'numbers')
}


def build(name: str, root: Path, splits: dict[str, Pictures]) -> dict[str, Any]:
    """Write the images in that layout; arguments of ``open_sources``."""
    _, write, options = LAYOUTS[name]
    return write(root, splits, **options)


@pytest.mark.parametrize('name', LAYOUTS)
def test_the_same_images_are_the_same_source_in_every_layout(name, tmp_path, splits, opened):
    layout = LAYOUTS[name][0]
    sources = opened(**build(name, tmp_path, splits))
    assert sources.keys() == {'train', 'val'}
    for split, images in splits.items():
        source = sources[split]
        assert source.description.startswith(f'{layout} at ')
        assert source.class_names == CLASSES
        assert list(source.names) == sorted(images)  # by class, then by file
        assert source.labels.dtype == np.int64
        assert source.labels.tolist() == [CLASSES.index(name.partition('/')[0]) for name in sorted(images)]
        assert f'{len(images)} images, 3 classes' in source.description
        positions = list(range(len(source)))
        random.Random(2).shuffle(positions)
        assert all(source.read(position) == images[source.names[position]] for position in positions)


@pytest.mark.parametrize('split', ['train', 'val'])
def test_one_split_alone(split, tmp_path, splits, opened):
    one = {split: splits[split]}
    truths = layouts.write_ground_truths(tmp_path / 'truth', splits['val'])
    layouts.write_ilsvrc(tmp_path / 'tars', splits)
    names = layouts.write_class_names(tmp_path / 'names.txt')
    by_path = {
        layouts.write_folders(tmp_path / 'folders', one): {},
        tmp_path / f'tars/ILSVRC2012_img_{split}.tar': {'ground_truth': truths['devkit']} if split == 'val' else {},
        layouts.write_webdataset(tmp_path / 'wds', one): {'class_names': names},
        layouts.write_parquet(tmp_path / 'parquet', one): {},
    }
    for path, options in by_path.items():
        sources = opened(path, **options)
        assert sources.keys() == {split}
        assert list(sources[split].names) == sorted(one[split])
        assert sources[split].class_names == CLASSES


def test_images_without_classes(tmp_path, splits, opened):
    flat = {name.rpartition('/')[2]: content for name, content in splits['train'].items()}
    one = {'train': splits['train']}
    paths = {
        'flat folder': write_tree(tmp_path / 'flat', flat),
        'zip': write_zip(tmp_path / 'flat.zip', flat),
        'webdataset tars': layouts.write_webdataset(tmp_path / 'wds', one, labels=None),
        'parquet files': layouts.write_parquet(tmp_path / 'parquet', one, labels=False),
    }
    for layout, path in paths.items():
        source = opened(path)['train']
        assert source.description.startswith(f'{layout} at ') and source.class_names == ()
        assert list(source.names) == sorted(flat)
        assert source.labels.tolist() == [0] * len(flat)
        assert [source.read(position) for position in range(len(source))] == [flat[name] for name in source.names]
        assert 'no classes (unconditional)' in source.description


# As Python sorts them (the paths would be sorted differently), and numbers from 0 on by their value.
@pytest.mark.parametrize('folders', [('10', '9', 'B', 'b', 'b-1', 'ä'), tuple(map(str, range(11)))])
def test_labels_follow_the_sorted_names_of_folders(folders, tmp_path, opened):
    source = opened(write_tree(tmp_path / 'in', {f'{name}/a.jpg': b'x' for name in folders}))['train']
    assert source.class_names == folders and list(source.names) == [f'{name}/a.jpg' for name in folders]
    assert source.labels.tolist() == list(range(len(folders)))


def test_the_same_images_give_the_same_shards_by_the_command_line(tmp_path, splits):
    shards, sources = [], []
    for name in ('folders', 'ILSVRC devkit', 'zip deflated, wrapped', 'webdataset', 'parquet'):
        built, out = build(name, tmp_path / name.replace(' ', ''), splits), tmp_path / name.replace(' ', '') / 'out'
        options = {option: value for option, value in built.items() if option != 'path'}
        assert convert_main(words(built['path'], out, None, **options, part_size=4)) == 0
        shards.append({str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob('*.mds'))})
        labels = [manifest(out / split) for split in ('train', 'val')]
        sources += [tuple(label.pop('source') for label in labels)]  # where the images came from
        shards[-1]['manifests'] = repr(labels).encode()
    assert all(other == shards[0] for other in shards) and len(shards[0]) == 7
    assert len(set(sources)) == 5


@pytest.mark.parametrize('name', ['metadata.jsonl', 'metadata.csv', 'labels.csv', 'n01440764/dataset.json'])
def test_a_label_file_that_is_not_read_is_refused(name, tmp_path, splits, opened):
    opened.refuses(
        f'{name} hold labels that this layout does not read',
        write_tree(tmp_path / 'in', {**splits['train'], name: b''}),
    )


# ----- read in other processes


def test_sources_are_read_in_spawned_and_forked_processes(tmp_path, splits, opened, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a path given relative to a folder that the other process is not in
    built = {name: build(name, tmp_path / name.replace(' ', ''), splits) for name in LAYOUTS}
    sources = []
    for options in built.values():
        options['path'] = options['path'].relative_to(tmp_path)
        sources += opened(**options).values()
    wanted = layouts.read_everything(sources)
    for method, number in (('fork', 2), ('spawn', 1)):  # forked ones inherit files that are open
        monkeypatch.chdir('/')
        context = multiprocessing.get_context(method)
        with context.Pool(number) as pool:
            results = [pool.apply_async(layouts.read_everything, (sources,)) for _ in range(number)]
            assert [result.get(60) for result in results] == [wanted] * number
    assert layouts.read_everything(pickle.loads(pickle.dumps(sources))) == wanted


def test_a_source_that_changes_while_it_is_read_is_noticed(tmp_path, splits, opened):
    folder = opened(write_tree(tmp_path / 'in', splits['train']))['train']
    (tmp_path / 'in' / folder.names[3]).unlink()
    folder.read(2)
    with pytest.raises(UserError, match=folder.names[3]):
        folder.read(3)
    zipped = opened(write_zip(tmp_path / 'in.zip', splits['train']))['train']
    write_zip(tmp_path / 'in.zip', splits['val'])
    with pytest.raises(UserError, match=r'in\.zip: has changed since it was indexed'):
        zipped.read(0)


# ----- what lies beside the images


LITTER = {'.DS_Store': b'', '._n01440764': b'', 'Thumbs.db': b'', '__MACOSX/train/a.jpg': b'', '.git/a.jpg': b''}


def test_litter_is_not_an_image_and_is_counted(tmp_path, splits, opened):
    images = splits['train']
    litter = {**LITTER, 'n01440764/._n01440764_5.JPEG': b'', 'n01440764/.hidden.jpg': b'', 'n02105855/THUMBS.DB': b''}
    others = {'n01440764/readme.TXT': b'', 'n03995372/boxes.xml': b'', 'n03995372/more.xml': b''}
    files = {**litter, **images, **others}
    (tmp_path / 'in/.git').mkdir(parents=True)
    (tmp_path / 'in/.git/again').symlink_to(tmp_path)  # hidden folders are not entered
    for path in (write_tree(tmp_path / 'in', files), write_zip(tmp_path / 'in.zip', files)):
        sources = opened(path)
        source = sources['train']
        assert sources.keys() == {'train'} and source.class_names == CLASSES
        assert list(source.names) == sorted(images)
        assert 'ignored 11 files that are not images (.txt 1, .xml 2, hidden or system 8)' in source.description
    inner = tar_bytes({'._a.JPEG': b'', 'a.JPEG': b'x', 'notes.txt': b''})
    source = opened(write_tar(tmp_path / 'tars/train.tar', {'._n1.tar': b'', './n1.tar': inner}))['train']
    assert list(source.names) == ['n1/a.JPEG']
    assert 'ignored 3 files that are not images (.txt 1, hidden or system 2)' in source.description
    tar = write_tar(tmp_path / 'w.tar', {'._a.jpg': b'', 'a.jpg': b'x', 'a.cls': b'0\n', 'a.txt': b''})
    source = opened(tar)['train']
    assert list(source.names) == ['0/a.jpg']
    assert 'ignored 2 files that are not images (.txt 1, hidden or system 1)' in source.description


def test_a_test_split_is_left_out_and_named(tmp_path, splits, opened):
    """Where there is val, on request, and without labels."""
    three, two = {**splits, 'test': splits['val']}, {'train': splits['train'], 'test': splits['val']}
    flat = {'train': splits['train'], 'test': {name.rpartition('/')[2]: b'' for name in splits['val']}}
    names = layouts.write_class_names(tmp_path / 'names')
    for path, options, expected in (
        (layouts.write_folders(tmp_path / 'in', three), {}, {'train', 'val'}),
        (layouts.zip_of_splits(tmp_path / 'in.zip', three), {}, {'train', 'val'}),
        (layouts.write_parquet(tmp_path / 'parquet', three), {}, {'train', 'val'}),
        (layouts.write_webdataset(tmp_path / 'wds', three), {'class_names': names}, {'train', 'val'}),
        (layouts.write_folders(tmp_path / 'two', two), {'splits': ('train',)}, {'train'}),
        (layouts.write_parquet(tmp_path / 'tables', two), {'splits': ('train',)}, {'train'}),
        (layouts.write_folders(tmp_path / 'flat', flat), {}, {'train'}),
    ):
        sources = opened(path, **options)
        assert sources.keys() == expected and 'not converted' in sources['train'].description


def test_links_in_folders_are_followed(tmp_path, splits, opened):
    real = write_tree(tmp_path / 'real', splits['train'])
    linked = tmp_path / 'linked'
    (linked / 'train/n01440764').mkdir(parents=True)
    (linked / 'train/n02105855').symlink_to(real / 'n02105855')
    (linked / 'train/n03995372').symlink_to(real / 'n03995372')
    for image in (real / 'n01440764').iterdir():
        (linked / 'train/n01440764' / image.name).symlink_to(image)
    source = opened(linked)['train']
    assert list(source.names) == sorted(splits['train'])
    assert source.read(0) == splits['train'][source.names[0]]
    (linked / 'train/n01440764/x.jpg').symlink_to('nowhere')
    opened.refuses(r'x\.jpg: a link to nothing', linked)
    (linked / 'train/n01440764/x.jpg').unlink()
    (linked / 'train/again').symlink_to(linked)
    opened.refuses('cannot be read: .*Too many levels of symbolic links', linked)


# ----- refusals: trees


TREES = {
    'val lacks a class': (
        lambda t, v: {'train': t, 'val': without(v, CLASSES[1])},
        'train has 1 classes that val lacks: n02105855',
    ),
    'train lacks a class': (
        lambda t, v: {'train': without(t, CLASSES[0]), 'val': v},
        'val has 1 classes that train lacks: n01440764',
    ),
    'nothing': (lambda t, v: {'train': {'n01440764/readme.txt': b''}}, r'no image in it.*1 files that are not images'),
    'splits beside classes': (lambda t, v: {'train': t, '': t}, r'train are taken as splits.*n01440764.*rename'),
    'splits beside images': (lambda t, v: {'train': t, '': {'a.jpg': b''}}, r'no split: the image a\.jpg'),
    'two val': (lambda t, v: {'train': t, 'val': v, 'validation': v}, 'val, validation: two folders for one split'),
    'only test': (lambda t, v: {'test': t}, 'only a test split'),
    'mixed depths': (lambda t, v: {'': {**t, 'a.jpg': b''}}, r"different or unknown depths, such as 'a\.jpg', 'n0"),
    'too deep': (lambda t, v: {'a': {'b/c/d.jpg': b''}, 'b': {'b/c/d.jpg': b''}}, 'different or unknown depths'),
    'flat val': (
        lambda t, v: {'train': t, 'val': {'a.jpg': b''}},
        r'(?s)no class folders.*--ground-truth.*devkit.*LOC_val_solution\.csv.*two columns',
    ),
    'flat train': (lambda t, v: {'train': {'a.jpg': b''}, 'val': v}, 'val has 3 classes that train lacks'),
}


@pytest.mark.parametrize('name', TREES)
@pytest.mark.parametrize('kind', ['folder', 'zip'])
def test_unclear_or_incomplete_trees_are_refused(kind, name, tmp_path, splits, opened):
    build, message = TREES[name]
    files = {
        os.path.join(split, path): content
        for split, images in build(splits['train'], splits['val']).items()
        for path, content in images.items()
    }
    path = write_tree(tmp_path / 'in', files) if kind == 'folder' else write_zip(tmp_path / 'in.zip', files)
    assert str(path) in opened.refuses(message, path)


def test_empty_folders_are_refused(tmp_path, splits, opened):
    root = layouts.write_folders(tmp_path / 'in', splits)
    write_tree(root / 'train', {'n04/.DS_Store': b'', 'n05/readme.txt': b''})
    opened.refuses('2 class folders hold no image: train/n04, train/n05', root)
    root = write_tree(tmp_path / 'other', {f'train/{name}': content for name, content in splits['train'].items()})
    (root / 'val').mkdir()
    opened.refuses('val holds no image', root)
    (tmp_path / 'empty').mkdir()
    opened.refuses('no image in it; it is empty', tmp_path / 'empty')
    zipped = write_zip(tmp_path / 'in.zip', {**splits['train'], 'n04/': b''})
    opened.refuses('1 class folders hold no image: n04', zipped)


def test_paths_that_hold_nothing_known_or_too_much_are_refused(tmp_path, splits, opened):
    opened.refuses(r'absent: no such file or folder. Expected', tmp_path / 'absent')
    (tmp_path / 'a.rar').write_bytes(b'')
    opened.refuses(r'a\.rar: not a file of a known kind', tmp_path / 'a.rar')
    both = layouts.write_webdataset(layouts.write_folders(tmp_path / 'both', splits), splits)
    opened.refuses(r'holds in1k-train-0000\.tar.*beside images.*Give the file itself', both)
    kinds = layouts.write_webdataset(layouts.write_parquet(tmp_path / 'kinds', splits), splits)
    opened.refuses('holds .*several kinds', kinds)
    layouts.zip_of_splits(tmp_path / 'zips/in.zip', splits)
    opened.refuses(r'holds in\.zip: .*Give the file itself', tmp_path / 'zips')
    with tarfile.open(tmp_path / 'a.tar.gz', 'w:gz'):
        pass
    opened.refuses('or compressed: .*unpack it to a tar', tmp_path / 'a.tar.gz')
    os.rename(tmp_path / 'a.tar.gz', tmp_path / 'a.tar')
    opened.refuses('or compressed: .*unpack it to a tar', tmp_path / 'a.tar')
    opened.refuses(r'folders\.tar holds folders of images', write_tar(tmp_path / 'folders.tar', splits['train']))


def test_options_that_a_layout_has_no_use_for_are_refused(tmp_path, splits, opened):
    names = layouts.write_class_names(tmp_path / 'names.txt')
    truth = layouts.write_ground_truths(tmp_path / 'truth', splits['val'])['devkit']
    folders = layouts.write_folders(tmp_path / 'in', splits)
    opened.refuses('class_names=', folders, class_names=names)
    opened.refuses('ground_truth=', folders, ground_truth=truth)
    opened.refuses('ground_truth=', layouts.write_parquet(tmp_path / 'parquet', splits), ground_truth=truth)
    layouts.write_ilsvrc(tmp_path / 'tars', {'train': splits['train']})
    opened.refuses('ground_truth=', tmp_path / 'tars', ground_truth=truth)


def test_names_that_no_shard_can_hold_are_refused(tmp_path, opened):
    write_tree(tmp_path, {'a/x.jpg': b'', 'b/x.jpg': b''})
    (Path(os.fsdecode(os.fsencode(tmp_path) + b'/b/\xff.jpg'))).write_bytes(b'')
    opened.refuses('not UTF-8', tmp_path)
