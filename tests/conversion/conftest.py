from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conversion import layouts
from tests.conversion.layouts import Pictures
from tread_composer.conversion import Source, open_sources


@pytest.fixture(scope='module')
def splits() -> dict[str, Pictures]:
    return layouts.pictures()


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., dict[str, Source]]:
    return lambda path, **options: open_sources(path, scratch=tmp_path / 'scratch', **options)
