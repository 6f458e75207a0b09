"""Parts: folders of shards that exist whole, under their final name, or not at all.

A part is made in ``.writing-...`` beside its final place, and renamed when everything in it has reached the disk. The
name is the done-marker; nothing else has to be remembered across a kill -9. A thread writes: the encoder hands over a
batch and goes on.
Legend: B rows, S stored channels, C channels of the latent, h x w latent pixels.
"""

import contextlib
import os
import queue
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from streaming import MDSWriter
from torch import Tensor

from tread_composer.conversion.contents import channel_sums
from tread_composer.conversion.destination import upload
from tread_composer.conversion.encoding import Encoded, Encoder
from tread_composer.conversion.settings import Settings
from tread_composer.conversion.splits import PART_FILE, SplitPlan, part_name
from tread_composer.core.errors import ResumeError, UserError
from tread_composer.data.columns import LABEL, LATENTS, LATENTS_MIRRORED, NAME
from tread_composer.io.files import full_disk_in_words, read_json, to_disk, write_json

__all__ = [
    'REPORT', 'BackgroundWriter', 'PartWriter', 'Prepared', 'done_parts', 'refuse_too_many', 'remove_parts',
    'remove_unfinished', 'report_unreadable',
]  # fmt: skip

REPORT = 'unreadable.json'
_SHARD_BYTES = 1 << 26
_WRITING = '.writing-'


class Prepared(NamedTuple):
    """Samples that were read together, all of one part."""

    split: str
    part: int
    samples: Tensor | None  # [B, ...] as the encoder takes them; None if none is readable
    positions: list[int]  # those of the samples in the source
    unreadable: list[tuple[int, str]]  # positions of the others, and reasons
    problem: str | None  # why reading has to stop; not raised, for a worker's exception would carry its traceback
    transparent: int = 0  # how many of the samples are images with transparent parts


