"""Checkpoints that a thread writes while training goes on: the same files, whatever happens to it."""

import pytest
import torch
from composer import Callback
from composer.loggers import LoggerDestination

from tests.callbacks.small import trainer
from tests.runs import assert_same_training, checkpoint
from tests.weights.short_runs import LENGTH, NAME, again, batch_of, folder_of, names, program, refused
from tread_composer.callbacks.checkpoint_saver import WholeCheckpointSaver

BACKGROUND = 'save_in_background=true'


class Uploads(LoggerDestination):
    """Remembers what it was handed."""

    def __init__(self):
        self.names = []

    def upload_file(self, state, remote_file_name, file_path, *, overwrite=False):
        assert file_path.exists()
        self.names.append(remote_file_name)


class Fault(Callback):
    """A run that ends in its fifth batch, while the checkpoint of the fourth is being written."""

    def batch_start(self, state, logger):
        if state.timestamp.batch == 4:
            raise RuntimeError('the fault')


def train(root, die_at, *words):
    return program(root, 'train_and_die.py', *words, DIE_AT=die_at)


def test_training_goes_on_and_each_checkpoint_is_that_of_its_batch(whole, tmp_path):
    done = train(tmp_path, 'late:3', BACKGROUND, 'callbacks={further: {name: "tests.weights.train_and_die:Further"}}')
    assert done.returncode == 0, done.stdout + done.stderr
    assert names(tmp_path) == names(whole)
    for batch in range(3, LENGTH + 1, 3):
        states = [torch.load(folder_of(root) / batch_of(batch), weights_only=False) for root in (tmp_path, whole)]
        assert_same_training(*(state['state'] for state in states))
        assert states[0]['state']['timestamp']['Timestamp']['batch'] == batch


def test_a_run_that_is_killed_while_a_thread_writes_ends_as_the_whole_one(whole, tmp_path):
    assert train(tmp_path, 'half:6', BACKGROUND).returncode == -9
    assert f'.unfinished-{batch_of(6)}' in names(tmp_path) and batch_of(3) in names(tmp_path)
    done = again(tmp_path, BACKGROUND)
    assert done.returncode == 0 and 'batches 3 to 12' in done.stdout, done.stdout + done.stderr
    assert_same_training(checkpoint(tmp_path, NAME), checkpoint(whole, NAME))
    assert names(tmp_path) == names(whole)


def test_a_save_that_holds_training_up_is_said_to_with_the_remedy(tmp_path):
    done = train(tmp_path, 'slow:6', 'max_duration=6ba')
    lines = [line for line in done.stderr.splitlines() if 'A checkpoint held the training up for' in line]
    assert done.returncode == 0 and len(lines) == 1 and 'set save_in_background=true' in lines[0], done.stderr


@pytest.mark.parametrize('in_background', [False, True])
def test_what_was_saved_is_uploaded_also_where_the_run_ends_early(tmp_path, in_background):
    uploads = Uploads()
    saver = WholeCheckpointSaver(str(tmp_path), save_interval='2ba', remote_file_name='ba{batch}',
                                 latest_remote_file_name=None, in_background=in_background)  # fmt: skip
    run = trainer(callbacks=[saver, Fault()], loggers=[uploads])
    with pytest.raises(RuntimeError, match='the fault'):
        run.fit()
    run.close()
    assert uploads.names == ['ba2', 'ba4'] and len(list(tmp_path.glob('ep*.pt'))) == 2


def test_sharded_checkpoints_are_not_written_in_the_background(tmp_path):
    fsdp = 'parallelism_config={fsdp: {state_dict_type: sharded}}'
    assert 'save_in_background: true is for full checkpoints' in refused(tmp_path, BACKGROUND, fsdp)
