"""What all tests share: they may read hundreds of data sets in one process.

torch and streaming are imported by functions: of several processes, the one that hands the tests out needs none.
"""

import atexit
import contextlib
import os
import resource
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tread_composer.cli import main
from tread_composer.core.process import importing, prepare_process

# Before torch is imported, which reads both once; child processes inherit them. One thread: our networks are so small
# that sharing a sum costs more than it saves, even without spinning. With two, on two cores, routing/test_blocks.py
# took 45 s to 50 s instead of 3.5 s, test_trained.py 11 s instead of 6 s to 8 s.
prepare_process()
os.environ['OMP_NUM_THREADS'] = '1'

# By their time (`--durations=0`), the longest first: where two processes share the tests, neither shall be left alone
# with one of these at the end.
LONGEST = (
    'test_train.py', 'test_startup.py', 'test_parallel.py', 'test_nonfinite.py', 'test_ray.py', 'test_kills.py',
    'test_mlflow_run.py', 'test_latents.py', 'test_generate.py', 'test_contract.py', 'test_stranger.py',
    'test_sharded.py',
)  # fmt: skip


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What all files import is nothing that the collector of garbage shall walk through from now on."""
    with importing():
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))  # stable: a file's own order stays


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker('gpu'):
        import torch

        if not torch.cuda.is_available():
            pytest.skip('needs a CUDA device')


# What a person may open by default, 1,024, is little for thousands of tests in one process.
_soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
if 0 < _soft < 20_000:  # unlimited is -1
    resource.setrlimit(resource.RLIMIT_NOFILE, (20_000 if _hard < 0 else min(_hard, 20_000), _hard))


@pytest.fixture(scope='session')
def routed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A ``Run`` on the digits with routes and a fast average; checkpoints after 2 and 3 batches. Not to be changed."""
    from tests.runs import run  # imports what only runs need

    return run(tmp_path_factory.mktemp('routed'), 'digits_tread.yaml', 'algorithms.ema.decay=0.5')


@pytest.fixture(scope='session')
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set of the digits, with its splits ``train`` and ``eval``. Not to be changed."""
    from tread_composer.data.digits import prepare_digits

    folder = tmp_path_factory.mktemp('digits') / 'digits'
    prepare_digits(folder)
    return folder


class CommandLine:
    """``python -m tread_composer WORDS`` in the test's own process."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self.capture = capture

    def __call__(self, *words: object, code: int = 0) -> Any:
        """What it prints (``out``, ``err``) where it ends with this exit code."""
        self.capture.readouterr()
        assert main([str(word) for word in words]) == code, self.capture.readouterr()
        return self.capture.readouterr()

    def refusal(self, *words: object) -> str:
        """The message of a command that must end with exit code 2."""
        return self(*words, code=2).err


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(capsys)


@pytest.fixture(autouse=True, scope='module')
def shared_memory_ends_with_its_module() -> Iterator[None]:
    """streaming keeps a data set's segments until the process ends: nothing for a run, much for a thousand tests."""
    from streaming.base.shared.memory import SharedMemory

    created: list[SharedMemory] = []
    create = SharedMemory.__init__

    def note(self: SharedMemory, *arguments: object, **keywords: object) -> None:
        create(self, *arguments, **keywords)  # type: ignore[arg-type]
        created.append(self)

    with mock.patch.object(SharedMemory, '__init__', note):
        yield
    for memory in created:
        atexit.unregister(memory.cleanup)
        with contextlib.suppress(BufferError):  # an array still looks at it: its one descriptor stays
            memory.shm.close()
        if memory.created_shms:
            with contextlib.suppress(FileNotFoundError):
                memory.shm.unlink()
