"""Checkpoints on disk: what is seen of bytes that changed, and which one is gone on from."""

import random
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tread_composer.core.errors import UserError
from tread_composer.io.checkpoints import (
    DIGESTS,
    check_whole,
    checkpoints_in,
    damage,
    file_digests,
    find_checkpoint,
    newest_whole,
    point_to,
    remove,
    remove_unfinished,
    set_aside,
    write_digests,
)


def content(seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = {f'layer.{index}': torch.randn(40, generator=generator) for index in range(3)}
    return {'state': {'model': tensors, 'batch': seed}}


def save(folder, batch, name='ep0-ba{}-rank0.pt'):
    torch.save(content(batch), folder / name.format(batch))
    return folder / name.format(batch)


def save_sharded(folder, batch, digests=True):
    path = folder / f'ep0-ba{batch}'
    dcp.save(content(batch)['state']['model'], storage_writer=dcp.FileSystemWriter(path), no_dist=True)
    if digests:
        write_digests(path, file_digests(path, sorted(file.name for file in path.iterdir())))
    return path


def same(a, b):
    return a['batch'] == b['batch'] and all(torch.equal(value, b['model'][name]) for name, value in a['model'].items())


def test_every_byte_that_changes_what_is_read_is_seen(tmp_path):
    """Padding and the dates of an archive may change: what is read from such a file is what was saved."""
    file, draw = save(tmp_path, 1), random.Random(0)
    whole, seen = file.read_bytes(), 0
    positions = sorted(draw.sample(range(len(whole)), 600))
    assert damage(file) is None
    for position in positions:
        file.write_bytes(whole[:position] + bytes([whole[position] ^ (1 << draw.randrange(8))]) + whole[position + 1 :])
        if damage(file) is not None:
            seen += 1
        else:
            assert same(torch.load(file, weights_only=True)['state'], content(1)['state']), position
    assert seen > len(positions) // 3  # the tensors and their description alone are that much


def test_a_file_that_was_cut_off_is_seen_wherever_that_was_and_others_are_no_checkpoints(tmp_path):
    file = save(tmp_path, 1)
    whole = file.read_bytes()
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        file.write_bytes(whole[:length])
        assert damage(file) is not None, length
    shutil.make_archive(str(tmp_path / 'other'), 'zip', tmp_path)
    assert 'none of torch.save' in damage(tmp_path / 'other.zip')
    (tmp_path / 'text.pt').write_text('weights')
    with pytest.raises(UserError, match=r'text.pt: damaged, or no checkpoint'):
        check_whole(tmp_path / 'text.pt')


@pytest.mark.parametrize('name', ['.metadata', '__0_0.distcp', DIGESTS])
def test_each_file_of_a_sharded_checkpoint_counts(tmp_path, name):
    path = save_sharded(tmp_path, 3)
    assert damage(path) is None
    whole = (path / name).read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 40)):
        (path / name).write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        assert damage(path) is not None or (name == DIGESTS and whole[position] in b' \n'), position
    (path / name).write_bytes(whole[:-1])
    assert damage(path) is not None
    if name != DIGESTS:
        (path / name).unlink()
        assert damage(path) is not None


def test_a_sharded_checkpoint_without_digests_counts_once_all_ranks_have_written(tmp_path):
    path = save_sharded(tmp_path, 3, digests=False)
    assert damage(path) is None and newest_whole(tmp_path) == (path, {})
    (path / '.metadata').unlink()
    assert 'not all ranks' in damage(path)


def test_the_newest_whole_one_is_used_and_nothing_is_renamed_by_reading(tmp_path, capsys):
    for batch in (9, 10, 100, 2):
        save(tmp_path, batch)
    save(tmp_path, 200, name='.unfinished-ep0-ba{}-rank0.pt')
    save(tmp_path, 300, name='ep0-ba{}-rank0.pt.damaged')
    save(tmp_path, 0, name='whole-rank{}.pt')
    point_to(tmp_path / 'latest-rank0.pt', tmp_path / 'ep0-ba2-rank0.pt')
    assert find_checkpoint(tmp_path).name == 'ep0-ba100-rank0.pt'
    assert [path.name for path in checkpoints_in(tmp_path)] == [f'ep0-ba{n}-rank0.pt' for n in (100, 10, 9, 2)]
    (tmp_path / 'ep0-ba100-rank0.pt').write_bytes(b'half')
    before = sorted(tmp_path.iterdir())
    assert find_checkpoint(tmp_path).name == 'ep0-ba10-rank0.pt' and sorted(tmp_path.iterdir()) == before
    (line,) = capsys.readouterr().err.splitlines()
    assert 'ep0-ba100-rank0.pt: passed over' in line and '4 bytes' in line


