"""The last step of a split: one index over all parts, the report of unreadable images, and the manifest.

Each file is replaced in one step and the manifest comes last, so a split with a manifest is whole, and one without is
merged again by the next run, however this one ended.
"""

import json
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import tread_composer
from tread_composer.conversion.encoding import Encoder
from tread_composer.conversion.output import upload
from tread_composer.conversion.parts import part_name
from tread_composer.conversion.plan import SplitPlan
from tread_composer.conversion.settings import Settings
from tread_composer.core.errors import UserError
from tread_composer.data.checks import check_shards
from tread_composer.data.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest
from tread_composer.io.files import read_json, whole_file, write_json

__all__ = ['finish_split', 'refuse_too_many']

_REPORT = 'unreadable.json'


def finish_split(
    folder: Path, plan: SplitPlan, parts: Mapping[int, dict[str, Any]], encoder: Encoder, settings: Settings
) -> Manifest:
    """Make a data set out of all parts of a split, given what each ``part.json`` says.

    Raises:
        UserError: Too many images were unreadable, or a finished part has been damaged since.
    """
    assert len(parts) == plan.num_parts
    numbers = sorted(parts)
    unreadable = [entry for number in numbers for entry in parts[number]['unreadable']]
    refuse_too_many(folder, plan, unreadable, settings)
    _report(folder, plan, unreadable)
    manifest = _manifest(plan, [parts[number] for number in numbers if parts[number]['samples']], encoder, settings)
    _merge_indexes(folder, numbers)
    try:
        check_shards(folder, manifest, remote=settings.is_remote)
    except UserError as error:
        raise UserError(
            f'{error}\nA part was whole when it was finished and is not any more. Remove its folder (the number in the '
            f"shard's path) and run the same command again: only that part is made anew"
        ) from error
    if settings.remote is not None:
        remote = f'{settings.remote}/{plan.name}'
        for name in (_REPORT, 'index.json'):
            upload(folder / name, remote, keep=True)
        # In its place here only once it is there, because here it says that the split is finished.
        with tempfile.TemporaryDirectory() as scratch:
            manifest.save(scratch)
            upload(Path(scratch) / MANIFEST_NAME, remote, keep=True)
    manifest.save(folder)
    return manifest


def refuse_too_many(folder: Path, plan: SplitPlan, unreadable: Collection[dict[str, str]], settings: Settings) -> None:
    """Compare the unreadable images of a split so far with what is allowed.

    Raises:
        UserError: There are more; a list of them is left in the folder.
    """
    allowed = int(settings.max_unreadable * len(plan.order))
    if len(unreadable) > allowed:
        _report(folder, plan, unreadable)
        raise UserError(
            f'{plan.name}: {len(unreadable):,} images so far are unreadable, of {len(plan.order):,}; --max-unreadable '
            f'{settings.max_unreadable:g} allows {allowed:,}. {folder / _REPORT} lists them with reasons. Repair the '
            f'source and start anew, or run the same command with a larger share to go on without them'
        )


def _report(folder: Path, plan: SplitPlan, unreadable: Collection[dict[str, str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    entries = sorted(unreadable, key=lambda entry: entry['name'])
    write_json(folder / _REPORT, {'images': len(plan.order), 'unreadable': len(entries), 'list': entries})


def _merge_indexes(folder: Path, parts: list[int]) -> None:
    # As streaming's merge_index, which takes paths for URLs (a '#' in one loses the rest).
    shards = []
    for part in map(part_name, parts):
        for shard in read_json(folder / part / 'index.json')['shards']:
            for form in (shard['raw_data'], shard['zip_data']):
                if form:
                    form['basename'] = f'{part}/{form["basename"]}'
            shards.append(shard)
    with whole_file(folder / 'index.json') as unfinished:
        unfinished.write_text(json.dumps({'version': 2, 'shards': shards}))


def _manifest(plan: SplitPlan, parts: list[dict[str, Any]], encoder: Encoder, settings: Settings) -> Manifest:
    values = sum(part['values_per_channel'] for part in parts)
    mean = np.array([part['sum'] for part in parts]).sum(axis=0) / values
    second = np.array([part['sum_of_squares'] for part in parts]).sum(axis=0) / values
    std = np.sqrt(np.maximum(second - mean**2, 0))
    if not std.all():
        raise UserError(
            f'{plan.name}: channel {int(std.argmin())} is the same in all samples; this is no data to train on'
        )
    channels, height, width = encoder.latent_shape
    return Manifest(
        format_version=FORMAT_VERSION,
        kind=encoder.kind,
        autoencoder=encoder.autoencoder,
        autoencoder_hash=encoder.autoencoder_hash,
        channels=channels,
        latent_height=height,
        latent_width=width,
        resolution=encoder.resolution,
        crop=encoder.crop,
        mirrored=encoder.mirrored,
        num_samples=sum(part['samples'] for part in parts),
        num_classes=len(plan.source.class_names),
        class_names=plan.source.class_names,
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        permutation_seed=settings.seed,
        tool_version=tread_composer.__version__,
        source=plan.description(settings.source) + encoder.note,
    )
