"""``python -m tread_composer plan``: figures against the published ones, and nothing written."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from tests.runs import ROOT, environment
from tread_composer.cli import main
from tread_composer.config import part_names
from tread_composer.config.registry import KINDS, MEASURING

YAMLS = ROOT / 'yamls'


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where a plan is made: nothing is there, and nothing is there afterwards."""
    monkeypatch.chdir(tmp_path)
    yield
    assert list(tmp_path.iterdir()) == []


def plan(capsys, name, *words, code=0):
    assert main(['plan', str(YAMLS / name), *words]) == code
    return capsys.readouterr()


def figures(capsys, name, *words, code=0):
    return json.loads(plan(capsys, name, '--json', *words, code=code).out)


# methods.md section 6, 256 tokens: dense GMACs, routed GMACs at r = 0.5, ideal step ratio
@pytest.mark.parametrize(('size', 'dense', 'routed', 'ratio'), [('b', 23.01, 16.13, 1.43), ('xl', 118.62, 69.13, 1.72)])
def test_costs_are_those_of_the_flop_model(capsys, size, dense, routed, ratio):
    found = figures(capsys, f'dit_{size}_tread.yaml', code=2)  # there are no latents here: planned all the same
    # The table is for 8 output channels; ours have 4.
    assert found['gmacs_dense'] == pytest.approx(dense, rel=2e-3)
    assert found['gmacs_routed'] == pytest.approx(routed, rel=2e-3)
    assert found['ideal_step_ratio'] == pytest.approx(ratio, abs=0.01)
    depth = len(found['tokens_per_block'])
    assert found['tokens_per_block'] == [256] * 2 + [128] * (depth - 5) + [256] * 3


def test_an_average_that_is_too_long_for_the_run_is_said(capsys):
    changed = 'algorithms.ema.decay=0.9999'
    assert re.search('\naverage +at the end 93% of the average', plan(capsys, 'digits_tread.yaml', changed).out)
    for words in ([], [changed, 'algorithms.ema.warmup=true']):
        assert 'of the average' not in plan(capsys, 'digits_tread.yaml', *words).out


def test_a_state_space_network_is_counted_with_its_scans(capsys):
    # The kernel is for a GPU; planning for it needs none, and counts the torch form.
    found = figures(capsys, 'mamba2_dit_b_tread.yaml', 'model.kernel=fused', code=2)

    def block(n, d=768, e=1536, heads=24, state=64):
        linear = n * d * (2 * e + 4 * state + 2 * heads) + n * e * d + 6 * n * d * d + 6 * d * d
        return linear + 2 * n * n * state + n * n * e  # C B^T of each direction, one matrix on the values

    rest = 3 * 768**2 + 256 * 768 + 32 * 256 * 768
    assert found['gmacs_dense'] * 1e9 == pytest.approx(12 * block(256) + rest, rel=1e-12)
    assert found['gmacs_routed'] * 1e9 == pytest.approx(5 * block(256) + 7 * block(128) + rest, rel=1e-12)
    assert found['tokens_per_block'] == [256] * 2 + [128] * 7 + [256] * 3


def test_a_dense_file_has_no_route(capsys):
    found = figures(capsys, 'digits.yaml')
    assert found['ideal_step_ratio'] == 1 and found['tokens_per_block'] == [16] * 8 and found['routes'] == []


def test_length_batches_and_memory(capsys):
    found = figures(capsys, 'digits_tread.yaml', '--ranks', '2', 'max_duration=22ba', 'device_train_microbatch_size=16')
    assert (found['batches'], found['batches_per_epoch'], found['epochs']) == (22, 11, 2.0)
    assert (found['samples_per_step'], found['samples_per_rank'], found['microbatch']) == (128, 64, 16)
    memory = found['memory_gib']
    assert memory['optimizer'] * 2**30 == 8 * found['parameters']
    assert memory['average'] * 2**30 == 4 * found['parameters']
    smaller = figures(capsys, 'digits_tread.yaml', '--ranks', '2', 'device_train_microbatch_size=8')['memory_gib']
    assert smaller['activations'] == pytest.approx(memory['activations'] / 2, rel=0.05)  # some serve all samples
    assert figures(capsys, 'digits_tread.yaml', 'max_duration=3ep')['batches'] == 33


