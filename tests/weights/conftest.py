import shutil

import pytest

from tests.weights.short_runs import LENGTH, again, batch_of, folder_of, names


@pytest.fixture(scope='session')
def whole(tmp_path_factory):
    """The folder in which a run of twelve batches has ended; not to be changed."""
    root = tmp_path_factory.mktemp('whole')
    done = again(root)
    assert done.returncode == 0, done.stderr
    assert names(root) == {*map(batch_of, range(3, LENGTH + 1, 3)), 'latest-rank0.pt'}
    assert folder_of(root).is_dir()
    return root


@pytest.fixture
def copy(whole, tmp_path):
    """The same folder, to be spoilt."""
    shutil.copytree(whole, tmp_path / 'copy', symlinks=True)
    return tmp_path / 'copy'
