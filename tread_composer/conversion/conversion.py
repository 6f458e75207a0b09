"""The whole conversion: samples in, a latents data set out, on any number of ranks, interrupted at any moment.

The first rank plans under a lock; rank r then makes every world_size-th missing part, or workers of Ray make them all;
the first rank merges. Nothing but the names of finished parts is remembered in between, so a killed conversion goes on
where they end.
"""

import contextlib
import functools
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from streaming.base.format.mds.encodings import get_mds_encoded_size

import tread_composer
from tread_composer.conversion.destination import Output, check_remote, refuse_if_too_large, size_in_words, upload
from tread_composer.conversion.encoding import Encoder
from tread_composer.conversion.making import MakeEncoder, Part, Plans, make_parts, ray_part_maker
from tread_composer.conversion.parts import (
    REPORT,
    done_parts,
    refuse_too_many,
    remove_parts,
    remove_unfinished,
    report_unreadable,
)
from tread_composer.conversion.settings import Settings
from tread_composer.conversion.splits import SplitPlan, make_plans, part_name
from tread_composer.conversion.squares import UnreadableImage
from tread_composer.core.errors import UserError
from tread_composer.data.checks import check_shards
from tread_composer.data.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest, Scaling
from tread_composer.io.device import choose_device, machine_for
from tread_composer.io.files import full_disk_in_words, read_json, write_json
from tread_composer.io.progress import Progress, RankProgress
from tread_composer.io.ranks import Ranks, check_equal
from tread_composer.io.ray_pool import check_ray, on_ray

__all__ = ['Conversion']

Log = Callable[[str], None]


