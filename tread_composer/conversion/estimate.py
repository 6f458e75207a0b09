"""How many bytes a conversion will write, said before it starts, and whether they fit.

Without compression the bytes of a shard are known exactly: all columns but the name have a fixed size. With compression
the first images are encoded and compressed, which is as good as those images are typical; they are random ones.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from streaming import MDSWriter
from streaming.base.compression import compress

from tread_composer.conversion.decoding import Batch, decoded_batches
from tread_composer.conversion.encoding import Encoder
from tread_composer.conversion.parts import SHARD_BYTES, part_name
from tread_composer.conversion.plan import SplitPlan
from tread_composer.conversion.settings import Settings
from tread_composer.core.errors import UserError
from tread_composer.data.columns import LABEL, LATENTS, LATENTS_MIRRORED, NAME

__all__ = ['Estimate', 'bytes_in', 'compressed_share', 'estimate', 'refuse_if_too_large', 'size_in_words']

_PROBE = 64  # images


@dataclass(frozen=True)
class Estimate:
    """Bytes of a split.

    Args:
        shards: Of all shard files.
        descriptions: Of index, manifest and what the parts say about themselves.
        largest_part: Of the shards of one part.
    """

    shards: int
    descriptions: int
    largest_part: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.shards + self.descriptions


def estimate(plan: SplitPlan, encoder: Encoder, content: dict[str, Any], share: float = 1.0) -> Estimate:
    """Bytes of a split if every image is readable.

    Args:
        plan: Of the split.
        encoder: Knows the shape of a row.
        content: What ``part.json`` will repeat.
        share: What compression leaves of the bytes.
    """
    names = plan.source.names
    lengths = np.array([len(str(names[position]).encode()) for position in plan.order.tolist()])
    with tempfile.TemporaryDirectory() as folder:
        writer = MDSWriter(out=folder, columns=encoder.columns, hashes=['xxh64'], max_workers=1)
        zeros = np.zeros(encoder.stored_shape, np.float16)
        empty = writer.encode_sample({LATENTS: zeros, LATENTS_MIRRORED: zeros, LABEL: 0, NAME: ''})
        row, header = len(empty) + writer.extra_bytes_per_sample, writer.extra_bytes_per_shard
        file = {'basename': f'{part_name(0)}/shard.00000.mds', 'bytes': SHARD_BYTES, 'hashes': {'xxh64': 16 * '0'}}
        entry = len(json.dumps({'samples': 10**4, 'raw_data': file, 'zip_data': None, **writer.get_config()}))
        writer.cancel_future_jobs()
    per_part = [row * len(part) + int(part.sum()) for part in _slices(lengths, plan.part_size)]
    # A shard is closed before the row that would exceed the limit.
    typical = row + float(lengths.mean())
    rows_per_shard = max(1, int((SHARD_BYTES - header) // typical))
    counts = [-(-len(part) // rows_per_shard) for part in _slices(lengths, plan.part_size)]
    shards = int((sum(per_part) + header * sum(counts)) * share)
    numbers = 4 * 22 * encoder.latent_shape[0]  # four floats of a channel as text
    summary = len(json.dumps(content, indent=1)) + numbers
    classes = len(json.dumps(plan.source.class_names, indent=2))
    descriptions = 2 * entry * sum(counts) + summary * plan.num_parts + classes + numbers + 1000
    return Estimate(shards, descriptions, int(max(per_part) * share))


def compressed_share(plan: SplitPlan, encoder: Encoder, settings: Settings, workers: int) -> float:
    """What compression leaves of the bytes, measured on the first images of the split (a random choice).

    Raises:
        UserError: None of them can be read.
    """
    if settings.compression is None:
        return 1.0
    positions = plan.order[:_PROBE].tolist()
    starts = range(0, len(positions), settings.batch_size)
    batches = [Batch(plan.name, 0, positions[start : start + settings.batch_size]) for start in starts]
    loader = decoded_batches(
        {plan.name: plan.source}, batches, settings.resolution, workers=min(workers, 1), pin_memory=False
    )
    rows: list[bytes] = []
    for item in loader:
        if item['problem']:
            raise UserError(item['problem'])
        if item['positions']:
            views = encoder(item['images'], plan.name, item['positions']).arrays()
            rows += [view[row].tobytes() for row in range(len(views[0])) for view in views]
    if not rows:
        raise UserError(f'{plan.name}: none of {len(positions)} images taken at random can be read')
    raw = b''.join(rows)
    return len(compress(settings.compression, raw)) / len(raw)


def refuse_if_too_large(folder: Path, needed: int, what: str) -> int:
    """Free bytes where ``folder`` is or will be.

    Raises:
        UserError: Fewer than ``needed``.
    """
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise UserError(
            f'{folder}: {what} need {size_in_words(needed)}, and {size_in_words(free)} are free there; make room, '
            f'choose another place, or store less (--no-mirror halves it)'
        )
    return free


def bytes_in(folder: Path, parts: Iterable[int]) -> int:
    """Bytes of finished parts that are on this disk."""
    return sum(entry.stat().st_size for part in parts for entry in os.scandir(folder / part_name(part)))


def size_in_words(count: int) -> str:
    """Bytes as people say them (powers of 1000, as disks are sold)."""
    value, unit = float(count), 'B'
    for larger in ('kB', 'MB', 'GB', 'TB'):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f'{value:.0f} {unit}' if unit == 'B' else f'{value:.2f} {unit}'


def _slices(lengths: np.ndarray, size: int) -> list[np.ndarray]:
    return [lengths[start : start + size] for start in range(0, len(lengths), size)]
