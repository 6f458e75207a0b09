"""Run as a script by the tests: trains with MLflow, once for each way to end that it is asked for."""

import contextlib
import os
import signal
import sys

import mlflow  # noqa: F401  once, before the forks: it takes seconds
import torch
from composer.core import Callback

from tests.callbacks.small import trainer
from tread_composer.callbacks.mlflow_run import MLflowRun


class End(Callback):
    def __init__(self, how: str) -> None:
        self.how = how

    def batch_end(self, state, logger):
        if int(state.timestamp.batch) != 3:
            return
        if self.how == 'exception':
            raise RuntimeError('as asked for')
        if self.how in ('SIGTERM', 'SIGKILL'):
            os.kill(os.getpid(), getattr(signal, self.how))

    def fit_end(self, state, logger):
        if self.how == 'exception at the end':
            raise RuntimeError('as asked for')


def train(folder: str, how: str) -> None:
    torch.set_num_threads(1)
    callbacks = [End('exception' if how == 'swallowed' else how)]
    run = trainer(loggers=[MLflowRun('deaths', folder=folder)], callbacks=callbacks, run_name=how)
    if how != 'swallowed':
        run.fit()  # and no close: the interpreter's end has to do
        return
    with contextlib.suppress(RuntimeError):
        run.fit()
    run.close()


if __name__ == '__main__':
    folder, *ways = sys.argv[1:]
    for way in ways:  # a process each, but the imports only once
        child = os.fork()
        if child == 0:
            train(folder, way)
            sys.exit(0)
        print(way, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), sep='=', flush=True)
