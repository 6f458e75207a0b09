"""``torch.compile`` through a real ``Trainer``: a graph for training, one for evaluation, one when the route ends."""

import pytest
import torch
from composer import Callback
from torch._dynamo.testing import CompileCounter

from tests.helpers import fit, loader
from tread_composer.algorithms.ema import EMA
from tread_composer.algorithms.tread import Tread


class Graphs(Callback):
    """How many graphs there are after each batch and each evaluation."""

    def __init__(self, counter):
        self.counter, self.after_batch, self.after_eval = counter, [], []

    def batch_end(self, state, logger):
        self.after_batch.append(self.counter.frame_count)

    def eval_end(self, state, logger):
        self.after_eval.append(self.counter.frame_count)


def losses(**settings):
    """Of a training whose route ends after seven of its eight batches."""
    algorithms = [Tread(1, -2, 0.5, end_time='7ba'), EMA(0.9)]
    evaluated = {'eval_dataloader': loader(shuffle=False), 'eval_interval': '2ba', 'max_duration': '8ba'}
    return [float.fromhex(loss) for loss in fit(algorithms, **evaluated, **settings)[1].losses]


def test_one_graph_for_training_one_for_evaluation_one_behind_the_route_and_no_break():
    torch._dynamo.reset()
    graphs = Graphs(CompileCounter())  # runs the captured graph as it is; fullgraph turns any break into an error
    compiled = losses(callbacks=[graphs], compile_config={'backend': graphs.counter, 'fullgraph': True})
    assert graphs.after_batch == [1, 1, 2, 2, 2, 2, 2, 3]
    assert graphs.after_eval == [2, 2, 2, 3]
    assert compiled == pytest.approx(losses(), rel=1e-5)
