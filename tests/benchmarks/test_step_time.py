"""``benchmarks/step_time.py`` on the digits' recipe: its rows, and the arithmetic between them."""

import json

import contenders
import pytest
import step_time
import torch
from torch._dynamo.testing import CompileCounter

from tread_composer.models import DiT

YAML = 'yamls/digits_tread.yaml'


def digits_dit() -> DiT:
    """A peer of the recipe's size."""
    sizes = {'patch_size': 2, 'hidden_size': 96, 'depth': 8, 'num_heads': 4}
    return DiT(latent_size=8, in_channels=1, num_classes=10, learn_sigma=True, **sizes)


@pytest.fixture(scope='module')
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp('rows') / 'rows.jsonl'
    peer = f'{__name__}:digits_dit'
    words = [YAML, '--batch-size', '8', '--pairs', '3', '--device', 'cpu', '--dtype', 'fp32', '--peer', peer]
    assert step_time.main([*words, '--out', str(path)]) == 0
    return [json.loads(line) for line in path.read_text().splitlines()]


def of(rows, measurement, **values):
    chosen = [row for row in rows if row['measurement'] == measurement and values.items() <= row.items()]
    assert len(chosen) == 1, chosen
    return chosen[0]


def test_the_ideal_is_made_of_the_dense_parts_of_the_same_run(rows):
    ratio, dense = of(rows, 'ratio', of='dense / routed'), of(rows, 'step', contender='dense')
    passes, optimizer = dense['forward_backward_seconds'], dense['optimizer_seconds']
    assert 0 < optimizer < passes
    assert ratio['ideal'] == pytest.approx((passes + optimizer) / (passes / ratio['flop_ratio'] + optimizer))
    assert ratio['quotient'] == pytest.approx(ratio['ratio']['median'] / ratio['ideal'])
    assert 1 < ratio['ideal'] < ratio['flop_ratio']


def test_a_routed_step_has_fewer_flops_and_a_lower_peak(rows):
    dense, routed = of(rows, 'step', contender='dense'), of(rows, 'step', contender='routed')
    ratio = of(rows, 'ratio', of='dense / routed')
    assert dense['flops'] / routed['flops'] == pytest.approx(ratio['flop_ratio'])
    assert routed['peak_gib'] < dense['peak_gib']
    rate = 1e12 * of(rows, 'product')['tflops']
    assert dense['mfu'] == pytest.approx(dense['flops'] / dense['seconds']['median'] / rate)
    assert dense['tokens_per_second'] == pytest.approx(8 * 16 / dense['seconds']['median'])


def test_blocks_are_timed_alone_and_a_peer_runs_in_the_same_turns(rows):
    assert {row['block'] for row in rows if row['measurement'] == 'block'} == {'N', 'K 0'}  # all and the kept tokens
    names = {row['contender']: row['turns'] for row in rows if row['measurement'] == 'step'}
    assert set(names.values()) == {3} and len(names) == 3
    for ours in ('dense', 'routed'):
        assert of(rows, 'ratio', of=f'{__name__}:digits_dit / {ours}')['ratio']['median'] > 0


def test_routing_itself_is_a_sum_of_its_parts(rows):
    routing, step = of(rows, 'routing'), of(rows, 'step', contender='routed')
    parts = [routing[name] for name in ('draw', 'gather_and_scatter', 'their_backward')]
    assert min(parts) > 0 and routing['probe'] > 0  # the first steps were watched
    assert routing['seconds'] == pytest.approx(sum(parts) + 4 * routing['probe'] / 700)
    assert routing['share'] == pytest.approx(routing['seconds'] / step['seconds']['median']) and routing['share'] < 0.5


def test_one_network_takes_dense_and_routed_steps():
    problem = contenders.read_problem(YAML, [], batch_size=4, tokens=None, dtype='fp32', device=torch.device('cpu'))
    dense, routed = contenders.make_contenders(problem, one_network=True)
    assert dense.model is routed.model and dense.optimizer is routed.optimizer
    words = [YAML, '--batch-size', '4', '--one-network']
    calls = step_time.block_calls(problem, [dense, routed], step_time.parse(words))
    assert [calls[name][1][0].shape[1] for name in ('N', 'K 0')] == [16, 8]
    before = float(dense.loss().detach())
    routed.loss()
    routed.finished()
    assert float(dense.loss().detach()) == before  # its route is off again
    routed.step(lambda: None)
    assert float(dense.loss().detach()) != before


def test_a_peer_that_names_its_blocks_is_compiled_by_block_as_ours_is():
    how = {'batch_size': 4, 'tokens': None, 'dtype': 'fp32', 'device': torch.device('cpu')}
    problem, operations = contenders.read_problem(YAML, [], **how), {}
    for unit in ('blocks', 'model'):
        torch._dynamo.reset()
        dense, _, peer = contenders.make_contenders(problem, [f'{__name__}:digits_dit'])
        for contender in (dense, peer):
            counter = CompileCounter()  # runs the captured graph as it is
            contenders.compile_contender(contender, unit, backend=counter)
            contender.loss()
            operations[contender.name, unit] = counter.op_count
    for name in (dense.name, peer.name):  # one block of eight, whose graph serves all
        assert 0 < operations[name, 'blocks'] < operations[name, 'model'] / 4, operations


def test_dense_and_routed_start_from_equal_weights_and_each_step_has_a_route_of_its_own():
    how = {'batch_size': 4, 'tokens': None, 'dtype': 'fp32', 'device': torch.device('cpu')}
    problem = contenders.read_problem('yamls/digits.yaml', [], **how)
    dense, routed = contenders.make_contenders(problem)
    pairs = zip(dense.model.parameters(), routed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in pairs)
    losses = {float(contender.loss().detach()) for contender in (dense, dense)}
    assert len(losses) == 1
    for _ in range(2):
        losses.add(float(routed.loss().detach()))
        routed.finished()
    assert len(losses) == 3


@pytest.mark.parametrize(
    ('words', 'text'),
    [
        ([YAML, '--tokens', '64'], '--tokens'),
        (['yamls/dit_s.yaml', '--tokens', '200'], '200 is no square'),
        (['yamls/digits_maskdit.yaml', 'algorithms.maskdit.unmask_time=null'], 'maskdit'),
        ([YAML, '--batch-size', '2', '--peer', 'no_such_package:network'], 'package.module:callable'),
    ],
)
def test_what_cannot_be_timed_is_refused_in_words(capsys, words, text):
    assert step_time.main(words) == 2
    assert text in capsys.readouterr().err
