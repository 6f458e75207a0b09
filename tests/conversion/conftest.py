import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conversion import layouts
from tests.conversion.layouts import Pictures
from tests.conversion.worlds import make_images, make_vae
from tread_composer.conversion.settings import ImageSettings
from tread_composer.conversion.sources.detect import open_sources
from tread_composer.conversion.sources.source import Source
from tread_composer.core.errors import UserError


class Opener:
    """Opens a source as a conversion does."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch

    def __call__(self, path: Path, **options: Any) -> dict[str, Source]:
        texts = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
        return open_sources(ImageSettings(str(path), 'unused', **texts), self.scratch)

    def refuses(self, message: str, path: Path, **options: Any) -> str:
        """The whole message of a refusal that matches."""
        with pytest.raises(UserError, match=message) as caught:
            self(path, **options)
        return str(caught.value)


@pytest.fixture(scope='module')
def splits() -> dict[str, Pictures]:
    return layouts.pictures()


@pytest.fixture
def opened(tmp_path: Path) -> Opener:
    return Opener(tmp_path / 'scratch')


@pytest.fixture
def refused(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Runs a command, which must end with 2 and a message that holds all these texts and matches; returns it."""

    def run(command: Callable[[list[str]], int], words: list[str], *texts: str, match: str = '') -> str:
        capsys.readouterr()
        assert command(words) == 2
        error = capsys.readouterr().err
        assert 'Traceback' not in error and [text for text in texts if text not in error] == [], error
        assert re.search(match, error), error
        return error

    return run


@pytest.fixture(scope='session')
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 JPEGs in three class folders."""
    return make_images(tmp_path_factory.mktemp('images') / 'few', 40)


@pytest.fixture(scope='session')
def vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of an autoencoder with 3 channels that halves the sides."""
    return make_vae(tmp_path_factory.mktemp('vae') / 'my-vae')
