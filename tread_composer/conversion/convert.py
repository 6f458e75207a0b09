"""The whole conversion: images in, a latents data set out, on any number of ranks, interrupted at any moment.

The first rank plans under a lock; each rank then makes every so-manieth part that is not there yet; the first rank
merges. Nothing but the names of finished parts is remembered in between, so a killed conversion goes on where they end.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tread_composer.conversion.decoding import Batch, decoded_batches
from tread_composer.conversion.encoding import Encoder
from tread_composer.conversion.estimate import (
    Estimate,
    bytes_in,
    compressed_share,
    estimate,
    refuse_if_too_large,
    size_in_words,
)
from tread_composer.conversion.merging import finish_split
from tread_composer.conversion.output import Output, Uploader, scratch_of
from tread_composer.conversion.parts import done_parts, remove_unfinished
from tread_composer.conversion.plan import SplitPlan, make_plans
from tread_composer.conversion.settings import Settings
from tread_composer.conversion.sources import open_sources
from tread_composer.conversion.writing import BackgroundWriter, Rows
from tread_composer.core.errors import UserError
from tread_composer.data.checks import check_shards
from tread_composer.data.manifest import MANIFEST_NAME, Manifest
from tread_composer.io.device import choose_device, machine_for
from tread_composer.io.files import full_disk_in_words
from tread_composer.io.progress import RankProgress
from tread_composer.io.ranks import Ranks

__all__ = ['convert']

_IN_FLIGHT = 3  # parts of a rank on the local disk when finished ones are uploaded: written, waiting, being uploaded

Log = Callable[[str], None]


@dataclass(frozen=True)
class _Job:
    """What the first rank has found and decided, for all ranks.

    Args:
        plans: Of the splits that are wanted.
        contents: By split: what its parts must have been made with.
        undone: Split and number of the parts that are to be made.
        done: Images of finished parts of these splits.
        unreadable: By split: entries of finished parts.
        finished: Splits that are whole already.
    """

    plans: dict[str, SplitPlan]
    contents: dict[str, dict[str, Any]]
    undone: list[tuple[str, int]]
    done: int
    unreadable: dict[str, list[dict[str, str]]]
    finished: set[str]


def convert(settings: Settings, *, dry_run: bool = False, log: Log = print) -> None:
    """Convert, or go on with what an earlier call began.

    Under the ``composer`` launcher all ranks call this. Without it there is no process group.

    Args:
        settings: What and how.
        dry_run: Say what would be done, what it would take and whether it fits; write nothing.
        log: Gets the lines for people, on the first rank.

    Raises:
        UserError: The input is at fault. Before the first part nothing is left behind; later, finished parts are.
    """
    ranks = Ranks.start()
    log = _first_only(log, ranks)
    with contextlib.ExitStack() as stack:
        device = ranks.agreed(lambda: choose_device(settings.device, ranks.local_rank))
        workers = settings.workers
        if workers is None:
            workers = settings.default_workers(device.type == 'cuda', ranks.local_world)
        stack.enter_context(machine_for(device, workers, ranks.local_world))
        # The first rank has loaded (perhaps fetched) the weights before the others look for them.
        encoder_of_first = ranks.agreed(lambda: Encoder(settings, device) if ranks.is_first else None)
        encoder = ranks.agreed(lambda: encoder_of_first or Encoder(settings, device))
        ranks.agreed(lambda: _check_same_weights(ranks.from_first(encoder.content()), encoder))
        job = ranks.from_first(
            ranks.agreed(
                lambda: _plan(settings, encoder, ranks, workers, stack, dry_run, log) if ranks.is_first else None
            )
        )
        if job is None:
            return
        ranks.check_shared(settings.state, '--out')
        progress = RankProgress(
            scratch_of(settings.state),
            ranks.rank,
            total=sum(len(plan.order) for plan in job.plans.values()),
            done_before=job.done,
            log=log,
        )
        try:
            _make_parts(job, settings, encoder, ranks, workers, progress)
        except UserError as error:
            progress.tell_failure(str(error))
            raise
        ranks.wait_for_all(progress.tick)
        if ranks.is_first:
            made = f'{"rank 0 made " if ranks.world > 1 else ""}{progress.summary()}'
            log(made if job.undone else 'all parts are there')
            with full_disk_in_words(settings.state):
                _merge(job, settings, encoder, log)


def _first_only(log: Log, ranks: Ranks) -> Log:
    return log if ranks.is_first else lambda line: None


def _check_same_weights(first: dict[str, Any], encoder: Encoder) -> None:
    if encoder.content() != first:
        raise UserError('this rank has loaded another autoencoder than rank 0; give all nodes the same --vae')


def _plan(
    settings: Settings,
    encoder: Encoder,
    ranks: Ranks,
    workers: int,
    stack: contextlib.ExitStack,
    dry_run: bool,
    log: Log,
) -> _Job | None:
    """Everything before the first image is encoded; the lock is held until ``stack`` ends."""
    output = Output(settings)
    folder = settings.state
    with full_disk_in_words(folder):
        if dry_run:
            output.check()
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            stack.enter_context(output)
            scratch = scratch_of(folder)
            RankProgress.clear(scratch)
            remove_unfinished(folder)
        plans = {plan.name: plan for plan in make_plans(_open(settings, scratch), settings)}
        _describe(plans, settings, encoder, log)
        content, splits = encoder.content(), {name: plan.content() for name, plan in plans.items()}
        output.settle(content, splits)
        job = _state(plans, content, splits, folder)
        _check_finished(job, settings, log)
        if len(job.finished) == len(plans):
            if not dry_run:
                shutil.rmtree(scratch)
            log(f'{settings.out}: finished already, nothing to do')
            return None
        uploader = None if settings.remote is None else Uploader(settings.remote)
        if uploader is not None:
            for name in plans:
                if not (folder / name).is_dir():  # else this work folder has begun to upload it
                    uploader.refuse_foreign(name)
        _check_room(job, settings, encoder, ranks, workers, log)
        if dry_run:
            log('dry run: nothing is written')
            return None
        output.record()
        for name in plans:
            (folder / name).mkdir(exist_ok=True)
            remove_unfinished(folder / name)
        return job


def _open(settings: Settings, scratch: Path) -> dict[str, Any]:
    source = Path(settings.source).expanduser()
    if not source.exists():
        raise UserError(f'--source {settings.source}: no such file or folder')
    ground_truth = None if settings.ground_truth is None else Path(settings.ground_truth).expanduser()
    class_names = None if settings.class_names is None else Path(settings.class_names).expanduser()
    return open_sources(source, scratch=scratch, ground_truth=ground_truth, class_names=class_names)


def _describe(plans: dict[str, SplitPlan], settings: Settings, encoder: Encoder, log: Log) -> None:
    for plan in plans.values():
        log(f'{plan.name}: {plan.source.description}{plan.note}')
        if plan.source.class_names:
            log(f'{plan.name}: labels: {_labels_in_words(plan.source.class_names)}')
    if 'val' not in plans and settings.splits is None:
        log('there is no evaluation split; --held-out N takes one out of train')
    content = encoder.content()
    stored = 'pixels' if settings.vae is None else f'{content["autoencoder"]} ({settings.store}, {settings.precision})'
    shape = ' x '.join(str(size) for size in encoder.latent_shape)
    mirror = 'and of its mirror image' if settings.mirror else 'without mirror images'
    log(f'{stored}: {shape} for each image {mirror}, from {settings.resolution} x {settings.resolution} pixels')


def _labels_in_words(class_names: Sequence[str]) -> str:
    """The first labels and the last one, to be compared with what a classifier or a published model expects."""
    words = [f'{label} = {name}' for label, name in enumerate(class_names)]
    return ', '.join(words if len(words) <= 6 else [*words[:5], '...', words[-1]])


def _state(
    plans: dict[str, SplitPlan], content: dict[str, Any], splits: dict[str, dict[str, Any]], folder: Path
) -> _Job:
    contents = {name: {**content, 'split': name, **splits[name]} for name in plans}
    undone, done, unreadable, finished = [], 0, {}, set()
    for name, plan in plans.items():
        parts = done_parts(folder / name, contents[name])
        for number in set(parts) - set(range(plan.num_parts)):
            raise UserError(f'{folder / name}: part {number} is one too many; move it away')
        missing = [number for number in range(plan.num_parts) if number not in parts]
        if (folder / name / MANIFEST_NAME).exists() and not missing:
            finished.add(name)
        undone += [(name, number) for number in missing]
        done += sum(len(plan.positions(number)) for number in parts)
        unreadable[name] = [entry for number in sorted(parts) for entry in parts[number]['unreadable']]
    return _Job(plans, contents, undone, done, unreadable, finished)


def _check_finished(job: _Job, settings: Settings, log: Log) -> None:
    for name in sorted(job.finished):
        folder = settings.state / name
        check_shards(folder, Manifest.load(folder), remote=settings.is_remote)
        log(f'{name}: finished before, {job.plans[name].num_parts:,} parts')


def _check_room(job: _Job, settings: Settings, encoder: Encoder, ranks: Ranks, workers: int, log: Log) -> None:
    plans = [plan for name, plan in job.plans.items() if name not in job.finished]
    share = compressed_share(plans[0], encoder, settings, workers)
    estimates: dict[str, Estimate] = {plan.name: estimate(plan, encoder, share) for plan in plans}
    total = sum(one.total for one in estimates.values())
    for name, one in estimates.items():
        log(f'{name}: {size_in_words(one.total)} expected in {job.plans[name].num_parts:,} parts')
    folder = settings.state
    if settings.is_remote:
        needed = _IN_FLIGHT * ranks.world * max(one.largest_part for one in estimates.values())
        free = refuse_if_too_large(folder, needed, f'parts on their way to {settings.out}')
        log(f'up to {size_in_words(needed)} at a time in {folder} ({size_in_words(free)} free); the room at '
            f'{settings.out} is not known')  # fmt: skip
        return
    undone = set(job.undone)
    present = sum(
        bytes_in(folder / plan.name, [part for part in range(plan.num_parts) if (plan.name, part) not in undone])
        for plan in plans
    )
    needed = max(0, total - present)
    free = refuse_if_too_large(folder, needed, 'the remaining parts' if present else 'the latents')
    log(f'needs {size_in_words(needed)}{" more" if present else ""}, {size_in_words(free)} are free: fits')
    if job.done:
        log(f'going on: {job.done:,} images are done, {len(job.undone):,} parts are left')


def _make_parts(
    job: _Job, settings: Settings, encoder: Encoder, ranks: Ranks, workers: int, progress: RankProgress
) -> None:
    """This rank's share: decode in worker processes, encode here, write in the background."""
    mine = job.undone[ranks.rank :: ranks.world]
    batches = [
        Batch(split, part, positions)
        for split, part in mine
        for positions in job.plans[split].batches(part, settings.batch_size)
    ]
    sources = {name: plan.source for name, plan in job.plans.items()}
    on_gpu = encoder.device.type == 'cuda'
    # Before the threads below exist: forking a process that has threads can copy a lock that nobody will open.
    loader = iter(
        decoded_batches(sources, batches, settings.resolution, workers=workers, pin_memory=on_gpu) if batches else ()
    )
    writer = BackgroundWriter(
        job.plans,
        settings.state,
        columns=encoder.columns,
        contents=job.contents,
        settings=settings,
        uploader=None if settings.remote is None else Uploader(settings.remote),
        unreadable=job.unreadable,
    )
    with writer:
        for item in loader:
            if item['problem']:
                raise UserError(item['problem'])
            encoded = _encode(encoder, item, settings) if item['positions'] else None
            rows = Rows(item['batch'], item['positions'], item['unreadable'], encoded)
            writer.put(rows, progress.tick)
            progress.add(len(item['batch'].positions))
            progress.tick()


def _encode(encoder: Encoder, item: dict[str, Any], settings: Settings) -> Any:
    try:
        return encoder(item['images'], item['batch'].split, item['positions'])
    except torch.OutOfMemoryError as error:
        raise UserError(
            f'the GPU has too little memory for --batch-size {settings.batch_size}; lower it and run the same command '
            f'again (finished parts stay)'
        ) from error


def _merge(job: _Job, settings: Settings, encoder: Encoder, log: Log) -> None:
    uploader = None if settings.remote is None else Uploader(settings.remote)
    for name, plan in job.plans.items():
        if name in job.finished:
            continue
        folder = settings.state / name
        parts = done_parts(folder, job.contents[name])
        manifest = finish_split(folder, plan, parts, encoder, settings, uploader)
        lost = len(plan.order) - manifest.num_samples
        log(f'{name}: {manifest.num_samples:,} samples in {os.path.join(settings.out, name)}'
            f'{f", {lost:,} images were unreadable" if lost else ""}')  # fmt: skip
    shutil.rmtree(scratch_of(settings.state), ignore_errors=True)