def test_snapshots_are_counted_before_they_fill_the_disk(capsys):
    words = ('algorithms.power_ema={widths: [0.05, 0.1], interval: 100ba}',)
    each = figures(capsys, 'digits_tread.yaml', *words)['parameters'] * 4 * 2 / 2**30
    assert f'7 files of {each:.2f} GiB, {7 * each:.1f} GiB on disk' in plan(capsys, 'digits_tread.yaml', *words).out
    by_share = 'algorithms.power_ema={widths: [0.1], interval: 0.25dur}'
    assert '4 files of' in plan(capsys, 'digits_tread.yaml', by_share).out
    assert 'files of' not in plan(capsys, 'digits_tread.yaml').out


def test_a_list_of_blocks_that_is_not_there_is_refused(capsys):
    for named in (
        'denoiser.blocks',
        '[denoiser.blocks]',
        '{denoiser.blocks: {tokens_out: null}}',
        '{denoiser.blocks: }',
    ):
        plan(capsys, 'digits_tread.yaml', f'algorithms.tread.blocks={named}')
    refused = plan(capsys, 'digits_tread.yaml', 'algorithms.tread.blocks=nonsense.blocks', code=2).err
    assert "algorithms.tread.blocks: the model has no module 'nonsense.blocks'" in refused


def test_tokens_at_both_ends_that_never_skip_are_counted(capsys):
    found = figures(capsys, 'digits_tread.yaml', 'algorithms.tread.always_keep=[3, 1]')
    assert found['tokens_per_block'] == [16, 16, 10, 10, 10, 16, 16, 16]  # 4 of 16, and half of the other 12


def test_the_text_has_the_figures_and_the_resolved_configuration(capsys):
    text = plan(capsys, 'digits_tread.yaml', 'algorithms.tread.end_time=0.9dur').out
    assert '16 16 8 8 8 16 16 16' in text and 'will be made from scikit-learn' in text
    assert 'end_time 0.9dur' in text and 'run_name: digits_tread' in text


def test_missing_data_are_said_on_stderr_and_in_the_exit_code(capsys):
    output = plan(capsys, 'dit_xl.yaml', code=2)
    assert 'data/imagenet256/train' in output.err and 'NOT READY' in output.out
    output = plan(capsys, 'dit_xl.yaml', 'data.channels=null', code=2)
    assert output.out == '' and 'give data.channels to plan without them' in output.err


def test_the_schema_is_json_and_every_part_that_a_file_can_name_is_listed_with_its_purpose(capsys):
    assert main(['schema']) == 0
    assert 'run_name' in json.loads(capsys.readouterr().out)['properties']
    assert main(['schema', '--components']) == 0
    rows = [re.split(r' {2,}', line) for line in capsys.readouterr().out.splitlines()[:-1]]
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
    done = subprocess.run(command, env=environment(PYTHONPATH=str(ROOT)), stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert done.returncode == 128 + signal.SIGPIPE
    assert b'Traceback' not in done.stderr and b'BrokenPipe' not in done.stderr


def test_nodes_share_ranks_and_data(capsys):
    words = ['--ranks', '8', '--nodes', '2', '--without-data']
    text = plan(capsys, 'dit_xl_tread.yaml', *words).out
    assert re.search(r'nodes +2 with 4 ranks each; an epoch takes each node to 100% of the shards', text)
    shared = plan(capsys, 'dit_xl_tread.yaml', *words, 'data.num_canonical_nodes=4').out
    assert 'takes each node to 50% of the shards' in shared
    assert 'nodes' not in figures(capsys, 'digits.yaml', '--ranks', '2')['config']


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['--ranks', '8', '--nodes', '3'], '--ranks 8 --nodes 3: every node has equally many ranks; take 9 ranks'),
        (['--ranks', '8', '--nodes', '2', 'data.num_canonical_nodes=3'], 'data.num_canonical_nodes: 3 and 2 nodes'),
    ],
)
def test_what_does_not_divide_among_the_nodes_is_refused(capsys, words, message):
    assert message in plan(capsys, 'dit_xl_tread.yaml', *words, code=2).err
