"""The whole conversion: samples in, a latents data set out, on any number of ranks, interrupted at any moment.

The first rank plans under a lock; rank r then makes every world_size-th missing part; the first rank merges. Nothing
but the names of finished parts is remembered in between, so a killed conversion goes on where they end.
"""

import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from streaming.base.compression import compress
from streaming.base.format.mds.encodings import get_mds_encoded_size

from tread_composer.conversion.decoding import Batch, Prepared, prepared_batches
from tread_composer.conversion.encoding import Encoded, Encoder, ImageEncoder
from tread_composer.conversion.merging import finish_split
from tread_composer.conversion.output import Output, refuse_foreign, refuse_if_too_large, scratch_of, size_in_words
from tread_composer.conversion.parts import done_parts, remove_unfinished
from tread_composer.conversion.plan import SplitPlan, make_plans
from tread_composer.conversion.settings import ImageSettings, Settings
from tread_composer.conversion.sources import Source, open_sources
from tread_composer.conversion.writing import BackgroundWriter
from tread_composer.core.errors import UserError
from tread_composer.data.checks import check_shards
from tread_composer.data.manifest import MANIFEST_NAME, Manifest
from tread_composer.io.device import choose_device, machine_for
from tread_composer.io.files import full_disk_in_words
from tread_composer.io.progress import RankProgress
from tread_composer.io.ranks import Ranks

__all__ = ['Conversion', 'convert']

_PROBE = 64  # samples that are compressed, to see how much it saves

Log = Callable[[str], None]


@dataclass(frozen=True)
class _Split:
    """What the first rank has decided about a split, for all ranks.

    Args:
        plan: What is to be written.
        content: What its parts must have been made with.
        parts: Those that are finished: number -> what ``part.json`` says.
        is_finished: Whether the split is whole already.
    """

    plan: SplitPlan
    content: dict[str, Any]
    parts: dict[int, dict[str, Any]]
    is_finished: bool

    @property
    def undone(self) -> list[tuple[str, int]]:
        """Split and number of each part that is to be made."""
        return [(self.plan.name, number) for number in range(self.plan.num_parts) if number not in self.parts]

    @property
    def samples_done(self) -> int:
        """Samples of finished parts, readable or not."""
        return sum(len(self.plan.positions(number)) for number in self.parts)


def convert(settings: ImageSettings, *, dry_run: bool = False, log: Log = print) -> None:
    """Convert images, or go on with what an earlier call began; see ``Conversion``."""

    def open_splits(encoder: Encoder, scratch: Path) -> dict[str, Source]:
        del encoder
        files = [None if name is None else Path(name).expanduser()
                 for name in (settings.ground_truth, settings.class_names)]  # fmt: skip
        source = Path(settings.source).expanduser()
        return open_sources(source, scratch=scratch, ground_truth=files[0], class_names=files[1])

    Conversion(settings, functools.partial(ImageEncoder, settings), open_splits, log).run(dry_run)


