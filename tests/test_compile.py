"""``torch.compile`` through a real ``Trainer``: one graph for training, one for evaluation, then no more."""

import pytest
import torch
from composer import Callback
from torch._dynamo.testing import CompileCounter

from tests.helpers import fit, loader
from tread_composer.algorithms.ema import EMA
from tread_composer.algorithms.tread import Tread

ROUTE = {'start': 1, 'end': -2, 'selection_rate': 0.5}


class Graphs(Callback):
    """How many graphs there are after each batch and each evaluation."""

    def __init__(self, counter):
        self.counter, self.after_batch, self.after_eval = counter, [], []

    def batch_end(self, state, logger):
        self.after_batch.append(self.counter.frame_count)

    def eval_end(self, state, logger):
        self.after_eval.append(self.counter.frame_count)


def compiled(algorithms, **settings):
    """Graphs and losses of a training; fullgraph turns any break into an error."""
    torch._dynamo.reset()
    graphs = Graphs(CompileCounter())  # runs the captured graph as it is
    config = {'backend': graphs.counter, 'fullgraph': True}
    return graphs, fit(algorithms, callbacks=[graphs], compile_config=config, **settings)[1].losses


def test_one_graph_for_training_one_for_evaluation_no_break_and_no_recompile():
    evaluated = {'eval_dataloader': loader(shuffle=False), 'eval_interval': '2ba'}
    graphs, losses = compiled([Tread(**ROUTE), EMA(0.9)], **evaluated)
    assert graphs.after_batch == [1, 1, 2, 2, 2, 2]
    assert graphs.after_eval == [2, 2, 2]
    eager = fit([Tread(**ROUTE), EMA(0.9)], **evaluated)[1].losses
    assert [float.fromhex(loss) for loss in losses] == pytest.approx([float.fromhex(loss) for loss in eager], rel=1e-5)


def test_a_route_that_ends_costs_one_more_graph():
    assert compiled([Tread(**ROUTE, end_time='3ba')])[0].after_batch == [1, 1, 1, 2, 2, 2]
