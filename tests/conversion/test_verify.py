import json
import re
from pathlib import Path

import numpy as np
import pytest
from streaming.base.storage.download import CloudDownloader, LocalDownloader

from tests.conversion.small_sets import SAMPLES, make_rows, write_split
from tests.data.worlds import flip_last_byte
from tread_composer.cli.convert import verify_main as main
from tread_composer.conversion.verify import verify
from tread_composer.core.errors import UserError
from tread_composer.data import Manifest

SHARD = '00001/shard.00002.mds'


@pytest.fixture
def split(tmp_path: Path) -> Path:
    folder = write_split(tmp_path / 'set' / 'train')
    assert len(list(folder.rglob('*.mds'))) >= 8
    return folder


@pytest.mark.parametrize('kind', ['moments', 'samples', 'pixels'])
@pytest.mark.parametrize('compression', [None, 'zstd:1'])
def test_a_sound_set_has_no_fault(kind: str, compression: str | None, tmp_path: Path):
    lines = []
    for split in ('train', 'val'):
        write_split(tmp_path / split, kind=kind, compression=compression)
    assert verify(tmp_path, say=lines.append) == []
    text = '\n'.join(lines)
    assert f'{SAMPLES} samples by the index, {SAMPLES} of them read; a test' in text
    assert '4 classes with 50 to 50 samples, median 50; no classes without any' in text
    assert 'note' not in text


def shard_sizes(folder: Path) -> list[int]:
    return [shard['samples'] for shard in json.loads((folder / 'index.json').read_text())['shards']]


def test_the_digits_of_the_quickstart_pass(digits: Path):
    lines = []
    assert verify(digits, say=lines.append) == []
    assert any('all samples have the same name' in line for line in lines)


def test_files_that_are_missing_cut_off_or_changed_are_all_named(split: Path):
    first, second, third, fourth = sorted(split.rglob('*.mds'))[:4]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-500])
    flip_last_byte(third)  # in a name, where no sample can look wrong
    fourth.write_bytes(b'\1\0')
    faults = '\n'.join(verify(split))
    size = second.stat().st_size
    assert f'{first}: this shard is missing' in faults
    assert f'{second}: {size} bytes, the index says {size + 500}' in faults
    last = shard_sizes(split)[1] - 1
    assert f'{second}: samples {last - 1}-{last}: cut off or misplaced' in faults
    assert f'{third}: its xxh64 is not the one of the index' in faults
    assert f'{fourth}: is cut off in its header, at byte 2' in faults
    assert faults.count('\n') == 5  # and nothing else, but for the size of the fourth


def test_a_broken_compressed_shard_is_named(tmp_path: Path):
    split = write_split(tmp_path / 'train', compression='zstd:1')
    shard = sorted(split.rglob('*.zstd'))[0]
    shard.write_bytes(shard.read_bytes()[:-9])
    faults = verify(split)
    assert len(faults) == 2 and 'the index says' in faults[0] and 'cannot be decompressed' in faults[1]
    assert all(str(shard) in fault for fault in faults)


def test_a_header_that_points_elsewhere_costs_only_its_samples(split: Path):
    shard = split / SHARD
    content = bytearray(shard.read_bytes())
    content[4 * 4 : 5 * 4] = np.uint32(2**31).tobytes()  # where sample 2 ends and sample 3 begins
    shard.write_bytes(content)
    faults = verify(split)
    assert faults[1:] == [f'{shard}: samples 2-3: cut off or misplaced'] and 'xxh64' in faults[0]
    entries = json.loads((split / 'index.json').read_text())['shards']
    count = next(entry['samples'] for entry in entries if entry['raw_data']['basename'] == SHARD)
    content[:4] = np.uint32(count + 1).tobytes()
    shard.write_bytes(content)
    assert f'{shard}: holds {count + 1} samples by its header, {count} by the index' in verify(split)[1]


def not_finite(rows):
    rows[1]['latents'][0, 0, 0], rows[2]['latents_mirrored'][2, 3, 3] = np.nan, -np.inf


def every(change):
    return lambda rows: [row.update(change(row)) for row in rows]


