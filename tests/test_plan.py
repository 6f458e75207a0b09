"""``python -m tread_composer plan``: figures against the published ones, and nothing written.

What its text says of each recipe: ``tests/frozen``.
"""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from tests.runs import YAMLS, environment
from tread_composer.config import part_names
from tread_composer.config.registry import KINDS, MEASURING


@pytest.fixture
def plan(cli, tmp_path, monkeypatch):
    """What a plan prints, in a folder where nothing is, and where nothing is afterwards."""
    monkeypatch.chdir(tmp_path)
    yield lambda name, *words, code=0: cli('plan', YAMLS / f'{name}.yaml', *words, code=code)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def figures(plan):
    return lambda name, *words, code=0: json.loads(plan(name, '--json', *words, code=code).out)


# methods.md section 6, 256 tokens: dense GMACs, routed GMACs at r = 0.5, ideal step ratio
@pytest.mark.parametrize(('size', 'dense', 'routed', 'ratio'), [('b', 23.01, 16.13, 1.43), ('xl', 118.62, 69.13, 1.72)])
def test_costs_are_those_of_the_flop_model(figures, size, dense, routed, ratio):
    found = figures(f'dit_{size}_tread', code=2)  # there are no latents here: planned all the same
    # The table is for 8 output channels; ours have 4.
    assert (found['gmacs_dense'], found['gmacs_routed']) == pytest.approx((dense, routed), rel=2e-3)
    assert found['ideal_step_ratio'] == pytest.approx(ratio, abs=0.01)
    depth = len(found['tokens_per_block'])
    assert found['tokens_per_block'] == [256] * 2 + [128] * (depth - 5) + [256] * 3


def test_a_state_space_network_is_counted_with_its_scans(figures):
    # The kernel is for a GPU; planning for it needs none, and counts the torch form.
    found = figures('mamba2_dit_b_tread', 'model.kernel=fused', code=2)

    def block(n, d=768, e=1536, heads=24, state=64):
        linear = n * d * (2 * e + 4 * state + 2 * heads) + n * e * d + 6 * n * d * d + 6 * d * d
        return linear + 2 * n * n * state + n * n * e  # C B^T of each direction, one matrix on the values

    rest = 3 * 768**2 + 256 * 768 + 32 * 256 * 768
    assert found['gmacs_dense'] * 1e9 == pytest.approx(12 * block(256) + rest, rel=1e-12)
    assert found['gmacs_routed'] * 1e9 == pytest.approx(5 * block(256) + 7 * block(128) + rest, rel=1e-12)
    assert found['tokens_per_block'] == [256] * 2 + [128] * 7 + [256] * 3


def test_a_rotary_network_is_counted(figures):
    found = figures('lightning_dit_xl_tread', code=2)
    d, dense, sparse = 1152, 256, 128
    blocks = [12 * n * d**2 + 2 * n**2 * d + 6 * d**2 for n in [dense] * 5 + [sparse] * 23]
    ends = 3 * d**2 + 256 * d + 2 * 32 * dense * d
    assert found['gmacs_routed'] == pytest.approx((sum(blocks) + ends) / 1e9, rel=1e-9)
    assert found['gmacs_dense'] == pytest.approx((28 * blocks[0] + ends) / 1e9, rel=1e-9)
    assert found['tokens_per_block'] == [256] * 2 + [128] * 23 + [256] * 3
    assert found['memory_gib']['activations'] > 0


def test_length_batches_and_memory(figures):
    found = figures('digits_tread', '--ranks', '2', 'max_duration=22ba', 'device_train_microbatch_size=16')
    assert (found['batches'], found['batches_per_epoch'], found['epochs']) == (22, 11, 2.0)
    assert (found['samples_per_step'], found['samples_per_rank'], found['microbatch']) == (128, 64, 16)
    memory = found['memory_gib']
    assert memory['optimizer'] * 2**30 == 8 * found['parameters']
    assert memory['average'] * 2**30 == 4 * found['parameters']
    for optimizer, moments in (
        ('{name: adamw, lr: 1e-3, amsgrad: true}', 3),
        ('{name: sgd, lr: 1e-3, momentum: 0.9}', 1),
        ('{name: sgd, lr: 1e-3}', 0),
        ('{name: "torch.optim:NAdam", lr: 1e-3}', 2),
    ):
        state = figures('digits_tread', f'optimizer={optimizer}')['memory_gib']['optimizer']
        assert state * 2**30 == 4 * moments * found['parameters'], optimizer
    activations = [
        figures('digits_tread', '--ranks', '2', f'device_train_microbatch_size={size}')['memory_gib']['activations']
        for size in (4, 8, 16)
    ]
    # Linear: a part that serves all samples, and a share for each.
    assert activations[2] == memory['activations']
    assert activations[2] - activations[1] == pytest.approx(2 * (activations[1] - activations[0]))
    assert figures('digits_tread', 'max_duration=3ep')['batches'] == 33
    # Settings of Composer's that make a run shorter: fewer batches an epoch, and a share of the whole.
    found = figures('digits_tread', 'max_duration=3ep', 'train_subset_num_batches=4')
    assert (found['batches'], found['batches_per_epoch'], found['epochs']) == (12, 4, 3.0)
    assert figures('digits_tread', 'max_duration=3ep', 'train_subset_num_batches=40')['batches'] == 33
    assert figures('digits_tread', 'max_duration=10ba', 'scale_schedule_ratio=0.55')['batches'] == 5


