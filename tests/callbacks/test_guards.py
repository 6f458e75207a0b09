"""EpochIsWhole, ProgressLines, environment, and whole files."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from tests.callbacks.small import trainer
from tread_composer.builders.run_folder import environment
from tread_composer.callbacks.epoch_is_whole import EpochIsWhole
from tread_composer.callbacks.progress import ProgressLines
from tread_composer.callbacks.update_guard import UpdateGuard
from tread_composer.io.files import write_atomically


class Streamed(IterableDataset):
    """Promises 24 samples and delivers ``delivered``, as streaming does when a shard is missing."""

    def __init__(self, delivered):
        self.delivered = delivered

    def __len__(self):
        return 24

    def __iter__(self):
        for index in range(self.delivered):
            yield torch.zeros(1, 8, 8), index % 10


@pytest.mark.parametrize('delivered', [0, 16])
def test_an_epoch_that_ends_early_stops_the_run(delivered):
    run = trainer('3ep', train_dataloader=DataLoader(Streamed(delivered), batch_size=4), callbacks=[EpochIsWhole()])
    with pytest.raises(ValueError, match=f'epoch 0 ended after {delivered // 4} of 6 batches'):
        run.fit()


@pytest.mark.parametrize(('duration', 'batches'), [('2ep', 12), ('9ba', 9)])
def test_whole_epochs_and_an_end_in_mid_epoch_pass(duration, batches):
    run = trainer(duration, train_dataloader=DataLoader(Streamed(24), batch_size=4), callbacks=[EpochIsWhole()])
    run.fit()
    assert int(run.state.timestamp.batch) == batches


def test_a_whole_epoch_passes_after_a_resume_in_its_middle(tmp_path):
    trainer('4ba', callbacks=[EpochIsWhole()], save_folder=str(tmp_path), save_interval='4ba').fit()
    run = trainer('2ep', callbacks=[EpochIsWhole()], load_path=str(tmp_path / 'latest-rank0.pt'))
    run.fit()
    assert int(run.state.timestamp.batch) == 12


@pytest.mark.parametrize(('seconds', 'numbers'), [(0, range(1, 13)), (60, (1, 12))])
def test_progress_lines_say_batch_loss_rate_and_remaining_time(capsys, seconds, numbers):
    trainer('2ep', callbacks=[UpdateGuard()], loggers=[ProgressLines(seconds=seconds)]).fit()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(('painting: ', 'batch '))]
    shape = r'batch \d+/12 \(\d+%\), loss \d+\.\d{4}, lr \S+, [\d,]+\.\d images/s, gradient norm [\d.e-]+, \d+ s left'
    assert [line.split(' ')[1] for line in lines[1:-1]] == [f'{number}/12' for number in numbers]
    assert all(re.fullmatch(shape, line) for line in lines[1:-1]), lines
    assert lines[-2].startswith('batch 12/12 (100%)') and lines[-2].endswith(', 0 s left')


def test_environment_names_versions_and_hides_secrets(monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'hf_hidden')
    monkeypatch.setattr(sys, 'argv', ['train.py', 'x.yaml', 'api_token=abc', 'seed=3'])
    written = json.loads(json.dumps(environment()))
    assert written['command'] == ['train.py', 'x.yaml', 'api_token=***', 'seed=3']
    assert written['packages']['torch'] == torch.__version__
    assert written['packages']['composer'] == '0.32.1'
    assert written['world_size'] == 1
    assert 'hf_hidden' not in json.dumps(written)


def test_a_file_is_replaced_whole_and_leaves_nothing_else(tmp_path: Path):
    write_atomically(tmp_path / 'new' / 'a.txt', b'one')
    write_atomically(tmp_path / 'new' / 'a.txt', b'two')
    with pytest.raises(TypeError):
        write_atomically(tmp_path / 'new' / 'a.txt', 'not bytes')
    assert [path.name for path in (tmp_path / 'new').iterdir()] == ['a.txt']
    assert (tmp_path / 'new' / 'a.txt').read_bytes() == b'two'