class Conversion:
    """Writes samples as a data set, or goes on with what an earlier call began.

    Under the ``composer`` launcher all ranks make one. Without it there is no process group.

    Args:
        settings: What and how.
        make_encoder: Gives what encodes on a device.
        open_splits: Gives the source of each split, with the encoder and a folder for scratch.
        log: Gets the lines for people, on the first rank.
    """

    encoder: Encoder

    def __init__(
        self,
        settings: Settings,
        make_encoder: Callable[[torch.device], Encoder],
        open_splits: Callable[[Any, Path], Mapping[str, Source]],
        log: Log = print,
    ) -> None:
        self.settings, self.folder, self.ranks = settings, settings.state, Ranks.start()
        self._make_encoder, self._open_splits = make_encoder, open_splits
        self.log = log if self.ranks.is_first else lambda line: None

    def run(self, dry_run: bool = False) -> None:
        """Do it; for ``dry_run`` only say what would be done, what it would take and whether it fits.

        Raises:
            UserError: The input is at fault. Before the first part nothing is left behind; later, finished parts are.
        """
        settings, ranks = self.settings, self.ranks
        with contextlib.ExitStack() as stack:
            device = ranks.agreed(lambda: choose_device(settings.device, ranks.local_rank))
            self.workers = settings.workers_of_rank(device.type == 'cuda', ranks.local_world)
            stack.enter_context(machine_for(device, self.workers, ranks.local_world))
            # The first rank has loaded (perhaps fetched) the weights before the others look for them.
            encoder_of_first = ranks.agreed(lambda: self._make_encoder(device) if ranks.is_first else None)
            self.encoder = ranks.agreed(lambda: encoder_of_first or self._make_encoder(device))
            content = ranks.from_first(self.encoder.content)
            ranks.agreed(lambda: self._check_same(content))
            splits = ranks.from_first(ranks.agreed(lambda: self._plan(stack, dry_run) if ranks.is_first else None))
            if splits is None:
                return
            ranks.check_shared(self.folder, '--out')
            progress = RankProgress(
                scratch_of(self.folder),
                ranks.rank,
                total=sum(len(split.plan.order) for split in splits.values()),
                done_before=sum(split.samples_done for split in splits.values()),
                log=self.log,
            )
            try:
                self._make_parts(splits, progress)
            except UserError as error:
                progress.tell_failure(str(error))
                raise
            ranks.wait_for_all(progress.tick)
            if ranks.is_first:
                made = f'{"rank 0 made " if ranks.world > 1 else ""}{progress.summary()}'
                self.log(made if any(split.undone for split in splits.values()) else 'all parts are there')
                with full_disk_in_words(self.folder):
                    self._merge(splits)

    def _check_same(self, content: dict[str, Any]) -> None:
        if self.encoder.content != content:
            raise UserError('this rank has loaded another autoencoder than rank 0; give all nodes the same --vae')

    def _plan(self, stack: contextlib.ExitStack, dry_run: bool) -> dict[str, _Split] | None:
        """Everything before the first sample is encoded; the lock is held until ``stack`` ends."""
        settings, folder, output = self.settings, self.folder, Output(self.settings)
        with full_disk_in_words(folder):
            if dry_run:
                output.check()
                scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            else:
                scratch = stack.enter_context(output.locked())
                RankProgress.clear(scratch)
                remove_unfinished(folder)
            plans = {plan.name: plan for plan in make_plans(self._open_splits(self.encoder, scratch), settings)}
            self._describe(plans)
            content = {**self.encoder.content, **settings.content}
            output.settle(content, {name: plan.content() for name, plan in plans.items()})
            splits = {name: self._state(plan, content) for name, plan in plans.items()}
            if all(split.is_finished for split in splits.values()):
                if not dry_run:
                    shutil.rmtree(scratch)
                self.log(f'{settings.out}: finished already, nothing to do')
                return None
            if settings.remote is not None:
                for name in plans:
                    if not (folder / name).is_dir():  # else this work folder has begun to upload it
                        refuse_foreign(f'{settings.remote}/{name}')
            self._check_room([split for split in splits.values() if not split.is_finished])
            if dry_run:
                self.log('dry run: nothing is written')
                return None
            output.record()
            for name in plans:
                (folder / name).mkdir(exist_ok=True)
                remove_unfinished(folder / name)
            return splits

    def _describe(self, plans: dict[str, SplitPlan]) -> None:
        for plan in plans.values():
            self.log(f'{plan.name}: {plan.source.description}{plan.note}')
            # The first labels and the last one, to be compared with what a published model expects.
            labels = [f'{label} = {name}' for label, name in enumerate(plan.source.class_names)]
            if len(labels) > 6:
                labels[5:-1] = ['...']
            if labels:
                self.log(f'{plan.name}: labels: {", ".join(labels)}')
        if 'val' not in plans and self.settings.splits is None:
            self.log('there is no evaluation split; --held-out N takes one out of train')
        self.log(self.encoder.description)

    def _state(self, plan: SplitPlan, content: dict[str, Any]) -> _Split:
        folder = self.folder / plan.name
        content = {**content, 'split': plan.name, **plan.content()}
        parts = done_parts(folder, content)
        for number in set(parts) - set(range(plan.num_parts)):
            raise UserError(f'{folder}: unexpected part {number}; move it away')
        is_finished = len(parts) == plan.num_parts and (folder / MANIFEST_NAME).exists()
        if is_finished:
            check_shards(folder, Manifest.load(folder), remote=self.settings.is_remote)
            self.log(f'{plan.name}: finished before, {plan.num_parts:,} parts')
        return _Split(plan, content, parts, is_finished)

    def _check_room(self, splits: list[_Split]) -> None:
        each = self._bytes_per_sample(splits[0].plan)
        for plan in (split.plan for split in splits):
            self.log(f'{plan.name}: {size_in_words(each * len(plan.order))} expected in {plan.num_parts:,} parts')
        done = sum(split.samples_done for split in splits)
        needed = each * (sum(len(split.plan.order) for split in splits) - done)
        content = 'the remaining parts' if done else 'the latents'
        if self.settings.is_remote:  # a rank has one part at a time on its disk
            needed = self.ranks.world * each * max(len(split.plan.positions(0)) for split in splits)
            content = f'parts on their way to {self.settings.out}'
        remedy = 'make room, choose another place, or store less (--no-mirror halves it)'
        free = refuse_if_too_large(self.folder, needed, content, remedy)
        self.log(f'{content} need {size_in_words(needed)} in {self.folder}, {size_in_words(free)} are free: fits')
        if self.settings.is_remote:
            self.log(f'the room at {self.settings.out} is not known')
        if done:
            undone = sum(len(split.undone) for split in splits)
            self.log(f'going on: {done:,} samples are done, {undone:,} parts are left')

    def _bytes_per_sample(self, plan: SplitPlan) -> float:
        """Bytes of a sample in the shards, measured on a random choice of the split where they are compressed."""
        row = sum(get_mds_encoded_size(encoding) or 0 for encoding in self.encoder.columns.values())
        if self.settings.compression is not None:
            size = self.settings.batch_size
            batches = [Batch(plan.name, 0, positions) for positions in plan.batches(0, size)][: max(1, _PROBE // size)]
            raw = b''
            for item in prepared_batches({plan.name: plan.source}, batches, self.encoder, workers=min(self.workers, 1)):
                if (encoded := self._encoded(item)) is not None:
                    views = encoded()
                    raw += b''.join(view[index].tobytes() for index in range(len(views[0])) for view in views)
            if not raw:
                raise UserError(f'{plan.name}: none of about {_PROBE} images taken at random can be read')
            row *= len(compress(self.settings.compression, raw)) / len(raw)
        return row * 1.01 + 64  # a name of 40 letters, offsets, the index

    def _make_parts(self, splits: dict[str, _Split], progress: RankProgress) -> None:
        """This rank's share: prepare in worker processes, encode here, write in the background."""
        undone = [part for split in splits.values() for part in split.undone]
        batches = [
            Batch(name, part, positions)
            for name, part in undone[self.ranks.rank :: self.ranks.world]
            for positions in splits[name].plan.batches(part, self.settings.batch_size)
        ]
        sources = {name: split.plan.source for name, split in splits.items()}
        # Before the thread below exists: forking a process that has threads can copy a lock that nobody will open.
        items = iter(prepared_batches(sources, batches, self.encoder, workers=self.workers) if batches else ())
        plans = {name: split.plan for name, split in splits.items()}
        contents = {name: split.content for name, split in splits.items()}
        unreadable = {
            name: [entry for part in split.parts.values() for entry in part['unreadable']]
            for name, split in splits.items()
        }
        with BackgroundWriter(plans, self.encoder, contents, self.settings, unreadable) as writer:
            for item in items:
                writer.put(item, self._encoded(item), progress.tick)
                progress.add(len(item.batch.positions))
                progress.tick()

    def _encoded(self, item: Prepared) -> Encoded | None:
        if item.problem:
            raise UserError(item.problem)
        if item.samples is None:
            return None
        try:
            return self.encoder(item.samples, item.batch.split, item.positions)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f'the GPU has too little memory for --batch-size {self.settings.batch_size}; lower it and run the same '
                f'command again (finished parts stay)'
            ) from error

    def _merge(self, splits: dict[str, _Split]) -> None:
        for name, split in splits.items():
            if split.is_finished:
                continue
            folder, plan = self.folder / name, split.plan
            manifest = finish_split(folder, plan, done_parts(folder, split.content), self.encoder, self.settings)
            lost = len(plan.order) - manifest.num_samples
            unreadable = f', {lost:,} images were unreadable' if lost else ''
            place = os.path.join(self.settings.out, name)
            self.log(f'{name}: {manifest.num_samples:,} samples in {place}{unreadable}')
        shutil.rmtree(scratch_of(self.folder), ignore_errors=True)
