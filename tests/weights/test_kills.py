"""Killed while a checkpoint is written, and started again by the same command: the run that was never interrupted."""

import os
import resource
import shutil

import pytest
import torch

from tests.runs import assert_same_training, checkpoint
from tests.weights.short_runs import NAME, Trap, again, batch_of, folder_of, names, program, refused, sharded
from tread_composer.cli import main


def assert_ends_as(whole, root, begin):
    """The same command goes on from a batch, or has nothing to do, to the end of the undisturbed run."""
    done = again(root)
    said = 'was trained to 12ba before' if begin == 12 else f'batches {begin} to 12'
    assert done.returncode == 0 and said in done.stdout, done.stdout + done.stderr
    assert_same_training(checkpoint(root, NAME), checkpoint(whole, NAME))
    assert os.readlink(folder_of(root) / 'latest-rank0.pt') == batch_of(12)
    assert not [name for name in names(root) if name.startswith('.')]
    return done.stderr


def test_a_run_that_is_killed_in_each_save_ends_as_the_whole_one(whole, tmp_path):
    shutil.copytree(whole / 'data', tmp_path / 'data')
    left = {'half': '.unfinished-', 'written': '.unfinished-', 'renamed': ''}
    for place, batch, newest in (('half', 3, None), ('half', 6, 3), ('written', 6, 3), ('renamed', 9, 6)):
        done = program(tmp_path, 'train_and_die.py', DIE_AT=f'{place}:{batch}')
        assert done.returncode == -9, done.stdout + done.stderr
        assert (batch_of(3) in names(tmp_path)) == (batch > 3)
        assert f'{left[place]}{batch_of(batch)}' in names(tmp_path)
        latest = folder_of(tmp_path) / 'latest-rank0.pt'
        assert (os.readlink(latest) if latest.is_symlink() else None) == (newest and batch_of(newest))
        started_anew = 'holds no whole checkpoint, so the run starts from its beginning' in done.stderr
        assert started_anew == ((place, batch) == ('half', 6)), done.stderr
    assert_ends_as(whole, tmp_path, 9)


def damage_it(file, how):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    length = {'half': len(content) // 2, 'empty': 0, 'one bit': len(content)}[how]
    file.write_bytes(content[:length])


@pytest.mark.parametrize('how', ['half', 'empty', 'one bit'])
def test_damaged_checkpoints_are_set_aside_and_the_one_before_is_gone_on_from(whole, copy, how):
    lost = (12, 9) if how != 'half' else (12, 9, 6, 3)
    for batch in lost:
        damage_it(folder_of(copy) / batch_of(batch), how)
    errors = assert_ends_as(whole, copy, 12 - 3 * len(lost))
    assert ('holds no whole checkpoint, so the run starts from its beginning' in errors) == (len(lost) == 4)
    for batch in lost:
        (line,) = [line for line in errors.splitlines() if batch_of(batch) in line]
        assert f'damaged, now {batch_of(batch)}.damaged' in line
        assert f'{batch_of(batch)}.damaged' in names(copy)


@pytest.mark.parametrize('lacking', ['memory', 'files'])
def test_what_cannot_be_read_now_is_not_taken_for_damaged(whole, copy, lacking):
    """A process that runs short where it begins to look at the checkpoints, as on a busy node."""
    before = {path: path.read_bytes() for path in folder_of(copy).glob('*.pt')}
    done = program(copy, 'train_short_of.py', LACKING=lacking)
    assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stdout + done.stderr
    message = done.stderr.splitlines()[-1]
    assert f'{batch_of(12)}: cannot be read now' in message and 'nothing was renamed' in message
    assert {'memory': 'Cannot allocate memory', 'files': 'Too many open files'}[lacking] in message
    assert {path: path.read_bytes() for path in folder_of(copy).glob('*.pt')} == before
    assert_ends_as(whole, copy, 12)


@pytest.mark.parametrize(
    ('latest_of', 'removed', 'begin'),
    [
        (None, (), 12),
        # As ``cp -rL`` and ``rsync -L`` make it, of all files and of latest alone.
        (6, (9, 12), 6),
        (6, (3, 6, 9, 12), 6),
        # The run was killed between a save and the link, behind such a copy.
        (6, (12,), 9),
    ],
)
def test_a_missing_latest_is_found_again_and_a_copy_with_links_followed_goes_on(whole, copy, latest_of, removed, begin):
    latest = folder_of(copy) / 'latest-rank0.pt'
    latest.unlink()
    if latest_of:
        shutil.copy(folder_of(copy) / batch_of(latest_of), latest)
    for batch in removed:
        (folder_of(copy) / batch_of(batch)).unlink()
    before = names(copy)
    assert_ends_as(whole, copy, begin)
    assert begin < 12 or names(copy) == {*before, 'latest-rank0.pt'}


def test_a_run_whose_checkpoints_do_not_name_their_batch_is_gone_on_from(whole, copy):
    """Earlier versions took any ``save_filename``."""
    for batch in (3, 9, 12):
        (folder_of(copy) / batch_of(batch)).unlink()
    (folder_of(copy) / batch_of(6)).rename(folder_of(copy) / 'ep0-rank0.pt')
    (folder_of(copy) / 'latest-rank0.pt').unlink()
    (folder_of(copy) / 'latest-rank0.pt').symlink_to('ep0-rank0.pt')
    assert main(['export', str(folder_of(copy)), '--out', str(copy / 'out.safetensors')]) == 0
    done = again(copy, 'model.hidden_size=32')
    assert done.returncode == 2 and 'hidden_size' in done.stderr, done.stderr
    assert_ends_as(whole, copy, 6)


def test_as_many_as_asked_for_are_kept_after_a_resume_too(whole, copy):
    keep = 'save_num_checkpoints_to_keep=2'
    (folder_of(copy) / 'best-ba1.pt').write_bytes(b'of the user')
    for until, kept in ((13, 12), (15, 13)):
        done = again(copy, keep, f'max_duration={until}ba')
        assert done.returncode == 0, done.stderr
        assert names(copy) == {batch_of(kept), batch_of(until), 'latest-rank0.pt', 'best-ba1.pt'}


@pytest.mark.parametrize('background', ['false', 'true'])
def test_a_full_disk_ends_the_run_in_words_and_room_lets_it_go_on(whole, copy, background):
    for batch in (9, 12):
        (folder_of(copy) / batch_of(batch)).unlink()
    before, (_, hard) = names(copy), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))  # a checkpoint has about a megabyte
    try:
        done = again(copy, f'save_in_background={background}')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert done.returncode == 2, done.stdout + done.stderr
    message = done.stderr.splitlines()[-1]
    assert message.startswith('save_folder: a checkpoint could not be written') and 'File too large' in message
    assert 'Traceback' not in done.stderr and 'make room' in message
    assert names(copy) == before and os.readlink(folder_of(copy) / 'latest-rank0.pt') == batch_of(6)
    assert_ends_as(whole, copy, 6)


