"""Making parts: read and prepare in worker processes, a batch at a time; encode here; write in the background.

Legend: B samples of a batch.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from tread_composer.conversion.encoding import Encoded, Encoder
from tread_composer.conversion.parts import BackgroundWriter, Prepared
from tread_composer.conversion.settings import Settings
from tread_composer.conversion.sources.source import Source
from tread_composer.conversion.splits import PART_FILE, SplitPlan, part_name
from tread_composer.conversion.squares import UnreadableImage
from tread_composer.core.errors import ResumeError, UserError
from tread_composer.io.device import check_shared_memory, choose_device, machine_for
from tread_composer.io.files import read_json
from tread_composer.io.progress import Progress, silent

__all__ = ['MakeEncoder', 'Part', 'Plans', 'make_parts', 'prepared_batches', 'ray_part_maker']

_MACHINE = contextlib.ExitStack()  # of a worker of Ray; held here, as long as the process lives
_PREFETCH = 4  # batches per worker: enough that a slow image or a slow read does not make the encoder wait

Plans = dict[str, SplitPlan]
MakeEncoder = Callable[[torch.device], Encoder]
Part = tuple[str, int]
"""A split and a number."""
Batch = tuple[str, int, list[int]]
"""Positions in a split's source, all of one part: split, part, positions."""


class _Batches(Dataset):
    """Item ``i`` is the whole batch ``i``: one worker reads it; nothing is left to collate in the main process."""

    def __init__(self, sources: Mapping[str, Source], batches: Sequence[Batch], encoder: Encoder) -> None:
        self._sources, self._batches, self._prepare = sources, batches, encoder.prepare

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Prepared:
        split, part, candidates = self._batches[index]
        source, samples, positions, unreadable, problem, transparent = self._sources[split], [], [], [], None, 0
        for position in candidates:
            try:
                sample = self._prepare(source.read(position))
                samples.append(torch.from_numpy(sample.values))
                positions.append(position)
                transparent += sample.is_transparent
            except UnreadableImage as error:
                unreadable.append((position, str(error)))
            except (UserError, OSError) as error:
                problem = f'{split}: {source.names[position]}: cannot be read: {error}'
                break
        stacked = torch.stack(samples) if samples else None
        return Prepared(split, part, stacked, positions, unreadable, problem, transparent)


def prepared_batches(
    sources: Mapping[str, Source], batches: Sequence[Batch], encoder: Encoder, *, workers: int, remedy: str
) -> DataLoader:
    """Read ``batches`` of the sources of the splits in order, each as a ``Prepared``.

    ``workers`` are processes; 0 reads in this one. ``UserError``, which ends in the ``remedy``, if the shared memory
    cannot hold what they prepare.
    """
    workers = min(workers, len(batches))
    if workers:
        largest = max(len(positions) for _, _, positions in batches)
        needed = workers * _PREFETCH * largest * encoder.prepared_bytes
        check_shared_memory(needed, remedy)
    return DataLoader(
        _Batches(sources, batches, encoder),
        batch_size=None,
        num_workers=workers,
        pin_memory=encoder.device.type == 'cuda',
        prefetch_factor=_PREFETCH if workers else None,
    )


def make_parts(
    parts: Sequence[Part], plans: Plans, encoder: Encoder, settings: Settings, progress: Progress, *, workers: int
) -> None:
    """Make these parts, with so many processes that read; ``UserError`` for a sample, the disk or the GPU's memory."""
    batches = [
        (name, part, positions) for name, part in parts for positions in plans[name].batches(part, settings.batch_size)
    ]
    sources = {name: plan.source for name, plan in plans.items()}
    # Before the thread below exists: forking a process that has threads can copy a lock that nobody will open.
    remedy = settings.memory_remedy
    items = iter(prepared_batches(sources, batches, encoder, workers=workers, remedy=remedy) if batches else ())
    with BackgroundWriter(plans, encoder, settings) as writer:
        for item in items:
            writer.put((item, _encoded(item, encoder, settings)), progress.tick)
            progress.add(len(item.positions) + len(item.unreadable))
            progress.tick()


def _encoded(item: Prepared, encoder: Encoder, settings: Settings) -> Encoded | None:
    if item.problem:
        raise UserError(item.problem)
    if item.samples is None:
        return None
    try:
        return encoder(item.samples, item.split, item.positions)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f'the GPU has too little memory for --batch-size {settings.batch_size}; lower it and run the same '
            f'command again (finished parts stay)'
        ) from error


def ray_part_maker(
    settings: Settings, make_encoder: MakeEncoder, content: dict[str, Any], plans: Plans, workers_here: int
) -> Callable[[Part], list[dict[str, str]]]:
    """Set up a worker of Ray and load the encoder; what makes a part there, and returns its unreadable samples."""
    device = choose_device(settings.device, 0)
    workers = settings.workers_of_rank(device.type == 'cuda', workers_here)
    _MACHINE.enter_context(machine_for(device, workers, workers_here))
    encoder = make_encoder(device)
    if encoder.content != content:  # with which the work was planned
        remedy = 'Give all machines the same files.'
        raise ResumeError.from_differences('a worker of Ray', content, encoder.content, remedy)
    progress = Progress('', unit='images', log=silent)

    def make(part: Part) -> list[dict[str, str]]:
        make_parts([part], plans, encoder, settings, progress, workers=workers)
        name, number = part
        return read_json(settings.state / name / part_name(number) / PART_FILE)['unreadable']

    return make
