"""Which samples go where: splits, the one permutation, parts. The same for any number of ranks.

Legend: N samples of a split.
"""

import hashlib
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tread_composer.conversion.settings import Settings
from tread_composer.conversion.sources.source import Source
from tread_composer.core.errors import UserError

__all__ = ['PART_FILE', 'SplitPlan', 'make_plans', 'part_name', 'permutation']

PART_FILE = 'part.json'
"""In the folder of each finished part: what it was made with, and what could not be read."""


@dataclass(frozen=True)
class SplitPlan:
    """One split to be written: its samples in writing order, cut into parts."""

    name: str  # that of its folder, too
    source: Source
    order: np.ndarray  # int64 [N], positions in the source
    part_size: int  # samples of a part; the last may have fewer
    note: str = ''  # what was done to the source, for the manifest
    content: dict[str, Any] = field(default_factory=dict)  # what its parts must be made with
    parts: dict[int, dict[str, Any]] = field(default_factory=dict)  # finished ones: what part.json of a number says
    is_finished: bool = False  # the whole split

    @property
    def num_parts(self) -> int:
        """How many parts there are."""
        return -(-len(self.order) // self.part_size)

    @property
    def undone(self) -> list[tuple[str, int]]:
        """Split and number of each part that is to be made."""
        return [(self.name, number) for number in range(self.num_parts) if number not in self.parts]

    @property
    def samples_done(self) -> int:
        """Samples of finished parts, readable or not."""
        return sum(len(self.positions(number)) for number in self.parts)

    @property
    def unreadable(self) -> list[dict[str, str]]:
        """Name and reason of each sample of the finished parts that could not be read."""
        return [entry for part in self.parts.values() for entry in part['unreadable']]

    @property
    def transparent(self) -> int:
        """Images of the finished parts that have transparent pixels."""
        return sum(part['transparent'] for part in self.parts.values())

    def positions(self, part: int) -> np.ndarray:
        """Positions in the source of the samples of a part, in writing order."""
        return self.order[part * self.part_size : (part + 1) * self.part_size]

    def batches(self, part: int, batch_size: int) -> Iterator[list[int]]:
        """The positions of a part in batches, which never reach over into the next part.

        So which samples are encoded together depends on nothing but the batch size.
        """
        positions = self.positions(part)
        for start in range(0, len(positions), batch_size):
            yield positions[start : start + batch_size].tolist()

    def identity(self) -> dict[str, Any]:
        """What identifies the samples, their labels and their order: compared when a conversion is continued."""
        digest = hashlib.sha256()
        names, labels = self.source.names, self.source.labels
        for position in self.order.tolist():
            digest.update(f'{names[position]}\n{labels[position]}\n'.encode())
        classes = hashlib.sha256('\n'.join(self.source.class_names).encode())
        return {
            'images': len(self.order),
            'classes': len(self.source.class_names),
            'names_labels_and_order': f'sha256:{digest.hexdigest()}',
            'class_names': f'sha256:{classes.hexdigest()}',
        }


def part_name(part: int) -> str:
    """Name of a finished part's folder, which sorts like the number."""
    return f'{part:05d}'


def permutation(count: int, seed: int, split: str) -> np.ndarray:
    """A random order of ``count`` things, int64, which no other version of numpy changes.

    ``Generator.permutation`` may change between releases; raw draws of a bit generator may not, and sorting them is a
    permutation (two equal draws of 64 bits keep their order).
    """
    raw = np.random.PCG64(np.random.SeedSequence([seed, zlib.crc32(split.encode())])).random_raw(count)
    return np.argsort(raw, kind='stable').astype(np.int64)


def make_plans(sources: Mapping[str, Source], settings: Settings) -> list[SplitPlan]:
    """A plan for each split that is asked for; refused if there is none, or none to hold images out of."""
    plans = {
        name: SplitPlan(name, source, permutation(len(source), settings.seed, name), settings.part_size)
        for name, source in sources.items()
    }
    if settings.held_out:
        plans = _hold_out(plans, settings)
    names = settings.splits or tuple(plans)
    for name in names:
        if name not in plans:
            raise UserError(f'--splits {name}: {settings.source} has {", ".join(plans)}')
    return [plans[name] for name in dict.fromkeys(names)]


def _hold_out(plans: dict[str, SplitPlan], settings: Settings) -> dict[str, SplitPlan]:
    count = settings.held_out
    if 'val' in plans or 'train' not in plans:
        raise UserError(
            f'--held-out {count}: images are held out of train where there is no val, but {settings.source} has '
            f'{" and ".join(plans)}; leave --held-out'
        )
    whole = plans['train']
    if count >= len(whole.order):
        raise UserError(f'--held-out {count}: train has {len(whole.order):,} images; hold out fewer')
    note = f'; {{}} {count:,} of them, held out by seed {settings.seed}'
    train = replace(whole, order=whole.order[:-count], note=note.format('all but'))
    val = replace(whole, name='val', order=whole.order[-count:], note=note.format('only'))
    return {**plans, 'train': train, 'val': val}
