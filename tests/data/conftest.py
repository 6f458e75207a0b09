from pathlib import Path

import numpy as np
import pytest
from streaming import MDSWriter

from tread_composer.data.columns import columns
from tread_composer.data.manifest import Manifest

SAMPLES = 200


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
    """200 samples in several shards; array and label tell the position."""
    folder = tmp_path / 'split'
    options = {'columns': columns('pixels', (1, 4, 6)), 'hashes': ['xxh64'], 'size_limit': 2000}
    with MDSWriter(out=str(folder), **options) as writer:
        for index in range(SAMPLES):
            writer.write({'latents': np.full((1, 4, 6), index, np.float16), 'label': index % 3, 'name': f'n{index}'})
    manifest.save(folder)
    assert len(list(folder.glob('*.mds'))) == 8
    return folder