def test_averages_are_counted_and_one_too_long_for_the_run_is_said(plan, figures):
    changed = 'algorithms.ema.decay=0.9999'
    assert re.search('\naverage +at the end 93% of the average', plan('digits_tread', changed).out)
    for words in ([], [changed, 'algorithms.ema.warmup=true']):
        text = plan('digits_tread', *words).out
        assert 'of the average' not in text and 'files of' not in text
    snapshots = 'algorithms.power_ema={widths: [0.05, 0.1], interval: 100ba}'
    each = figures('digits_tread', snapshots)['parameters'] * 4 * 2 / 2**30
    assert f'7 files of {each:.2f} GiB, {7 * each:.1f} GiB on disk' in plan('digits_tread', snapshots).out
    assert '4 files of' in plan('digits_tread', 'algorithms.power_ema={widths: [0.1], interval: 0.25dur}').out
    words = ('algorithms.power_ema={widths: [0.05, 0.1, 0.2]}',)  # three beside the one of `ema`
    usual, more = (figures('digits', *settings)['memory_gib']['average'] for settings in ((), words))
    assert more == pytest.approx(4 * usual)


def test_a_list_of_blocks_that_is_not_there_is_refused(plan):
    for named in (
        'denoiser.blocks',
        '[denoiser.blocks]',
        '{denoiser.blocks: {tokens_out: null}}',
        '{denoiser.blocks: }',
    ):
        plan('digits_tread', f'algorithms.tread.blocks={named}')
    refused = plan('digits_tread', 'algorithms.tread.blocks=nonsense.blocks', code=2).err
    assert "algorithms.tread.blocks: the model has no module 'nonsense.blocks'" in refused


def test_tokens_at_both_ends_that_never_skip_are_counted(figures):
    found = figures('digits_tread', 'algorithms.tread.always_keep=[3, 1]')
    assert found['tokens_per_block'] == [16, 16, 10, 10, 10, 16, 16, 16]  # 4 of 16, and half of the other 12


def test_without_data_their_shape_is_asked_for(plan):
    output = plan('dit_xl', 'data.channels=null', code=2)
    assert output.out == '' and 'give data.channels to plan without them' in output.err


def test_the_numbers_of_fasterdit_are_shown(plan):
    text = plan('digits_fasterdit', 'algorithms.direction_schedule={start_time: 0.1dur, end_time: 0.5dur}').out
    assert 'latent_normalization:' not in text and 'end_time: 0.5dur' in text
    assert 'std 0.820 for the network' in text and '1.0895' in text and '-0.389027' in text


def test_the_schema_is_json_and_every_part_that_a_file_can_name_is_listed_with_its_purpose(cli):
    assert 'run_name' in json.loads(cli('schema').out)['properties']
    rows = [re.split(r' {2,}', line) for line in cli('schema', '--components').out.splitlines()[:-1]]
    assert [row[:2] for row in rows] == [
        *([kind, name] for kind in KINDS for name in part_names(kind)),
        *([kind, name] for kind, table in MEASURING.items() for name in table),
    ]
    listed = {(row[0], row[1]): row[2:] for row in rows}
    assert listed['algorithm', 'ema'][0] == 'ours' and listed['algorithm', 'composer_ema'][0] == 'Composer'
    assert listed['optimizer', 'adamw'][0] == 'torch'
    purpose = 'Train with a random share of the tokens skipping most of the blocks (TREAD, arXiv 2501.04765).'
    assert listed['algorithm', 'tread'] == ['ours', purpose]
    assert [row for row in rows if row[2] == 'ours' and len(row) < 4] == []


def test_a_reader_that_leaves_early_ends_the_command_quietly():
    command = [sys.executable, '-m', 'tread_composer', 'plan', str(YAMLS / 'digits_tread.yaml')]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, env=environment(), stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert done.returncode == 128 + signal.SIGPIPE
    assert b'Traceback' not in done.stderr and b'BrokenPipe' not in done.stderr


def test_a_batch_of_more_samples_than_there_are_is_refused_as_training_refuses_it(plan):
    refused = plan('digits', 'global_train_batch_size=2000', code=2)
    assert 'global_train_batch_size: 2000 is more than the 1500 samples' in refused.err


def test_nodes_share_ranks_and_data(plan, figures):
    words = ['dit_s_tread', '--ranks', '8', '--nodes', '2', '--without-data']
    text = plan(*words).out
    assert re.search(r'nodes +2 with 4 ranks each; an epoch takes each node to 100% of the shards', text)
    assert 'takes each node to 50% of the shards' in plan(*words, 'data.num_canonical_nodes=4').out
    assert 'data.num_canonical_nodes: 3 and 2 nodes' in plan(*words, 'data.num_canonical_nodes=3', code=2).err
    refused = plan('dit_s_tread', '--ranks', '8', '--nodes', '3', code=2).err
    assert '--ranks 8 --nodes 3: every node has equally many ranks; take 9 ranks' in refused
    assert 'nodes' not in figures('digits', '--ranks', '2')['config']
