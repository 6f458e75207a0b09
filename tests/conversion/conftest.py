import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.conversion import layouts
from tests.conversion.layouts import Pictures
from tread_composer.conversion import Source, open_sources


@pytest.fixture(autouse=True, scope='module')
def one_thread() -> Iterator[None]:
    """Sums of floats depend on the number of threads, and these tests compare bytes."""
    before, threads = os.environ.get('OMP_NUM_THREADS'), torch.get_num_threads()
    os.environ['OMP_NUM_THREADS'] = '1'
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    os.environ.pop('OMP_NUM_THREADS')
    if before is not None:
        os.environ['OMP_NUM_THREADS'] = before


@pytest.fixture(scope='module')
def splits() -> dict[str, Pictures]:
    return layouts.pictures()


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., dict[str, Source]]:
    return lambda path, **options: open_sources(path, scratch=tmp_path / 'scratch', **options)
