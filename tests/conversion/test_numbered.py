"""webdataset tars and parquet files: labels are numbers, data are in many files."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.conversion import layouts
from tests.conversion.layouts import CLASSES, without, write_tar


@pytest.mark.parametrize(
    ('files', 'message'),
    [
        ({'a.jpg': b'x', 'a.cls': b'0', 'b.jpg': b'x'}, r"1 of 2 samples have no label, such as 'b\.jpg'"),
        ({'a.jpg': b'x', 'a.cls': b'0', 'b.cls': b'0'}, "key 'b' has a label and no sample"),
        ({'a.jpg': b'x', 'a.png': b'x', 'a.cls': b'0'}, "two sample files of key 'a'"),
        ({'a.jpg': b'x', 'a.cls': b'cat'}, "label of 'a' in its .cls is b'cat', not a whole number"),
        ({'a.jpg': b'x', 'a.cls': b'2000000000'}, '2,000,000,000 of 2,000,000,001 classes'),
        ({'a.jpg': b'x', 'a.cls': b'9' * 30}, 'not a whole number'),
        ({'a.jpg': b'x', 'a.cls': b'0' * 100 + b'1'}, 'not a whole number'),
        ({'a.jpg': b'x', 'a.cls': b'-1'}, 'labels from -1 to -1'),
        (
            {'a.jpg': b'x', 'a.cls': b'2', 'b.jpg': b'x', 'b.cls': b'0'},
            '1 of 3 classes have no training image, such as 1',
        ),
        ({'x/a.jpg': b'x', 'x/a.cls': b'0', 'y/a.jpg': b'x', 'y/a.cls': b'0'}, r'more than once: 0/a\.jpg'),
        ({'a.txt': b'x'}, 'hold no sample; ignored 1 files'),
    ],
)
def test_unclear_webdatasets_are_refused(files, message, tmp_path, opened):
    opened.refuses(message, write_tar(tmp_path / 'in.tar', files))


def test_numbered_files_must_be_complete_and_agree(tmp_path, splits, opened):
    root = layouts.write_webdataset(tmp_path / 'wds', splits, tars=3)
    names = layouts.write_class_names(tmp_path / 'names.txt')
    (root / 'in1k-train-0001.tar').rename(root / 'more.tar')
    opened.refuses(r'do not: more\.tar', root, class_names=names)
    (root / 'more.tar').unlink()
    opened.refuses(r'in1k-train-<number>\.tar: 1 are missing, such as 1', root, class_names=names)
    parquet = layouts.write_parquet(tmp_path / 'parquet', splits)
    (parquet / 'train-00001-of-00002.parquet').unlink()
    opened.refuses(r'<number>-of-00002\.parquet: 1 are missing, such as 1', parquet)
    # Few files of many are no exception: the name says how many there are.
    (parquet / 'train-00000-of-00002.parquet').rename(parquet / 'train-00000-of-00294.parquet')
    opened.refuses(r'<number>-of-00294\.parquet: 293 are missing, such as 1', parquet)
    (parquet / 'train-00000-of-00294.parquet').rename(parquet / 'train-00000-of-00002.parquet')
    layouts.write_parquet(parquet, splits, files=3)
    opened.refuses('files of two copies, <number>-of-2 and -of-3', parquet)
    (tmp_path / 'few.txt').write_text('a\nb\n')
    opened.refuses(
        'labels from 0 to 2, but there are names for 2 classes',
        layouts.write_webdataset(tmp_path / 'other', splits),
        class_names=tmp_path / 'few.txt',
    )
    (tmp_path / 'few.txt').write_text('a\na\nb\n')
    opened.refuses('each name once', tmp_path / 'other', class_names=tmp_path / 'few.txt')


def test_without_class_names_the_numbers_are_the_names(tmp_path, splits, opened):
    wds = opened(layouts.write_webdataset(tmp_path / 'wds', splits))
    parquet = opened(layouts.write_parquet(tmp_path / 'parquet', splits, names=False))
    for split, images in splits.items():
        assert wds[split].class_names == parquet[split].class_names == ('0', '1', '2')
        names = [f'{CLASSES.index(name[:9])}{name[9:]}' for name in sorted(images)]
        assert list(wds[split].names) == list(parquet[split].names) == names


def test_a_class_that_numbered_val_lacks_is_told(tmp_path, splits, opened):
    fewer = {'train': splits['train'], 'val': without(splits['val'], CLASSES[0])}
    source = opened(layouts.write_parquet(tmp_path, fewer))['val']
    assert source.class_names == CLASSES and set(source.labels) == {1, 2}
    assert '1 classes have no image' in source.description


def test_parquet_without_paths_is_named_by_row(tmp_path, splits, opened):
    root = layouts.write_parquet(tmp_path, splits, paths=False)
    source = opened(root)['train']
    assert len(set(source.names)) == len(splits['train'])
    assert source.names[0].startswith('n01440764/row-000000')
    assert 'named by row' in source.description
    found = sorted(source.read(position) for position in range(len(source)))
    assert found == sorted(splits['train'].values())


def _parquet(path: Path, columns: dict[str, Any], metadata: dict[str, str] | None = None) -> Path:
    table = pyarrow.table(columns)
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), path)
    return path


def _features(**kinds: dict) -> dict[str, str]:
    return {'huggingface': json.dumps({'info': {'features': kinds}})}


_IMAGE = pyarrow.array([{'bytes': b'x', 'path': 'a.jpg'}])
_CLASS = {'_type': 'ClassLabel', 'names': ['a']}


@pytest.mark.parametrize(
    ('columns', 'metadata', 'message'),
    [
        ({'text': ['a']}, None, '0 columns hold images.*text: string'),
        ({'a': _IMAGE, 'b': _IMAGE}, None, '2 columns hold images'),
        ({'image': _IMAGE, 'label': ['cat']}, None, "'label', holds no whole numbers"),
        ({'image': _IMAGE, 'fine': [0], 'coarse': [0]}, _features(fine=_CLASS, coarse=_CLASS), '2 columns of labels'),
        ({'image': _IMAGE, 'label': [0]}, {'huggingface': '{'}, "metadata 'huggingface'.*damaged"),
        ({'image': _IMAGE, 'label': [0]}, _features(label={**_CLASS, 'names': [1]}), "metadata 'huggingface'.*damaged"),
        ({'image': _IMAGE, 'label': [0]}, _features(label={**_CLASS, 'names': 'a'}), "metadata 'huggingface'.*damaged"),
        ({'image': _IMAGE, 'label': [1]}, _features(label=_CLASS), 'labels from 1 to 1, but there are names for 1'),
        ({'image': _IMAGE, 'label': [-1]}, _features(label=_CLASS), 'labels from -1'),
        ({'image': _IMAGE, 'label': pyarrow.array([None], pyarrow.int64())}, None, 'row 0 has no label'),
        ({'image': pyarrow.array([{'bytes': None, 'path': 'a'}], _IMAGE.type)}, None, "row 0 holds no bytes.*'a'"),
        ({'image': pyarrow.array([None], _IMAGE.type)}, None, 'row 0 holds no bytes'),
        ({'image': pyarrow.array([], _IMAGE.type), 'label': pyarrow.array([], 'int64')}, None, 'train hold no row'),
    ],
)
def test_unclear_parquet_files_are_refused(columns, metadata, message, tmp_path, opened):
    opened.refuses(message, _parquet(tmp_path / 'train.parquet', columns, metadata))
    assert not list((tmp_path / 'scratch').glob('parquet/.unfinished*'))


def test_columns_of_a_table_with_several_are_chosen(tmp_path, opened):
    raw = pyarrow.array([b'y'], pyarrow.binary())
    kinds = _features(fine=_CLASS, coarse={'_type': 'ClassLabel', 'names': ['b']})
    path = _parquet(tmp_path / 'x.parquet', {'a': _IMAGE, 'b': raw, 'fine': [0], 'coarse': [0], 'id': [0]}, kinds)
    for image, label, content, names in (
        ('a', 'fine', b'x', ('a',)),
        ('b', 'coarse', b'y', ('b',)),
        (None, 'id', b'x', ('0',)),
    ):
        source = opened(path, image_column=image, label_column=label)['train']
        assert (source.read(0), source.class_names) == (content, names)
    opened.refuses('2 columns of labels: fine, coarse. Say which with --label-column', path)
    opened.refuses('--label-column grain: no such column. Columns: a: struct', path, label_column='grain')
    opened.refuses('--image-column id: no column of images', path, image_column='id', label_column='fine')
    opened.refuses('image_column=a, .*only tables', write_tar(tmp_path / 'x.tar', {'a.jpg': b'x'}), image_column='a')


def test_tables_of_several_configurations_are_refused(tmp_path, splits, opened):
    for name in ('small', 'large'):
        layouts.write_parquet(tmp_path / 'in' / name, splits)
    opened.refuses('parquet files of 2 configurations: large, small. Give the folder of one', tmp_path / 'in')


def test_arrow_files_are_those_that_were_saved(tmp_path, splits, opened):
    root = layouts.write_parquet(tmp_path / 'in', splits, arrow=True)
    description = opened(root)['train'].description
    assert '4 arrow files that state.json does not list are left out' in description
    assert 'the split extra is not converted' in description
    (root / 'train/data-00001-of-00002.arrow').rename(root / 'train/cache-9.arrow')
    opened.refuses(r'data-00001-of-00002\.arrow listed in state\.json but not there', root)
    (root / 'train/cache-9.arrow').rename(root / 'train/data-00001-of-00002.arrow')
    state = root / 'train' / 'state.json'
    state.write_text(json.dumps({**json.loads(state.read_text()), '_indices_data_files': [{'filename': 'x'}]}))
    opened.refuses('rows chosen by a file of indices', root)
    for content in ('[]', '{"_data_files": [{}]}'):
        state.write_text(content)
        opened.refuses(r'train/state\.json: not what save_to_disk writes', root)
    (state.parent / 'state.json').unlink()
    (root / 'dataset_dict.json').write_text('{}')
    opened.refuses(r'dataset_dict\.json: not what save_to_disk writes', root)


def test_parquet_files_of_different_data_sets_or_cut_off_are_refused(tmp_path, splits, opened):
    root = layouts.write_parquet(tmp_path / 'in', splits)
    file = root / 'train-00001-of-00002.parquet'
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    opened.refuses('not a parquet file, or damaged', root)
    file.write_bytes(whole.replace(b'.JPEG', b'.\xffPEG'))  # a name that is no text any more
    opened.refuses(r'00001-of-00002\.parquet: cannot be copied', root)
    _parquet(file, {'image': _IMAGE, 'label': [0]}, _features(label=_CLASS))
    opened.refuses(r'00001-of-00002\.parquet: columns or class names differ', root)


def test_the_copy_of_parquet_is_made_once_and_goes_on_after_a_kill(tmp_path, splits, opened, capsys):
    root = layouts.write_parquet(tmp_path / 'in', splits)
    opened(root)
    assert 'parquet files are copied here' in capsys.readouterr().err
    spool = tmp_path / 'scratch/parquet'
    before = {path: path.stat().st_mtime_ns for path in spool.iterdir()}
    assert len(before) == 4
    opened(root)
    assert 'copied' not in capsys.readouterr().err
    # killed in the middle of a copy
    redone, *kept = sorted(before)
    redone.unlink()
    (spool / '.unfinished-x').write_bytes(b'half')
    sources = opened(root)
    assert '1 parquet files are copied here' in capsys.readouterr().err
    after = {path: path.stat().st_mtime_ns for path in spool.iterdir()}
    assert after.keys() == before.keys() and {path for path in before if after[path] == before[path]} == set(kept)
    for split, images in splits.items():
        found = {name: sources[split].read(position) for position, name in enumerate(sources[split].names)}
        assert found == images
    # another content under the same name is not taken from the old copy
    layouts.write_parquet(root, {'train': {name: content + b'!' for name, content in splits['train'].items()}})
    source = opened(root)['train']
    assert source.read(0) == splits['train'][source.names[0]] + b'!'
