"""What a run logs of its speed: waiting for data, tokens, FLOPs really done, and the traces of a profiler."""

import json
import time

import pytest
from composer.loggers import InMemoryLogger
from torch.utils.data import DataLoader

from tests.helpers import Images, make_trainer
from tests.runs import SMALL_HERE, YAMLS, launch_here
from tread_composer.builders.trainer import build_trainer
from tread_composer.callbacks.data_wait import DataWait
from tread_composer.config import load_config

WORDS = [word for word in SMALL_HERE if not word.startswith(('callbacks.speed_monitor', 'max_duration', 'loggers'))]


def values(memory, key):
    return [value for _, value in memory.data[key]]


class SlowImages(Images):
    """Takes long for each batch of 8: a tenth of a second, which no step here does."""

    def __getitem__(self, index):
        time.sleep(0.1 / 8)
        return super().__getitem__(index)


def test_waiting_for_data_is_a_share_of_the_time():
    shares = []
    for images in (Images(), SlowImages()):
        memory, data = InMemoryLogger(), DataLoader(images, batch_size=8)
        make_trainer(callbacks=[DataWait()], data=lambda data=data: data, loggers=[memory], max_duration='3ba').fit()
        shares.append(values(memory, 'time/data_wait')[-1])
    assert 0 < shares[0] < shares[1] < 1


def logged_and_planned(cli, yaml, *words):
    """What a run of batches of 16 logs, and the figures of its plan."""
    settings = [*WORDS, 'callbacks.speed_monitor={window_size: 1}', 'loggers=null', 'max_duration=6ba', *words]
    trainer, memory = build_trainer(load_config(YAMLS / yaml, settings)), InMemoryLogger()
    memory.init(trainer.state, trainer.logger)
    trainer.logger.destinations = (*trainer.logger.destinations, memory)
    trainer.fit()
    trainer.close()
    return memory, json.loads(cli('plan', YAMLS / yaml, *settings, '--json').out)


def flops_per_batch(memory):
    rates = values(memory, 'throughput/batches_per_sec')  # in windows of one batch, from the second batch on
    return [flops / rate for flops, rate in zip(values(memory, 'throughput/flops_per_sec'), rates, strict=True)]


def test_the_flops_of_a_routed_step_are_fewer(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    memory, plan = logged_and_planned(cli, 'digits_tread.yaml', 'algorithms.tread.end_time=3ba')
    routed, dense = (6e9 * plan[name] * 16 for name in ('gmacs_routed', 'gmacs_dense'))
    assert flops_per_batch(memory) == pytest.approx([routed] * 2 + [dense] * 3)
    tokens = values(memory, 'throughput/tokens_per_sec')
    assert tokens == pytest.approx([16 * rate for rate in values(memory, 'throughput/samples_per_sec')])


def test_the_flops_of_masked_steps_are_fewer_and_of_unmasked_ones_those_of_encoder_and_decoder(
    tmp_path, monkeypatch, cli
):
    monkeypatch.chdir(tmp_path)
    per_batch = []
    for ratio in (0.5, 0.0):
        words = f'algorithms.maskdit.mask_ratio={ratio}', f'run_name=masked_{ratio}'
        memory, plan = logged_and_planned(cli, 'digits_maskdit.yaml', *words)
        per_batch.append(flops_per_batch(memory))
        assert per_batch[-1] == pytest.approx([6e9 * plan['gmacs_routed'] * 16] * 5)
    assert per_batch[0][0] < per_batch[1][0]
    words = 'algorithms.maskdit.unmask_time=0.5dur', 'run_name=unmasked'
    memory, _ = logged_and_planned(cli, 'digits_maskdit.yaml', *words)
    assert 'throughput/flops_per_sec' not in memory.data  # they change from batch to batch


def test_a_profiler_in_the_file_writes_traces_into_the_folder_of_the_run(tmp_path):
    section = 'profiler={schedule: {warmup: 1, active: 2}, torch_prof_profile_memory: false}'
    done = launch_here(
        tmp_path, YAMLS / 'digits_tread.yaml', *WORDS, 'max_duration=5ba', 'callbacks.speed_monitor=null', section
    )
    assert done.returncode == 0, done.stderr
    (trace,) = (tmp_path / 'runs' / 'digits_tread' / 'torch_traces').glob('*.json')
    names = {event.get('name') for event in json.loads(trace.read_text())['traceEvents']}
    assert 'aten::scaled_dot_product_attention' in names
    assert list((tmp_path / 'runs' / 'digits_tread' / 'composer_traces').glob('*.json'))
    assert sorted(path.name for path in tmp_path.iterdir()) == ['data', 'runs']
    # Gone on, and profiled again, beside the traces of the first part; without a schedule it is Composer's.
    again = (*WORDS, 'max_duration=16ba', 'callbacks.speed_monitor=null', 'profiler.schedule={warmup: 1, active: 2}')
    assert launch_here(tmp_path, YAMLS / 'digits_tread.yaml', *again).returncode == 0
    assert len(list(trace.parent.glob('*.json'))) > 1 and trace.exists()
    plain = (*WORDS, 'max_duration=18ba', 'callbacks.speed_monitor=null', 'profiler={torch_prof_record_shapes: true}')
    done = launch_here(tmp_path, YAMLS / 'digits_tread.yaml', *plain)
    assert done.returncode == 0, done.stderr
    done = launch_here(tmp_path, YAMLS / 'digits_tread.yaml', *WORDS, 'profiler={schedule: {warm_up: 1}}')
    assert done.returncode == 2 and 'profiler.schedule.warm_up' in done.stderr and 'warmup' in done.stderr
