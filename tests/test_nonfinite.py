"""A batch whose gradient is not finite, or far too large, never reaches the weights."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer import Callback, State
from composer.loggers import Logger
from streaming import MDSWriter
from torch import Tensor

from tests.helpers import assert_equal_weights
from tests.runs import SMALL, SMALL_HERE, YAMLS, assert_same_training, checkpoint, command, launch, launch_here
from tread_composer.builders.trainer import build_trainer
from tread_composer.callbacks.update_guard import UpdateGuard
from tread_composer.config import load_config
from tread_composer.data.columns import columns
from tread_composer.data.digits import digits_manifest, load_digits_arrays, prepare_digits

YAML = YAMLS / 'digits_tread.yaml'
SAMPLE, BATCH = 700, 9  # with seed 17 the digits' 700th sample comes in the tenth batch


def digits_with(folder: Path, sample: int, value: float) -> Path:
    """The digits, but for one image to train on: this value everywhere."""
    prepare_digits(folder)
    images, labels = load_digits_arrays('train')
    images[sample] = value
    shutil.rmtree(folder / 'train')
    with MDSWriter(out=str(folder / 'train'), columns=columns('pixels', (1, 8, 8)), hashes=['xxh64']) as writer:
        for image, label in zip(images.astype(np.float16), labels, strict=True):
            writer.write({'latents': image, 'label': int(label), 'name': 'digits'})
    digits_manifest('train').save(folder / 'train')
    return folder


@pytest.fixture(scope='module')
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('poisoned')
    digits_with(folder / 'data', SAMPLE, float('nan'))
    return folder


def run_words(folder: Path, name: str, policy: str, *more: str) -> tuple[str, ...]:
    places = (f'data.local={folder / "data"}', f'run_name={name}')
    return (*SMALL, *places, 'save_interval=3ba', f'on_nonfinite={policy}', *more)


def test_stop_names_the_sample_and_leaves_the_checkpoints(poisoned: Path) -> None:
    words = run_words(poisoned, 'stop', 'stop')
    done = launch_here(poisoned, YAML, *words)
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert f'Latents that are not finite: {SAMPLE} (digits)' in done.stderr
    saved = checkpoint(poisoned, 'stop')
    assert saved['timestamp']['Timestamp']['batch'] == BATCH
    assert all(value.isfinite().all() for value in saved['model'].values())
    # The same command goes on, meets the same batch, and says the same.
    again = launch_here(poisoned, YAML, *words)
    assert again.returncode == 2 and f'batch {BATCH}: ' in again.stderr


def test_rewind_ends_where_skipping_does(poisoned: Path) -> None:
    """The checkpoint is at the faulty batch itself, so both leave out that one alone."""
    skipped = launch_here(poisoned, YAML, *run_words(poisoned, 'skip', 'skip'))
    assert skipped.returncode == 0, skipped.stderr
    assert f'batch {BATCH}: the gradient is not finite' in skipped.stderr and 'Skipped: 1 so far' in skipped.stderr
    # In a process of its own: a rewind puts another program in the place of this one.
    words = command(YAML, *run_words(poisoned, 'rewind', 'rewind', 'loggers.mlflow=null'))
    rewound = launch(poisoned, words)
    assert rewound.returncode == 0, rewound.stderr
    assert_same_training(checkpoint(poisoned, 'skip'), checkpoint(poisoned, 'rewind'))


def test_rewind_on_two_ranks_leaves_out_all_since_the_checkpoint(poisoned: Path) -> None:
    words = run_words(poisoned, 'rewind2', 'rewind', 'save_interval=4ba', 'loggers.mlflow=null')
    done = launch(poisoned, command(YAML, *words), ranks=2)
    assert done.returncode == 0, done.stderr
    (entry,) = json.loads((poisoned / 'runs/rewind2/rewinds.json').read_text())
    assert (entry['checkpoint'], entry['batch']) == (8, BATCH)
    assert 'leaked' not in done.stderr
    (optimizer,) = checkpoint(poisoned, 'rewind2')['optimizers'].values()
    assert {float(entry['step']) for entry in optimizer['state'].values()} == {14 - 2}


class Undo(Callback):
    """Lets one batch's update happen, and then puts weights and moments back: a skip, done in another way."""

    def __init__(self, batch: int) -> None:
        self.batch, self._kept = batch, None

    def batch_start(self, state: State, logger: Logger) -> None:
        if int(state.timestamp.batch) == self.batch:
            optimizer = state.optimizers[0].state_dict()
            self._kept = copy.deepcopy((state.model.state_dict(), optimizer))

    def batch_end(self, state: State, logger: Logger) -> None:
        if self._kept is not None:
            model, optimizer = self._kept
            # The rate of the next batch has been set meanwhile.
            optimizer['param_groups'] = state.optimizers[0].state_dict()['param_groups']
            state.model.load_state_dict(model)
            state.optimizers[0].load_state_dict(optimizer)
            self._kept = None


