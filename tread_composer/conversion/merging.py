"""The last step of a split: one index over all parts, the report of unreadable images, and the manifest.

Each file is replaced in one step and the manifest comes last, so a split with a manifest is whole, and one without is
merged again by the next run, however this one ended.
"""

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from streaming.base.util import merge_index

import tread_composer
from tread_composer.conversion.encoding import Encoder
from tread_composer.conversion.output import Uploader
from tread_composer.conversion.parts import part_name
from tread_composer.conversion.plan import SplitPlan
from tread_composer.conversion.settings import Settings
from tread_composer.core.errors import UserError
from tread_composer.data.checks import check_shards
from tread_composer.data.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest
from tread_composer.io.files import replace, write_json

__all__ = ['REPORT', 'allowed_unreadable', 'finish_split', 'report_unreadable', 'too_many_unreadable']

REPORT = 'unreadable.json'


def finish_split(
    folder: Path,
    plan: SplitPlan,
    parts: Mapping[int, dict[str, Any]],
    encoder: Encoder,
    settings: Settings,
    uploader: Uploader | None,
) -> Manifest:
    """Make a data set out of the parts.

    Args:
        folder: Of the split.
        plan: Of the split.
        parts: What each ``part.json`` says; all of them.
        encoder: Of the conversion.
        settings: Of the conversion.
        uploader: With a URL as output.

    Raises:
        UserError: Too many images were unreadable, or a finished part has been damaged since.
    """
    assert len(parts) == plan.num_parts
    unreadable = [entry for number in sorted(parts) for entry in parts[number]['unreadable']]
    report_unreadable(folder, len(plan.order), unreadable)
    if len(unreadable) > allowed_unreadable(plan, settings):
        raise too_many_unreadable(folder, plan, len(unreadable), settings)
    manifest = _manifest(plan, parts, encoder, settings)
    _merge_indexes(folder, sorted(parts))
    try:
        check_shards(folder, manifest, remote=uploader is not None)
    except UserError as error:
        raise UserError(
            f'{error}\nA part was whole when it was finished and is not any more. Remove its folder (the number in the '
            f"shard's path) and run the same command again: only that part is made anew"
        ) from error
    if uploader is not None:
        for name in (REPORT, 'index.json'):
            uploader.copy(folder / name, f'{plan.name}/{name}')
        # In its place here only once it is there, because here it says that the split is finished.
        with tempfile.TemporaryDirectory() as scratch:
            manifest.save(scratch)
            uploader.copy(Path(scratch) / MANIFEST_NAME, f'{plan.name}/{MANIFEST_NAME}')
    manifest.save(folder)
    return manifest


def report_unreadable(folder: Path, images: int, entries: Iterable[dict[str, str]]) -> None:
    """Write the list of images that could not be read; an empty one, too."""
    listed = sorted(entries, key=lambda entry: entry['name'])
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / REPORT, {'images': images, 'unreadable': len(listed), 'list': listed})


def allowed_unreadable(plan: SplitPlan, settings: Settings) -> int:
    """How many images of the split may be unreadable."""
    return int(settings.max_unreadable * len(plan.order))


def too_many_unreadable(folder: Path, plan: SplitPlan, count: int, settings: Settings) -> UserError:
    """The error for more than that."""
    return UserError(
        f'{plan.name}: {count:,} images so far are unreadable, of {len(plan.order):,}; --max-unreadable '
        f'{settings.max_unreadable:g} allows {allowed_unreadable(plan, settings):,}. {folder / REPORT} lists them with '
        f'reasons. Repair the source and start anew, or run the same command with a larger share to go on without them'
    )


def _merge_indexes(folder: Path, parts: list[int]) -> None:
    # By way of a temporary folder: streaming takes paths for URLs (a '#' in one loses the rest), and moves the result
    # in a way that is not atomic between file systems.
    with tempfile.TemporaryDirectory() as scratch:
        copies = []
        for part in parts:
            copy = Path(scratch) / 'parts' / part_name(part) / 'index.json'
            copy.parent.mkdir(parents=True)
            shutil.copyfile(folder / part_name(part) / 'index.json', copy)
            copies.append(str(copy))
        with _quiet():
            merge_index(copies, str(Path(scratch) / 'merged'))
        partial = folder / '.index.json.partial'
        shutil.copyfile(Path(scratch) / 'merged' / 'index.json', partial)
    replace(partial, folder / 'index.json')


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Streaming warns about the temporary folder that it makes, which is nobody's business."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _manifest(plan: SplitPlan, parts: Mapping[int, dict[str, Any]], encoder: Encoder, settings: Settings) -> Manifest:
    filled = [parts[number] for number in sorted(parts) if parts[number]['samples']]
    if not filled:
        raise UserError(f'{plan.name}: not one of {len(plan.order):,} images can be read')
    values = sum(part['values_per_channel'] for part in filled)
    mean = np.array([part['sum'] for part in filled]).sum(axis=0) / values
    second = np.array([part['sum_of_squares'] for part in filled]).sum(axis=0) / values
    std = np.sqrt(np.maximum(second - mean**2, 0))
    if not std.all():
        raise UserError(
            f'{plan.name}: channel {int(std.argmin())} is the same in all images; this is no data to train on'
        )
    content = encoder.content()
    channels, height, width = encoder.latent_shape
    stored = {'mean': '; posterior means', 'sample': f'; one draw of the posterior each, seed {settings.seed}'}
    return Manifest(
        format_version=FORMAT_VERSION,
        kind=settings.kind,
        autoencoder=content['autoencoder'],
        autoencoder_hash=content['autoencoder_hash'],
        channels=channels,
        latent_height=height,
        latent_width=width,
        resolution=settings.resolution,
        crop='center',
        mirrored=settings.mirror,
        num_samples=sum(part['samples'] for part in filled),
        num_classes=len(plan.source.class_names),
        class_names=tuple(plan.source.class_names),
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        permutation_seed=settings.seed,
        tool_version=tread_composer.__version__,
        source=plan.description(settings.source) + stored.get(settings.store, ''),
    )
