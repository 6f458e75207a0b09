"""The last step of a split: one index over all parts, the report of unreadable images, and the manifest.

Each file is replaced in one step and the manifest comes last, so a split with a manifest is whole, and one without is
merged again by the next run, however this one ended.
"""

import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

import tread_composer
from tread_composer.conversion.encoding import Encoder
from tread_composer.conversion.output import upload
from tread_composer.conversion.plan import SplitPlan, part_name
from tread_composer.conversion.settings import Settings
from tread_composer.core.errors import UserError
from tread_composer.data.checks import check_shards
from tread_composer.data.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest, Scaling
from tread_composer.io.files import read_json, write_json

__all__ = ['check_parts', 'finish_split', 'refuse_too_many']

_REPORT = 'unreadable.json'


def finish_split(plan: SplitPlan, encoder: Encoder, settings: Settings) -> Manifest:
    """Make a data set out of the finished parts of a split; refused if one has been damaged since."""
    assert not plan.undone
    folder = settings.state / plan.name
    refuse_too_many(plan, plan.unreadable, settings)
    _report(plan, plan.unreadable, settings)
    manifest = _manifest(plan, encoder, settings)
    # As streaming's merge_index, which takes paths for URLs (a '#' in one loses the rest).
    shards = []
    for part in map(part_name, range(plan.num_parts)):
        for shard in read_json(folder / part / 'index.json')['shards']:
            shard['raw_data']['basename'] = f'{part}/{shard["raw_data"]["basename"]}'
            shards.append(shard)
    write_json(folder / 'index.json', {'version': 2, 'shards': shards})
    check_parts(folder, manifest, settings)
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


def check_parts(folder: Path, manifest: Manifest, settings: Settings) -> None:
    """Refuse a split of which something was damaged since it was finished; says what to remove."""
    try:
        check_shards(folder, manifest, remote=settings.is_remote)
    except UserError as error:
        raise UserError(
            f'{error}\nThis was whole when it was finished and is not any more. Remove the folder of the part (the '
            f"number in the shard's path; where no shard is named, {folder / MANIFEST_NAME}) and run the same command "
            f'again: only that part is made anew'
        ) from error


def refuse_too_many(plan: SplitPlan, unreadable: Collection[dict[str, str]], settings: Settings) -> None:
    """Refuse more unreadable images of a split than are allowed, and leave a list of them in its folder."""
    allowed = int(settings.max_unreadable * len(plan.order))
    if len(unreadable) > allowed:
        report = _report(plan, unreadable, settings)
        raise UserError(
            f'{plan.name}: {len(unreadable):,} images so far are unreadable, of {len(plan.order):,}; --max-unreadable '
            f'{settings.max_unreadable:g} allows {allowed:,}. {report} lists them with reasons. Repair them and run '
            f'the same command again (finished parts that lack them are made anew), or give it a larger share to go on '
            f'without them'
        )


def _report(plan: SplitPlan, unreadable: Collection[dict[str, str]], settings: Settings) -> Path:
    path = settings.state / plan.name / _REPORT
    entries = sorted(unreadable, key=lambda entry: entry['name'])
    write_json(path, {'images': len(plan.order), 'unreadable': len(entries), 'list': entries})
    return path


def _manifest(plan: SplitPlan, encoder: Encoder, settings: Settings) -> Manifest:
    parts = [plan.parts[number] for number in range(plan.num_parts) if plan.parts[number]['samples']]
    values = sum(part['values_per_channel'] for part in parts)
    mean = np.array([part['sum'] for part in parts]).sum(axis=0) / values
    second = np.array([part['sum_of_squares'] for part in parts]).sum(axis=0) / values
    std = np.sqrt(np.maximum(second - mean**2, 0))
    if not std.all():
        raise UserError(
            f'{plan.name}: channel {int(std.argmin())} is the same in all samples; this is no data to train on'
        )
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