def test_links_count_and_a_latest_of_another_folder_is_the_newest(tmp_path):
    save(tmp_path, 5)
    save(tmp_path, 0, name='latest-rank{}.pt')
    assert find_checkpoint(tmp_path) == tmp_path / 'latest-rank0.pt'
    (tmp_path / 'latest-rank0.pt').rename(tmp_path / 'moved')
    (tmp_path / 'elsewhere').mkdir()
    (tmp_path / 'latest-rank0.pt').symlink_to('../moved')  # dangles
    assert find_checkpoint(tmp_path) == tmp_path / 'ep0-ba5-rank0.pt'
    (tmp_path / 'moved').rename(tmp_path / 'elsewhere' / 'ep0-ba9-rank0.pt')
    (tmp_path / 'ep0-ba9-rank0.pt').symlink_to('elsewhere/ep0-ba9-rank0.pt')
    assert find_checkpoint(tmp_path) == tmp_path / 'ep0-ba9-rank0.pt'
    point_to(tmp_path / 'latest-rank0.pt', tmp_path / 'elsewhere' / 'ep0-ba9-rank0.pt')
    assert find_checkpoint(tmp_path) == tmp_path / 'latest-rank0.pt'


def test_what_is_left_says_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match='holds no checkpoint'):
        find_checkpoint(tmp_path / 'nowhere')
    save(tmp_path, 5).write_bytes(b'')
    with pytest.raises(UserError, match=r'each checkpoint in it is damaged(.|\n)*ep0-ba5-rank0.pt: .*0 bytes'):
        find_checkpoint(tmp_path)
    sharded = save_sharded(tmp_path, 6)
    with pytest.raises(UserError, match=f'{sharded}: a sharded checkpoint'):
        find_checkpoint(tmp_path)


def test_damaged_ones_keep_their_bytes_under_another_name(tmp_path):
    for text in ('first', 'second'):
        (tmp_path / 'ep0-ba5-rank0.pt').write_text(text)
        set_aside(tmp_path / 'ep0-ba5-rank0.pt')
    texts = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert texts == {'ep0-ba5-rank0.pt.damaged': 'first', 'ep0-ba5-rank0.pt.2.damaged': 'second'}
    set_aside(save_sharded(tmp_path, 6))
    assert checkpoints_in(tmp_path) == []


def test_leftovers_go_and_all_else_stays(tmp_path):
    kept = {save(tmp_path, 5), save_sharded(tmp_path, 6)}
    save(tmp_path, 7, name='.unfinished-ep0-ba{}-rank0.pt')
    save_sharded(tmp_path, 8).rename(tmp_path / '.unfinished-ep0-ba8')
    (tmp_path / 'samples').mkdir()
    (tmp_path / 'samples' / '.unfinished-grid.png.x').touch()  # being written by another process, as the export
    (tmp_path / '.unfinished-ep0-ba5.safetensors.x').touch()
    (tmp_path / '.unfinished-config.yaml.x').touch()
    (tmp_path / '.unfinished-latest-rank0.pt').symlink_to('ep0-ba7-rank0.pt')
    assert len(remove_unfinished(tmp_path)) == 4
    others = {tmp_path / 'samples', tmp_path / '.unfinished-ep0-ba5.safetensors.x'}
    assert set(tmp_path.iterdir()) == {*kept, *others} and len(list((tmp_path / 'samples').iterdir())) == 1
    for path in kept:
        assert damage(path) is None
        remove(path)
    assert set(tmp_path.iterdir()) == others
