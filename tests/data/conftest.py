from pathlib import Path

import pytest

from tests.data.worlds import SAMPLES, write_shards
from tread_composer.data.manifest import Manifest


@pytest.fixture
def manifest() -> Manifest:
    return Manifest(
        format_version=1, kind='pixels', autoencoder=None, autoencoder_hash=None, channels=1, latent_height=4,
        latent_width=6, resolution=6, crop='none', mirrored=False, num_samples=SAMPLES, num_classes=3,
        class_names=('a', 'b', 'c'), mean=(0.0,), std=(1.0,), permutation_seed=None, tool_version='0.1.0',
        source='a test',
    )  # fmt: skip


@pytest.fixture
def split(tmp_path: Path, manifest: Manifest) -> Path:
    """In several shards, with its manifest."""
    folder = write_shards(tmp_path / 'split')
    manifest.save(folder)
    assert len(list(folder.glob('*.mds'))) == 8
    return folder
