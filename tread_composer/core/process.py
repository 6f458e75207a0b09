"""What a process of ours settles before the libraries are loaded: some read the environment once, at their import.

Every program calls ``prepare_process`` first. Someone else's process, which has torch before it has us, stays as it is.
"""

import atexit
import contextlib
import gc
import os
import sys
from collections.abc import Iterator

__all__ = ['disable_mlflow_telemetry', 'importing', 'prepare_process']

_SPIN_COUNT = '100000'


def prepare_process() -> None:
    """Keep MLflow from reporting home, and let torch's threads sleep while they wait.

    GNU OpenMP lets the threads of a sum spin for each other for up to 5 ms. Where other programs want the same cores, a
    thread that spins keeps the one it waits for from running: on two cores beside two busy processes, a step of the
    quickstart took 11 s (0.09 a second). After 100,000 turns asleep instead, it ran at 3.3 steps a second; and on an
    idle machine at 7.7, against 7.0 without. ``GOMP_SPINCOUNT`` or ``OMP_WAIT_POLICY`` of the user's win.

    Child processes (a loader's workers, ranks) inherit both settings.
    """
    disable_mlflow_telemetry()
    if 'torch' not in sys.modules and 'OMP_WAIT_POLICY' not in os.environ:
        os.environ.setdefault('GOMP_SPINCOUNT', _SPIN_COUNT)


def disable_mlflow_telemetry() -> None:
    """MLflow 3 looks up its makers' host at its first use and reports there, unless told otherwise before its import.

    A value of the user's for ``MLFLOW_DISABLE_TELEMETRY`` wins, and so does a ``DO_NOT_TRACK`` of 0 or false, by which
    the user wants it. Where somebody has imported MLflow already, nothing changes.
    """
    # Of DO_NOT_TRACK, MLflow heeds the word `true` alone: it would report under 1 or yes.
    opted_in = os.environ.get('DO_NOT_TRACK', '').strip().lower() in ('0', 'false')
    if 'mlflow' not in sys.modules and not opted_in:
        os.environ.setdefault('MLFLOW_DISABLE_TELEMETRY', 'true')


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Around the imports of a command: no garbage is looked for meanwhile, nor ever among what they leave behind.

    Composer's import makes half a million objects that live as long as the process. The collector would walk through
    them seven times on the way and once more at the exit: 1.9 of the 6.2 CPU seconds of a program that imports Composer
    and ends. A process that has Composer already keeps its collector as it is: its garbage would be frozen too.
    """
    if 'composer' in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        # Else triton's bindings (torch 2.15) report at the exit, in dozens of lines, that their objects leaked.
        atexit.register(gc.unfreeze)