class Conversion:
    """Writes samples as a data set, or goes on with what an earlier call began.

    Under the ``composer`` launcher all ranks make one; without it there is no process group. ``make_encoder`` gives
    what encodes on a device, and knows the samples; ``log`` gets the lines for people, on the first rank.
    """

    encoder: Encoder

    def __init__(self, settings: Settings, make_encoder: MakeEncoder, log: Log = print) -> None:
        self.settings, self.output, self.ranks = settings, Output(settings), Ranks.start()
        self.folder, self._make_encoder = settings.state, make_encoder
        self.log = log if self.ranks.is_first else lambda line: None

    def run(self, dry_run: bool = False) -> None:
        """Do it; for ``dry_run`` only say what would be done, what it would take and whether it fits.

        ``UserError`` where the input is at fault: before the first part nothing is left behind, later finished parts.
        """
        settings, ranks = self.settings, self.ranks
        with contextlib.ExitStack() as stack:
            if settings.engine == 'ray':
                check_ray()
            name = 'cpu' if settings.engine == 'ray' else settings.device  # this process then only plans
            device = ranks.agreed(lambda: choose_device(name, ranks.local_rank))
            workers = settings.workers_of_rank(device.type == 'cuda', ranks.local_world)
            stack.enter_context(machine_for(device, workers, ranks.local_world))
            # The first rank has loaded (perhaps fetched) the weights before the others look for them.
            encoder_of_first = ranks.agreed(lambda: self._make_encoder(device) if ranks.is_first else None)
            self.encoder = ranks.agreed(lambda: encoder_of_first or self._make_encoder(device))
            check_equal(self.encoder.content)
            plans = ranks.from_first(ranks.agreed(lambda: self._plan(stack, dry_run) if ranks.is_first else None))
            if plans is None:
                return
            parts = [part for plan in plans.values() for part in plan.undone]
            counts: dict[str, Any] = {'total': sum(len(plan.order) for plan in plans.values())}
            counts['done_before'] = sum(plan.samples_done for plan in plans.values())
            if settings.engine == 'ray':
                summary = self._make_parts_on_ray(parts, plans, counts)
            else:
                summary = self._make_parts_on_ranks(parts, plans, counts, workers)
            if ranks.is_first:
                self.log(summary if parts else 'all parts are there')
                with full_disk_in_words(self.folder):
                    self._merge(plans)

    def _make_parts_on_ranks(self, parts: list[Part], plans: Plans, counts: dict[str, Any], workers: int) -> str:
        """Every rank its share; returns what is to be said of it."""
        ranks = self.ranks
        ranks.check_shared(self.folder, '--out')
        progress = RankProgress(self.output.scratch, ranks.rank, **counts, log=self.log)
        try:
            make_parts(parts[ranks.rank :: ranks.world], plans, self.encoder, self.settings, progress, workers=workers)
        except UserError as error:
            progress.tell_failure(str(error))
            raise
        ranks.wait_for_all(progress.tick)
        return f'{"rank 0 made " if ranks.world > 1 else ""}{progress.summary()}'

    def _make_parts_on_ray(self, parts: list[Part], plans: Plans, counts: dict[str, Any]) -> str:
        settings = self.settings
        progress = Progress('', unit='images', **counts, log=self.log)
        unreadable = {name: plan.unreadable for name, plan in plans.items()}

        def done(unit: tuple[str, int], lost: list[dict[str, str]]) -> None:
            name, part = unit
            unreadable[name] += lost
            refuse_too_many(plans[name], unreadable[name], settings)
            progress.add(len(plans[name].positions(part)))

        on_ray(
            parts,
            functools.partial(ray_part_maker, settings, self._make_encoder, self.encoder.content, plans),
            done,
            scratch=self.output.scratch,
            workers=settings.ray_workers,
            device=settings.device,
            log=self.log,
        )
        for name in plans:  # of workers that were lost
            remove_unfinished(self.folder / name)
        return progress.summary()

    def _plan(self, stack: contextlib.ExitStack, dry_run: bool) -> Plans | None:
        """Everything before the first sample is encoded; the lock is held until ``stack`` ends."""
        settings, folder, output = self.settings, self.folder, self.output
        with full_disk_in_words(folder):
            if dry_run:
                output.check()
                scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            else:
                stack.enter_context(output.locked())
                scratch = output.scratch
                RankProgress.clear(scratch)
                remove_unfinished(folder)
            new_plans = make_plans(self.encoder.sources(scratch), settings)
            self._describe(new_plans)
            content = {**self.encoder.content, **settings.content}
            identities = {plan.name: plan.identity() for plan in new_plans}
            record = output.settle(content, identities)
            plans = {
                plan.name: self._continued(plan, {**content, 'split': plan.name, **identities[plan.name]})
                for plan in new_plans
            }
            if all(plan.is_finished for plan in plans.values()):
                if not dry_run:
                    shutil.rmtree(scratch)
                self.log(f'{settings.out}: finished already, nothing to do')
                return None
            self._check_room([plan for plan in plans.values() if not plan.is_finished])
            if settings.remote is not None:
                new = [name for name in plans if not (folder / name).is_dir()]  # of the others some is uploaded already
                check_remote(settings.remote, new, record, is_written=not dry_run)
            if dry_run:
                self.log('dry run: nothing is written')
                return None
            write_json(output.record_path, record)  # from now on the folder is this conversion's
            for name, plan in plans.items():
                (folder / name).mkdir(exist_ok=True)
                remove_unfinished(folder / name)
                remove_parts(folder / name, keep=plan.parts)
            return plans

    def _describe(self, plans: list[SplitPlan]) -> None:
        for plan in plans:
            self.log(f'{plan.name}: {plan.source.description}{plan.note}')
            # The first labels and the last one, to be compared with what a published model expects.
            labels = [f'{label} = {name}' for label, name in enumerate(plan.source.class_names)]
            if len(labels) > 6:
                labels[5:-1] = ['...']
            if labels:
                self.log(f'{plan.name}: labels: {", ".join(labels)}')
        has_val = 'val' in [plan.name for plan in plans]
        if self.settings.can_hold_out and self.settings.splits is None and not has_val:
            self.log('there is no evaluation split; --held-out N takes one out of train')
        self.log(self.encoder.description)

    def _continued(self, plan: SplitPlan, content: dict[str, Any]) -> SplitPlan:
        """The plan with what an earlier call has finished."""
        folder = self.folder / plan.name
        parts = done_parts(folder, content)
        for number in set(parts) - set(range(plan.num_parts)):
            raise UserError(f'{folder}: unexpected part {number}; move it away')
        is_finished = len(parts) == plan.num_parts and (folder / MANIFEST_NAME).exists()
        if is_finished:
            _check_parts(folder, Manifest.load(folder), self.settings)
            self.log(f'{plan.name}: finished before, {plan.num_parts:,} parts')
        if repaired := self._repaired(plan, parts):
            remedy = 'their parts are made anew'
            if is_finished:
                remedy = f'to take them in, remove {folder / MANIFEST_NAME} and run the same command again'
            else:
                parts = {number: part for number, part in parts.items() if number not in repaired}
            self.log(f'{plan.name}: {sum(repaired.values()):,} images that were unreadable can be read now; {remedy}')
        return replace(plan, content=content, parts=parts, is_finished=is_finished)

    def _repaired(self, plan: SplitPlan, parts: dict[int, dict[str, Any]]) -> Counter[int]:
        """How many images of each finished part could not be read then, and can be now."""
        repaired: Counter[int] = Counter()
        for number, part in parts.items():
            names = {entry['name'] for entry in part['unreadable']}
            for position in plan.positions(number) if names else ():
                if plan.source.names[position] in names:
                    with contextlib.suppress(UnreadableImage):
                        self.encoder.prepare(plan.source.read(position))
                        repaired[number] += 1
        return repaired

    def _check_room(self, plans: list[SplitPlan]) -> None:
        row = sum(get_mds_encoded_size(encoding) or 0 for encoding in self.encoder.columns.values())
        each = row * 1.01 + 64  # a name of 40 letters, offsets, the index
        for plan in plans:
            self.log(f'{plan.name}: {size_in_words(each * len(plan.order))} expected in {plan.num_parts:,} parts')
        done = sum(plan.samples_done for plan in plans)
        needed = each * (sum(len(plan.order) for plan in plans) - done)
        content = 'the remaining parts' if done else 'the latents'
        if self.settings.is_remote:  # a rank has one part at a time on its disk
            needed = self.ranks.world * each * max(len(plan.positions(0)) for plan in plans)
            content = f'parts on their way to {self.settings.out}'
        free = refuse_if_too_large(self.folder, needed, content, self.settings.disk_remedy)
        self.log(f'{content} need {size_in_words(needed)} in {self.folder}, {size_in_words(free)} are free: fits')
        if self.settings.is_remote:
            self.log(f'the room at {self.settings.out} is not known')
        if done:
            undone = sum(len(plan.undone) for plan in plans)
            self.log(f'going on: {done:,} samples are done, {undone:,} parts are left')

    def _merge(self, plans: Plans) -> None:
        for name, plan in plans.items():
            if plan.is_finished:
                continue
            finished = replace(plan, parts=done_parts(self.folder / name, plan.content))
            manifest = _finish_split(finished, self.encoder, self.settings)
            lost = len(plan.order) - manifest.num_samples
            unreadable = f', {lost:,} images were unreadable' if lost else ''
            place = os.path.join(self.settings.out, name)
            self.log(f'{name}: {manifest.num_samples:,} samples in {place}{unreadable}')
            if finished.transparent:
                place = f'on {manifest.background}'
                if manifest.background == 'stored':
                    place = 'with the colours that are stored there'
                self.log(f'{name}: {finished.transparent:,} images are transparent in places: {place} (--background)')
        shutil.rmtree(self.output.scratch, ignore_errors=True)