NAN = 'NaN or infinity in latents'
CONTENT_FAULTS = [
    (not_finite, [f'shard.00000.mds: sample 1: {NAN}$', f'sample 2: {NAN}_mirrored$']),
    (lambda rows: rows[3]['latents'][3:6].fill(21), ['sample 3: log-variance outside of -30..20 in latents$']),
    (lambda rows: rows[0].update(label=4), ['sample 0: label 4 is not one of the 4 classes']),
    (lambda rows: rows[0].update(label=-1), ['sample 0: label -1 is not']),
    (every(lambda row: {'label': row['label'] % 2 * row['label']}), [r'no sample of class 2 \(class2\)$']),
    (
        lambda rows: rows[150].update(name=rows[0]['name']),
        [r"1 names stand for several samples, such as 'class\d/\d+\.JPEG' for 2$"],
    ),
    (
        lambda rows: rows.sort(key=lambda row: row['label']),
        ['permutation_seed is 0, but the labels are not mixed: 196 of 199 neighbours'],
    ),
    (every(lambda row: {'latents': row['latents'] * np.float16(0.18215)}), ['std: channel 0 has']),
    (
        every(lambda row: {column: row[column] + np.float16(0.5) for column in ('latents', 'latents_mirrored')}),
        ['mean: channel 0 has .*, stated is'],
    ),
    (every(lambda row: {'latents_mirrored': row['latents']}), ['200 of 200 latents_mirrored are equal to latents']),
    (
        every(lambda row: {'latents_mirrored': row['latents'][..., ::-1].copy()}),
        ['200 of 200 latents_mirrored are only the flipped arrays'],
    ),
]


@pytest.mark.parametrize(('change', 'messages'), CONTENT_FAULTS)
def test_a_fault_in_the_samples_is_named(change, messages: list[str], tmp_path: Path):
    split = write_split(tmp_path / 'train', change=change)
    faults = verify(split)
    for message in messages:
        matching = [fault for fault in faults if re.search(message, fault)]
        assert len(matching) == 1 and str(split) in matching[0], faults
    assert len(faults) <= len(messages) + 1  # scaling moves the mean, too


def test_pixels_must_be_mirrored_exactly(tmp_path: Path):
    def change(rows):
        rows[7]['latents_mirrored'][0, 0, 0] += np.float16(1)

    faults = verify(write_split(tmp_path / 'train', kind='pixels', change=change))
    assert len(faults) == 1 and faults[0].endswith('sample 7: latents_mirrored are not the mirrored pixels')


def test_source_order_is_no_fault_where_the_manifest_says_so(tmp_path: Path):
    rows = sorted(make_rows(), key=lambda row: row['label'])
    assert verify(write_split(tmp_path / 'train', rows, permutation_seed=None)) == []


def test_a_class_without_samples_is_only_noted_where_that_may_be(tmp_path: Path):
    lines = []
    names = tuple(f'class{label}' for label in range(50))  # few samples of many classes
    write_split(tmp_path / 'few' / 'train', num_classes=50, class_names=names)
    for split in ('train', 'val'):  # images that were held out
        rows = [row for row in make_rows() if split == 'train' or row['label'] != 2]
        write_split(tmp_path / 'held' / split, rows)
    assert verify(tmp_path / 'few', say=lines.append) == verify(tmp_path / 'held', say=lines.append) == []
    assert any('no sample of class 4 (class4), 5 (class5)' in line and 'and 41 more' in line for line in lines)
    assert any('note: no sample of class 2 (class2)' in line for line in lines)


def test_plain_and_symmetric_images_are_no_fault(tmp_path: Path):
    rows = make_rows()
    for row in rows[:150]:  # their mirror images are the same
        row['latents'] = (row['latents'] + row['latents'][..., ::-1]) / np.float16(2)
        row['latents'] += np.float16(0.01) * row['latents_mirrored']  # as far as an encoder is symmetric
        row['latents_mirrored'] = row['latents']
    assert verify(write_split(tmp_path / 'train', rows)) == []