class Watch(Callback):
    """The samples of each batch, and the norm of its gradient as torch measures it."""

    def __init__(self) -> None:
        self.samples: list[list[int]] = []
        self.norms: list[float] = []

    def after_train_batch(self, state: State, logger: Logger) -> None:
        parameters = [parameter for parameter in state.model.parameters() if parameter.grad is not None]
        self.norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, float('inf'))))
        self.samples.append(state.batch['sample_ids'].tolist())


def trained_here(data: Path, *more: str, callback: Callback | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights, and what the guard has seen."""
    words = ('max_duration=14ba', 'save_folder=null', 'autoresume=false', f'data.local={data}')
    trainer = build_trainer(load_config(YAMLS / 'digits.yaml', [*SMALL_HERE, *words, *more]))
    trainer.state.callbacks += [callback] if callback else []
    trainer.fit()
    trainer.close()
    guard = next(part for part in trainer.state.callbacks if isinstance(part, UpdateGuard))
    return trainer.state.model.state_dict(), guard.state_dict()


def test_a_skipped_batch_is_as_if_its_update_had_been_undone(poisoned: Path, digits: Path) -> None:
    size = 'global_train_batch_size=128'
    skipping, _ = trained_here(poisoned / 'data', 'on_nonfinite=skip', size)
    undoing, _ = trained_here(digits, size, callback=Undo(BATCH))
    assert_equal_weights(skipping, undoing)


def test_a_spike_is_skipped_by_its_gradient_norm(digits: Path, tmp_path: Path) -> None:
    words = ('on_nonfinite=skip', 'global_train_batch_size=32', 'max_duration=30ba', 'spike_factor=100')
    watch = Watch()
    _, calm = trained_here(digits, *words, callback=watch)
    assert calm['skipped'] == 0 and len(calm['norms']) == 30
    late = watch.samples[25][0]  # when there are norms enough to compare with
    _, spiked = trained_here(digits_with(tmp_path / 'data', late, 3000.0), *words)
    assert spiked['skipped'] == 1 and len(spiked['norms']) == 29 and max(spiked['norms']) < 10


@pytest.mark.parametrize('words', [('global_train_batch_size=32',), ('device_train_microbatch_size=4',)])
def test_the_logged_norm_is_that_of_the_whole_gradient(digits: Path, words: tuple[str, ...]) -> None:
    watch = Watch()
    _, guard = trained_here(digits, *words, 'max_duration=4ba', 'algorithms.gradient_clipping=null', callback=watch)
    assert guard['norms'] == pytest.approx(watch.norms, rel=1e-6) and len(watch.norms) == 4


def test_a_damaged_list_of_rewinds_is_refused(digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / 'runs' / 'damaged'
    folder.mkdir(parents=True)
    (folder / 'rewinds.json').write_text('[{"batch": 3}]')
    done = launch_here(tmp_path, YAML, *SMALL, f'data.local={digits}', 'run_name=damaged', 'on_nonfinite=rewind')
    assert done.returncode == 2 and 'rewinds.json: damaged' in done.stderr, done.stderr