def done_parts(folder: Path, content: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The finished parts of a split, which need not exist: number -> what ``part.json`` says.

    Refused are parts that were made with something else than ``content``, or are none of ours.
    """
    done = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not re.fullmatch(r'\d{5,}', path.name):
            continue
        part = read_json(path / PART_FILE) if (path / PART_FILE).is_file() else None
        if not isinstance(part, dict) or 'content' not in part:
            raise UserError(f'{path}: has no {PART_FILE} of a conversion; move it away')
        if part['content'] != content:
            raise ResumeError.from_differences(
                str(path), part['content'], content, 'Use the same settings, or choose another --out.'
            )
        done[int(path.name)] = part
    return done


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes left behind. Only for the holder of the lock: others may be at work otherwise."""
    for path in folder.glob(f'{_WRITING}*'):
        shutil.rmtree(path)
    for path in folder.glob('.*.json.*'):
        path.unlink()


def remove_parts(folder: Path, keep: Collection[int]) -> None:
    """Remove finished parts but those of these numbers, to be made anew. Only for the holder of the lock."""
    for path in folder.iterdir():
        if re.fullmatch(r'\d{5,}', path.name) and int(path.name) not in keep:
            shutil.rmtree(path)


def refuse_too_many(plan: SplitPlan, unreadable: Collection[dict[str, str]], settings: Settings) -> None:
    """Refuse more unreadable images of a split than are allowed, and leave a list of them in its folder."""
    allowed = int(settings.max_unreadable * len(plan.order))
    if len(unreadable) > allowed:
        report = report_unreadable(plan, unreadable, settings)
        raise UserError(
            f'{plan.name}: {len(unreadable):,} images so far are unreadable, of {len(plan.order):,}; --max-unreadable '
            f'{settings.max_unreadable:g} allows {allowed:,}. {report} lists them with reasons. Repair them and run '
            f'the same command again (finished parts that lack them are made anew), or give it a larger share to go on '
            f'without them'
        )


def report_unreadable(plan: SplitPlan, unreadable: Collection[dict[str, str]], settings: Settings) -> Path:
    """Leave the list of unreadable images in the folder of the split."""
    path = settings.state / plan.name / REPORT
    entries = sorted(unreadable, key=lambda entry: entry['name'])
    write_json(path, {'images': len(plan.order), 'unreadable': len(entries), 'list': entries})
    return path


class PartWriter:
    """Writes the part of this number into the split's folder; ``content``, what it is made with, into ``part.json``."""

    def __init__(self, folder: Path, part: int, encoder: Encoder, content: dict[str, Any]) -> None:
        self.split, self.part = folder.name, part
        self._folder, self._kind, self._content = folder, encoder.kind, content
        folder.mkdir(parents=True, exist_ok=True)
        prefix = f'{_WRITING}{part_name(part)}-{os.getpid()}-'
        self._place = Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
        self._writer = MDSWriter(
            out=str(self._place),
            columns=encoder.columns,
            compression=None,  # would save at most 7% of latents
            hashes=['xxh64'],
            size_limit=_SHARD_BYTES,
            max_workers=1,
        )
        self._count = 0
        self._sums: list[np.ndarray] = []
        self._values_per_channel = 0
        self.unreadable: list[dict[str, str]] = []
        self.transparent = 0  # images with transparent parts

    def write(self, views_BSHW: Sequence[np.ndarray], labels: Sequence[int], names: Sequence[str]) -> None:
        """Append rows: float16 latents of the images, then of their mirror images if there are any; labels and names.

        A value that is not finite is refused.
        """
        for view in views_BSHW:
            finite = np.isfinite(view).all(axis=(2, 3))
            if not finite.all():
                row, channel = np.argwhere(~finite)[0]
                raise UserError(
                    f'{names[row]}: channel {channel} of its latents holds values that half precision cannot (NaN, or '
                    f'beyond 65504): the autoencoder does not fit, or, of imported latents, --stored-scale is wrong'
                )
            self._sums.append(channel_sums(view, self._kind))
            self._values_per_channel += len(view) * view.shape[2] * view.shape[3]
        for row, (label, name) in enumerate(zip(labels, names, strict=True)):
            arrays = dict(zip((LATENTS, LATENTS_MIRRORED), (view[row] for view in views_BSHW), strict=False))
            self._writer.write({**arrays, LABEL: int(label), NAME: name})
        self._count += len(names)

    def finish(self, remote: str | None = None) -> None:
        """Bring everything to the disk, or the shards to where the split is wanted; take the final name."""
        # Sorted, because images and mirror images alternate by batches: the same to the bit for any batch size.
        sums = np.concatenate(self._sums) if self._sums else np.zeros((0, 2, 0))
        sum_of_values, sum_of_squares = np.sort(sums, axis=0).sum(axis=0).tolist()
        summary = {
            'content': self._content,
            'samples': self._count,
            'values_per_channel': self._values_per_channel,
            'sum': sum_of_values,
            'sum_of_squares': sum_of_squares,
            'unreadable': self.unreadable,
            'transparent': self.transparent,
        }
        final = self._folder / part_name(self.part)
        self._writer.finish()
        write_json(self._place / PART_FILE, summary)
        if remote is not None:
            for path in sorted(self._place.glob('shard.*')):
                upload(path, f'{remote}/{part_name(self.part)}', keep=False)
        for path in self._place.iterdir():
            to_disk(path)
        to_disk(self._place)
        self._place.chmod(0o755)  # mkdtemp made it for its owner alone
        try:
            self._place.rename(final)
        except OSError:
            # A rank of a killed run may live on for some seconds and finish a part. It was made with the same
            # settings, so its rows are as good as ours.
            if not (final / PART_FILE).is_file():
                raise
            shutil.rmtree(self._place)
        to_disk(self._folder)

    def abandon(self) -> None:
        """Give the disk back what was written, also where ``finish`` has failed."""
        self._writer.cancel_future_jobs()
        shutil.rmtree(self._place, ignore_errors=True)


class BackgroundWriter:
    """A thread that makes parts out of batches, which come in order, and brings finished ones to the disk or away.

    Leaving the context waits until all parts are done; leaving it by an exception gives up the unfinished part.
    """

    def __init__(self, plans: Mapping[str, SplitPlan], encoder: Encoder, settings: Settings) -> None:
        self._plans, self._encoder, self._settings = plans, encoder, settings
        self._unreadable = {name: plan.unreadable for name, plan in plans.items()}
        self._writer: PartWriter | None = None
        self._is_given_up = False
        # A whole part at the most, which the disk or an upload may cost.
        self._queue: queue.Queue[Any] = queue.Queue(max(4, settings.part_size // settings.batch_size))
        self._pool = ThreadPoolExecutor(1, 'write-parts')

    def __enter__(self) -> 'BackgroundWriter':
        self._work = self._pool.submit(self._run)  # not before somebody will end it
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            if error is None:
                self.put(None, lambda: None)
                self._work.result()
        finally:
            self._is_given_up = True
            with contextlib.suppress(queue.Full):  # then it is not waiting
                self._queue.put_nowait(None)
            self._pool.shutdown()
            if self._writer is not None:
                self._writer.abandon()

    def put(self, batch: tuple[Prepared, Encoded | None] | None, meanwhile: Callable[[], None]) -> None:
        """Hand over a batch and its results, or None at the end; calls ``meanwhile`` while the writer is behind.

        What stopped the writer, e.g. a full disk or too many unreadable images, is raised.
        """
        while True:
            if self._work.done():
                self._work.result()
            try:
                return self._queue.put(batch, timeout=0.2)
            except queue.Full:
                meanwhile()

    def _run(self) -> None:
        with full_disk_in_words(self._settings.state):
            while (batch := self._queue.get()) is not None and not self._is_given_up:
                self._write(*batch)
            if not self._is_given_up:
                self._finish_part()

    def _write(self, item: Prepared, encoded: Encoded | None) -> None:
        plan, unreadable = self._plans[item.split], self._unreadable[item.split]
        if self._writer is None or (self._writer.split, self._writer.part) != (item.split, item.part):
            self._finish_part()
            self._writer = PartWriter(self._settings.state / item.split, item.part, self._encoder, plan.content)
        source, writer = plan.source, self._writer
        for position, reason in item.unreadable:
            writer.unreadable.append({'name': source.names[position], 'reason': reason})
            unreadable.append(writer.unreadable[-1])
            refuse_too_many(plan, unreadable, self._settings)
        writer.transparent += item.transparent
        if encoded is not None:
            labels = [int(source.labels[position]) for position in item.positions]
            writer.write(encoded(), labels, [source.names[position] for position in item.positions])

    def _finish_part(self) -> None:
        if self._writer is not None:
            self._writer.finish(self._settings.remote and f'{self._settings.remote}/{self._writer.split}')
            self._writer = None