def test_uploaded_data_are_fetched_shard_by_shard(split: Path, monkeypatch: pytest.MonkeyPatch):
    kept: list[int] = []

    class Cloud(LocalDownloader):
        def download(self, remote: str, local: str, timeout: float) -> None:
            kept.append(len(list(Path(local).parents[1].rglob('*.mds'))))
            super().download(remote.removeprefix('s3:/'), local, timeout)

    monkeypatch.setattr(CloudDownloader, 'get', lambda remote: Cloud())
    url, lines = f's3:/{split.parent}', []
    assert verify(url, say=lines.append) == [] == verify(f'{url}/train', say=lines.append)
    assert max(kept) == 0 and len(kept) > 8, 'a shard at a time'
    assert any(line.startswith(f'{url}/train: 200 samples by the index') for line in lines)
    (split.parent / 'conversion.json').write_text(json.dumps({'content': {}, 'splits': {'train': {}, 'val': {}}}))
    assert [fault.partition(' names')[0] for fault in verify(url)] == [f'val: {url}/conversion.json']
    (split.parent / 'conversion.json').unlink()
    (split / SHARD).unlink()
    assert [fault.partition(': ')[0] for fault in verify(url)] == [f'{url}/train/{SHARD}']
    with pytest.raises(UserError, match='no data set: neither in train/ or val/ nor here'):
        verify(f'{url}/elsewhere')
    assert verify(f'file://{split.parent}')[0].startswith(f'{split}/{SHARD}: this shard is missing')


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'num_samples': 201}, 'index.json: 200 samples, the manifest has num_samples=201'),
        ({'kind': 'samples'}, 'its columns are .*6,4,4.*, the manifest describes .*3,4,4'),
        ({'mirrored': False}, 'its columns are .*latents_mirrored.*, the manifest describes'),
    ],
)
def test_a_manifest_that_describes_other_data_is_a_fault(split: Path, changes: dict, message: str):
    Manifest.load(split).model_copy(update=changes).save(split)
    faults = verify(split)
    assert len(faults) == (len(shard_sizes(split)) if 'columns' in message else 1)
    assert all(re.search(message, fault) for fault in faults)


def test_without_a_manifest_or_an_index_the_rest_is_still_checked(split: Path):
    (split / SHARD).unlink()
    (split / 'manifest.json').write_text('{}')
    faults = verify(split)
    assert len(faults) == 2 and 'format_version: missing' in faults[0] and 'this shard is missing' in faults[1]
    (split / 'index.json').write_text('[]')
    assert 'not an index of MDS shards' in verify(split)[1]
    (split / 'index.json').unlink()
    assert 'index.json: no such file' in verify(split.parent)[1]


def test_splits_that_do_not_belong_together_are_a_fault(split: Path):
    write_split(split.parent / 'val', autoencoder_hash='sha256:1', resolution=16)
    faults = verify(split.parent)
    train, val = split / 'manifest.json', split.parent / 'val' / 'manifest.json'
    hashes = f"autoencoder_hash: 'sha256:0' in {train}, 'sha256:1' in {val}"
    assert faults == [hashes, f'resolution: 8 in {train}, 16 in {val}']


def test_a_split_that_the_conversion_has_not_finished_is_a_fault(split: Path):
    record = split.parent / 'conversion.json'
    record.write_text(json.dumps({'content': {}, 'splits': {'train': {}, 'val': {}}}))
    words = f'val: {record} names this split, and it is not finished or not here'
    for place in (split.parent, f'file://{split.parent}'):
        assert [fault for fault in verify(place) if words in fault] == verify(place) != []
    write_split(split.parent / 'val')
    assert verify(split.parent) == []


def test_of_long_lists_that_differ_the_place_is_shown(tmp_path: Path):
    for split, last in {'train': 'wren', 'val': 'gull'}.items():
        write_split(tmp_path / split, class_names=(*(letter * 60 for letter in 'abc'), last))
    (fault,) = verify(tmp_path)
    assert re.fullmatch(r"class_names: \.\.\.c+', 'wren'\) in .+, \.\.\.c+', 'gull'\) in .+", fault)


def test_files_beside_the_index_and_missing_hashes_are_noted(tmp_path: Path):
    lines = []
    split = write_split(tmp_path / 'train', hashes=())
    (split / '.writing-00002-1').mkdir()
    (split / '.writing-00002-1' / 'shard.00000.mds').touch()
    assert verify(split, say=lines.append) == []
    text = '\n'.join(lines)
    assert 'note: 1 shard files are not in the index, e.g. .writing-00002-1/shard.00000.mds' in text
    assert 'has no hash of' in text


def test_the_command_line_tells_by_its_exit_code(split: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main([str(split.parent)]) == 0
    assert capsys.readouterr().out.rstrip().endswith('no fault found')
    (split / SHARD).unlink()
    assert main([str(split)]) == 1
    assert capsys.readouterr().out.rstrip().endswith('this shard is missing\n1 fault found')
    (tmp_path / 'empty').mkdir()
    for wrong in ('empty', 'nowhere'):
        assert main([str(tmp_path / wrong)]) == 2
    assert 'no data set' in capsys.readouterr().err
    assert main([]) == 2
