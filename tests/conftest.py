"""What all tests share: they may read hundreds of data sets in one process."""

# ruff: noqa: E402

import atexit
import contextlib
import os
import resource
from collections.abc import Iterator

from tread_composer.core.process import prepare_process

# Before torch is imported, which reads both once; child processes inherit them. One thread: our networks are so small
# that sharing a sum costs more than it saves, even without spinning. With two, on two cores, routing/test_blocks.py
# took 45 s to 50 s instead of 3.5 s, test_trained.py 11 s instead of 6 s to 8 s.
prepare_process()
os.environ['OMP_NUM_THREADS'] = '1'

import pytest
import torch
from streaming.base.shared.memory import SharedMemory

torch.set_num_threads(1)

_CREATED: list[SharedMemory] = []
_init = SharedMemory.__init__


def _noted(self: SharedMemory, *args: object, **kwargs: object) -> None:
    _init(self, *args, **kwargs)  # type: ignore[arg-type]
    _CREATED.append(self)


SharedMemory.__init__ = _noted  # type: ignore[method-assign]


# By their time (`--durations=0`), the longest first: where two processes share the tests, neither shall be left alone
# with one of these at the end.
_LONGEST = (
    'test_train.py', 'test_startup.py', 'test_parallel.py', 'test_nonfinite.py', 'test_kills.py', 'test_mlflow_run.py',
    'test_latents.py', 'test_generate.py', 'test_contract.py', 'test_stranger.py', 'test_sharded.py',
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: rank for rank, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))  # stable: a file's own order stays


# What a person may open by default, 1,024, is little for thousands of tests in one process.
_soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
if 0 < _soft < 20_000:  # unlimited is -1
    resource.setrlimit(resource.RLIMIT_NOFILE, (20_000 if _hard < 0 else min(_hard, 20_000), _hard))


@pytest.fixture(autouse=True)
def shared_memory_ends_with_its_test() -> Iterator[None]:
    """streaming keeps a data set's segments until the process ends, and each new data set opens those of all others.

    That is nothing for a training run, which has two; here open files would grow with the square of the tests.
    """
    yield from _given_back()


@pytest.fixture(autouse=True, scope='module')
def shared_memory_ends_with_its_module() -> Iterator[None]:
    """The same for what a module's own fixtures have read."""
    yield from _given_back()


def _given_back() -> Iterator[None]:
    before = len(_CREATED)
    yield
    while len(_CREATED) > before:
        memory = _CREATED.pop()
        atexit.unregister(memory.cleanup)
        for segment in (*memory.created_shms, *memory.opened_shms):
            with contextlib.suppress(BufferError):  # an array still looks at it: its one descriptor stays
                segment.close()
        for segment in memory.created_shms:
            with contextlib.suppress(FileNotFoundError):
                segment.unlink()