def test_a_sharded_checkpoint_is_not_passed_over_by_a_run_that_cannot_read_it(copy):
    sharded(folder_of(copy) / 'ep1-ba14')
    done = again(copy, 'max_duration=15ba')
    assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr
    assert 'ep1-ba14 is a sharded checkpoint' in done.stderr and 'state_dict_type=sharded' in done.stderr


def test_a_run_without_autoresume_is_refused_where_later_checkpoints_are(copy):
    before = {path: path.stat().st_mtime_ns for path in folder_of(copy).glob('*.pt')}
    done = again(copy, 'autoresume=false')
    assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr
    assert 'ep1-ba12-rank0.pt is of a later batch than 0' in done.stderr and 'save_overwrite=true' in done.stderr
    assert {path: path.stat().st_mtime_ns for path in folder_of(copy).glob('*.pt')} == before


def test_what_is_replaced_is_not_gone_on_from(whole, copy):
    words = ('autoresume=false', 'save_overwrite=true', 'max_duration=3ba', 'save_num_checkpoints_to_keep=1')
    done = again(copy, *words)
    assert done.returncode == 0, done.stderr
    assert f'{batch_of(12)}: now {batch_of(12)}.replaced, as this run begins at batch 0' in done.stderr
    assert names(copy) == {*(f'{batch_of(n)}.replaced' for n in (3, 6, 9, 12)), batch_of(3), 'latest-rank0.pt'}
    assert_ends_as(whole, copy, 3)


def test_a_damaged_configuration_beside_checkpoints_is_refused(copy):
    for text in ('a: [1', 'just words', '', 'seed: 1\n', '\x00\x01', '- 1\n- 2\n'):
        (folder_of(copy) / 'config.yaml').write_text(text)
        message = refused(copy)
        assert message.startswith(f'runs/{NAME}/config.yaml: no configuration of a run, or a damaged one'), text


def test_a_damaged_or_foreign_load_path_is_refused_before_anything_is_written(whole, tmp_path):
    newest = (folder_of(whole) / 'latest-rank0.pt').resolve()
    (tmp_path / 'half.pt').write_bytes(newest.read_bytes()[:-1000])
    (tmp_path / 'text.pt').write_text('weights')
    shutil.copy(newest, tmp_path / 'bit.pt')
    damage_it(tmp_path / 'bit.pt', 'one bit')
    torch.save({'weight': torch.zeros(3)}, tmp_path / 'foreign.pt')
    torch.save({'state': {'model': {}, 'rest': Trap(tmp_path / 'ran')}}, tmp_path / 'code.pt')
    (tmp_path / 'folder').mkdir()
    reasons = {
        'half.pt': 'cut off', 'text.pt': 'no file of torch.save', 'bit.pt': 'bytes have changed',
        'foreign.pt': 'it has no state/model', 'folder': 'no .metadata', 'nowhere.pt': 'does not exist',
        'code.pt': 'could run code',
    }  # fmt: skip
    for name, reason in reasons.items():
        message = refused(tmp_path, f'load_path={name}', 'load_weights_only=true')
        assert 'load_path' in message and reason in message and name in message
    sharded(tmp_path / 'folder')
    assert 'state_dict_type=sharded' in refused(tmp_path, 'load_path=folder', 'load_weights_only=true')


def test_settings_that_could_not_resume_are_refused(tmp_path):
    for word, rule in {
        'save_weights_only=true': 'autoresume to false',
        'save_num_checkpoints_to_keep=0': '0 must be at least 1, or -1 for all',
        'save_num_checkpoints_to_keep=-2': '-2 must be at least 1, or -1 for all',
        'save_filename=step.pt': 'ba{batch}',
        'save_filename=ep{epoch}-ba{batch}.pt.zst': 'uncompressed',
    }.items():
        message = refused(tmp_path, word)
        assert word.split('=')[0] in message and rule in message
