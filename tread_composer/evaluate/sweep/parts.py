"""What is finished of a row's images, kept on the disk until the row itself is, so that an interrupted row goes on."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tread_composer.metrics.features import FeatureSet, load_features, save_features

__all__ = ['RowParts']

_FOLDER = '.parts'
_PART_SIZE = 64  # images; not the batch, which may change


class RowParts:
    """Features of a row's images, in parts of 64.

    Args:
        out: Folder of the sweep.
        row: Everything that decides the images and their features; parts of anything else lie elsewhere.
        num_images: Images of the row.
    """

    def __init__(self, out: Path, row: Mapping[str, Any], num_images: int) -> None:
        self._label, self._num_images = json.dumps(row, sort_keys=True), num_images
        self.folder = out / _FOLDER / hashlib.sha256(self._label.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return -(-self._num_images // _PART_SIZE)

    def indices(self, part: int) -> range:
        """Numbers of the images of a part."""
        return range(part * _PART_SIZE, min((part + 1) * _PART_SIZE, self._num_images))

    def finished(self) -> list[int]:
        """The parts that an interrupted call left."""
        return [part for part in range(len(self)) if self._path(part).exists()]

    def write(self, part: int, features: FeatureSet) -> None:
        """Keep the features of a part."""
        save_features(self._path(part), features, self._label)

    def read(self, part: int) -> FeatureSet:
        """The features of a finished part.

        Raises:
            UserError: The file is damaged.
        """
        return load_features(self._path(part), self._label)

    def remove(self) -> None:
        """The row is in the table: forget its parts. Several ranks may do so at once."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.parent.is_dir() and not any(self.folder.parent.iterdir()):
            shutil.rmtree(self.folder.parent, ignore_errors=True)

    def _path(self, part: int) -> Path:
        return self.folder / f'part-{part:06d}.npz'
