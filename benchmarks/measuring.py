"""What the benchmarks of training steps share: clocks, the rate of matrix products, spreads, and rows as JSON lines."""

import contextlib
import functools
import json
import platform
import shutil
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

__all__ = ['EventClock', 'Rows', 'ThreadClock', 'Timeline', 'clock_of', 'environment', 'product_rate', 'spread']

ROOT = Path(__file__).parent.parent
# Large enough that a product runs at its limit; the second is a fraction of a second on one CPU core.
PRODUCT_SIZE = {'cuda': 8192, 'cpu': 1024}
DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16}


class ThreadClock:
    """Of a CPU: the seconds that this thread has computed. What other processes take of the core does not count.

    Right for one thread only: torch runs the backward pass of CPU tensors in the thread that asks for it.
    """

    def mark(self) -> float:
        """A point in time."""
        return time.thread_time()

    def settle(self) -> None:
        """Nothing runs behind the caller's back."""

    def seconds(self, begin: float, end: float) -> float:
        """From one point to another."""
        return end - begin


class EventClock:
    """Of a GPU: events in its queue, so that the CPU's being ahead is not measured, and its being late is."""

    def mark(self) -> torch.cuda.Event:
        """A point in the queue."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def settle(self) -> None:
        """Wait until the queue is empty; before that no interval can be read."""
        torch.cuda.synchronize()

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """From one point to another."""
        return begin.elapsed_time(end) / 1000


def clock_of(device: torch.device) -> ThreadClock | EventClock:
    """The clock for work on a device; a CPU is held to one thread."""
    if device.type == 'cuda':
        return EventClock()
    torch.set_num_threads(1)
    return ThreadClock()


class Timeline:
    """Shares of a stretch of time: each moment belongs to the innermost watched call that runs, or else to ``rest``.

    Small shares are sums of intervals in this way, and not differences of two totals that both are noise.

    Args:
        clock: Of the device.
        rest: What the time outside of all watched calls is called.
    """

    def __init__(self, clock: ThreadClock | EventClock, rest: str = 'rest') -> None:
        self.clock = clock
        self.calls: Counter[str] = Counter()
        self._names = [rest]  # of the calls that run, the innermost last
        self._marks: list[tuple[Any, str]] = []  # since when it is whose time; of nobody: ''
        self._on = False

    def enter(self, name: str) -> None:
        """From here on it is the time of ``name``."""
        self._names.append(name)
        if self._on:
            self.calls[name] += 1
            self._marks.append((self.clock.mark(), name))

    def leave(self) -> None:
        """It is again the time of whoever called."""
        self._names.pop()
        if self._on:
            self._marks.append((self.clock.mark(), self._names[-1]))

    @contextlib.contextmanager
    def watching(self, *calls: tuple[Any, str, str]) -> Iterator[None]:
        """Inside, calls of these attributes have their time noted: (owner, attribute, name)."""
        with contextlib.ExitStack() as stack:
            for owner, attribute, name in calls:
                stack.enter_context(mock.patch.object(owner, attribute, self._watched(getattr(owner, attribute), name)))
            self._on = True
            self._marks.append((self.clock.mark(), self._names[-1]))
            yield
            self._marks.append((self.clock.mark(), ''))
            self._on = False

    def _watched(self, function: Any, name: str) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.enter(name)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        return call

    def seconds(self) -> Counter[str]:
        """Seconds by name; forgets them."""
        self.clock.settle()
        out: Counter[str] = Counter()
        for (begin, name), (end, _) in zip(self._marks, self._marks[1:], strict=False):
            if name:
                out[name] += self.clock.seconds(begin, end)  # type: ignore[assignment, arg-type]
        self._marks.clear()
        return out


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, and the quartiles as ``low`` and ``high`` (lowest and highest of fewer than four)."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    if len(ordered) > 3:
        low, _, high = statistics.quantiles(ordered, n=4)
    return {'median': statistics.median(ordered), 'low': low, 'high': high}


def product_rate(device: torch.device, dtype: str, repeats: int = 10) -> float:
    """FLOP/s of square matrix products in ``dtype``, the median of ``repeats``: what a step can be held against.

    Of random numbers: a GPU multiplies zeros faster, since they draw less power.
    """
    clock, size = clock_of(device), PRODUCT_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=DTYPES[dtype]) for _ in range(2))
    out: Tensor = a @ b
    times = []
    for _ in range(repeats):
        clock.settle()
        begin = clock.mark()
        torch.mm(a, b, out=out)
        end = clock.mark()
        clock.settle()
        times.append(clock.seconds(begin, end))  # type: ignore[arg-type]
    return 2 * size**3 / statistics.median(times)


def commit() -> str | None:
    """Of the code; None outside of a checkout."""
    if shutil.which('git') is None:
        return None
    words = ['git', '-C', str(ROOT), 'describe', '--always', '--dirty']
    done = subprocess.run(words, capture_output=True, text=True)
    return done.stdout.strip() or None


def environment(device: torch.device) -> dict[str, Any]:
    """What each row carries of the machine."""
    cuda = device.type == 'cuda'
    return {
        'device': torch.cuda.get_device_name(device) if cuda else f'{platform.machine()} CPU, 1 thread',
        'torch': torch.__version__,
        'python': platform.python_version(),
        'commit': commit(),
    }


class Rows:
    """Rows that are out as soon as they are measured: a run that is cut short keeps them.

    Args:
        common: Entries of every row.
        path: A file to which they are appended as well.
    """

    def __init__(self, common: dict[str, Any], path: str | None = None) -> None:
        self.common, self.path = common, path
        self.rows: list[dict[str, Any]] = []

    def add(self, measurement: str, **values: Any) -> dict[str, Any]:
        """Print and keep one row."""
        row = {'measurement': measurement, **values, **self.common}
        self.rows.append(row)
        line = json.dumps(row)
        print(line, flush=True)
        if self.path is not None:
            with open(self.path, 'a', encoding='utf-8') as file:
                file.write(line + '\n')
        return row
