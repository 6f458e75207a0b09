"""Latents data sets: what is in the shards, what they say about themselves, and how they are read.

``columns`` and ``manifest`` need no streaming library; the readers and ``digits`` are imported from their own files.
"""

from tread_composer.data.columns import columns, stored_shape
from tread_composer.data.manifest import Manifest

__all__ = ['Manifest', 'columns', 'stored_shape']
