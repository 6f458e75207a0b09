"""Checkpoints that a thread writes while training goes on: the same files, whatever happens to it."""

import os
import resource
import sys

import torch

from tests.runs import ROOT, assert_same_training, checkpoint, launch
from tests.weights.short_runs import LENGTH, NAME, WORDS, YAML, again, batch_of, folder_of, names, refused

BACKGROUND = 'save_in_background=true'


def train(root, die_at, *words):
    program = [sys.executable, str(ROOT / 'tests' / 'weights' / 'train_and_die.py')]
    words = (*WORDS, BACKGROUND, 'loggers.mlflow=null', 'device=cpu', 'progress_bar=false', *words)
    return launch(root, [*program, str(YAML), *words], DIE_AT=die_at)


def test_training_goes_on_and_each_checkpoint_is_that_of_its_batch(whole, tmp_path):
    done = train(tmp_path, 'late:3', 'callbacks={further: {name: "tests.weights.train_and_die:Further"}}')
    assert done.returncode == 0, done.stdout + done.stderr
    assert names(tmp_path) == names(whole)
    for batch in range(3, LENGTH + 1, 3):
        states = [torch.load(folder_of(root) / batch_of(batch), weights_only=False) for root in (tmp_path, whole)]
        assert_same_training(*(state['state'] for state in states))
        assert states[0]['state']['timestamp']['Timestamp']['batch'] == batch


def test_a_run_that_is_killed_while_a_thread_writes_ends_as_the_whole_one(whole, tmp_path):
    assert train(tmp_path, 'half:6').returncode == -9
    assert f'.unfinished-{batch_of(6)}' in names(tmp_path) and batch_of(3) in names(tmp_path)
    done = again(tmp_path, BACKGROUND)
    assert done.returncode == 0 and 'batches 3 to 12' in done.stdout, done.stdout + done.stderr
    assert_same_training(checkpoint(tmp_path, NAME), checkpoint(whole, NAME))
    assert names(tmp_path) == names(whole)


def test_a_disk_that_fills_while_a_thread_writes_ends_the_run_in_words(copy):
    for batch in (9, 12):
        (folder_of(copy) / batch_of(batch)).unlink()
    before, (_, hard) = names(copy), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        done = again(copy, BACKGROUND)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stdout + done.stderr
    assert done.stderr.splitlines()[-1].startswith('save_folder: a checkpoint could not be written')
    assert names(copy) == before and os.readlink(folder_of(copy) / 'latest-rank0.pt') == batch_of(6)


def test_sharded_checkpoints_are_not_written_in_the_background(tmp_path):
    fsdp = 'parallelism_config={fsdp: {state_dict_type: sharded}}'
    assert 'save_in_background: true is for full checkpoints' in refused(tmp_path, BACKGROUND, fsdp)