def _finish_split(plan: SplitPlan, encoder: Encoder, settings: Settings) -> Manifest:
    """Make a data set out of the finished parts of a split; refused if one has been damaged since.

    Each file is replaced in one step and the manifest comes last, so a split with a manifest is whole, and one without
    is merged again by the next run, however this one ended.
    """
    assert not plan.undone
    folder = settings.state / plan.name
    refuse_too_many(plan, plan.unreadable, settings)
    report_unreadable(plan, plan.unreadable, settings)
    manifest = _manifest(plan, encoder, settings)
    # As streaming's merge_index, which takes paths for URLs (a '#' in one loses the rest).
    shards = []
    for part in map(part_name, range(plan.num_parts)):
        index = folder / part / 'index.json'
        try:
            for shard in read_json(index)['shards']:
                shard['raw_data']['basename'] = f'{part}/{shard["raw_data"]["basename"]}'
                shards.append(shard)
        except (UserError, KeyError, TypeError) as error:
            raise _damaged(folder, f'{index}: is damaged or missing') from error
    write_json(folder / 'index.json', {'version': 2, 'shards': shards})
    _check_parts(folder, manifest, settings)
    if settings.remote is not None:
        remote = f'{settings.remote}/{plan.name}'
        for name in (REPORT, 'index.json'):
            upload(folder / name, remote, keep=True)
        # In its place here only once it is there, because here it says that the split is finished.
        with tempfile.TemporaryDirectory() as scratch:
            manifest.save(scratch)
            upload(Path(scratch) / MANIFEST_NAME, remote, keep=True)
    manifest.save(folder)
    return manifest


def _check_parts(folder: Path, manifest: Manifest, settings: Settings) -> None:
    """Refuse a split of which something was damaged since it was finished; says what to remove."""
    try:
        check_shards(folder, manifest, remote=settings.is_remote)
    except UserError as error:
        raise _damaged(folder, str(error)) from error


def _damaged(folder: Path, fault: str) -> UserError:
    return UserError(
        f'{fault}\nThis was whole when it was finished and is not any more. Remove the folder of the part (the '
        f'number in the path; where there is none, {folder / MANIFEST_NAME}) and run the same command again: only that '
        f'part is made anew'
    )


def _manifest(plan: SplitPlan, encoder: Encoder, settings: Settings) -> Manifest:
    parts = [plan.parts[number] for number in range(plan.num_parts) if plan.parts[number]['samples']]
    values = sum(part['values_per_channel'] for part in parts)
    mean = np.array([part['sum'] for part in parts]).sum(axis=0) / values
    second = np.array([part['sum_of_squares'] for part in parts]).sum(axis=0) / values
    std = np.sqrt(np.maximum(second - mean**2, 0))
    if not std.all():
        raise UserError(f'{plan.name}: channel {int(std.argmin())} is the same in all samples: no data to train on')
    channels, height, width = encoder.latent_shape
    statistics: dict[str, Any] = {'mean': tuple(mean.tolist()), 'std': tuple(std.tolist())}
    published = encoder.published
    scaling = Scaling.measured(**statistics)
    if published is not None:
        scaling = Scaling(source=f'published for {published.name}', scale=(published.scale,), shift=(published.shift,))
    return Manifest(
        format_version=FORMAT_VERSION,
        kind=encoder.kind,
        **encoder.facts,
        channels=channels,
        latent_height=height,
        latent_width=width,
        num_samples=sum(part['samples'] for part in parts),
        num_classes=len(plan.source.class_names),
        class_names=plan.source.class_names,
        **statistics,
        scaling=scaling,
        background=encoder.background,
        permutation_seed=settings.seed,
        tool_version=tread_composer.__version__,
        source=f'{plan.source.description}{plan.note}{encoder.note}',
    )
