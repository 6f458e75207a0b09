"""How many bytes a conversion will write, to one percent, and whether they fit.

With compression a random sample of the images is encoded and compressed.
"""

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from streaming.base.compression import compress
from streaming.base.format.mds.encodings import get_mds_encoded_size

from tread_composer.conversion.decoding import Batch, decoded_batches
from tread_composer.conversion.encoding import Encoder
from tread_composer.conversion.parts import part_name
from tread_composer.conversion.plan import SplitPlan
from tread_composer.conversion.settings import Settings
from tread_composer.core.errors import UserError

__all__ = ['Estimate', 'bytes_in', 'compressed_share', 'estimate', 'refuse_if_too_large', 'size_in_words']

_PROBE = 64  # images that are compressed
_NAMES = 1000  # names whose length is measured
_PER_PART = 4096  # bytes of a part's index and summary


@dataclass(frozen=True)
class Estimate:
    """Bytes of a split.

    Args:
        total: All of its files.
        largest_part: The largest part of it.
    """

    total: int
    largest_part: int


def estimate(plan: SplitPlan, encoder: Encoder, share: float = 1.0) -> Estimate:
    """Bytes of a split if every image is readable.

    Args:
        plan: The split.
        encoder: Its columns have the shape of a row.
        share: What compression leaves of the bytes.
    """
    row = sum(get_mds_encoded_size(encoding) or 0 for encoding in encoder.columns.values())
    sample = plan.order[:_NAMES].tolist()  # a random choice
    name = sum(len(str(plan.source.names[position]).encode()) for position in sample) / len(sample)
    # Offsets and sizes of MDS, indexes and part.json: 0.3 % for latents of ImageNet, more for small rows and parts.
    per_row = row * share * 1.01 + name + 16
    largest = min(plan.part_size, len(plan.order))
    return Estimate(int(per_row * len(plan.order)) + _PER_PART * plan.num_parts, int(per_row * largest) + _PER_PART)


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
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
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
