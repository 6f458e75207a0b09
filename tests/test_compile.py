"""``torch.compile`` through a real ``Trainer``: one graph for training, one for evaluation, then no more."""

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


def test_one_graph_for_training_one_for_evaluation_no_break_and_no_recompile():
    torch._dynamo.reset()
    counter = CompileCounter()  # runs the captured graph as it is; fullgraph turns any break into an error
    graphs = Graphs(counter)
    _, compiled = fit(
        [Tread(**ROUTE), EMA(0.9)],
        callbacks=[graphs],
        compile_config={'backend': counter, 'fullgraph': True},
        eval_dataloader=loader(shuffle=False),
        eval_interval='2ba',
        max_duration='6ba',
    )
    assert graphs.after_batch == [1, 1, 2, 2, 2, 2]
    assert graphs.after_eval == [2, 2, 2]
    _, eager = fit([Tread(**ROUTE), EMA(0.9)], eval_dataloader=loader(shuffle=False), eval_interval='2ba')
    losses = [float.fromhex(loss) for loss in compiled.losses]
    torch.testing.assert_close(losses, [float.fromhex(loss) for loss in eager.losses], rtol=1e-5, atol=0)


def test_a_route_that_ends_costs_one_more_graph():
    torch._dynamo.reset()
    counter = CompileCounter()
    graphs = Graphs(counter)
    config = {'backend': counter, 'fullgraph': True}
    fit([Tread(**ROUTE, end_time='3ba')], callbacks=[graphs], compile_config=config)
    assert graphs.after_batch == [1, 1, 1, 2, 2, 2]
