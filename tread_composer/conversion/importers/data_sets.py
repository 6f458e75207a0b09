"""Data sets that independent machines converted, as the source of one: one map of classes, one permutation.

The rows go through the converter's own parts, so resuming, refusals, statistics and the order are those of a conversion
of all images at once.
Legend: V views (the image, its mirror image), K stored channels, H x W latent pixels.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from streaming.base.format.mds.reader import MDSReader

from tread_composer.autoencoders.published import Published
from tread_composer.conversion.contents import sound_rows
from tread_composer.conversion.destination import read_record
from tread_composer.conversion.encoding import Encoder
from tread_composer.conversion.settings import MergeSettings
from tread_composer.conversion.sources.source import Images, IndexedFiles, Source, arranged, few, in_label_order
from tread_composer.conversion.squares import Sample
from tread_composer.core.errors import UserError
from tread_composer.data.checks import check_shards
from tread_composer.data.columns import LABEL, LATENTS, LATENTS_MIRRORED, NAME
from tread_composer.data.manifest import MANIFEST_NAME, Manifest, contradictions, read_class_names
from tread_composer.data.shards import read_index
from tread_composer.io.files import file_hash
from tread_composer.io.progress import Progress

__all__ = ['DataSets']

# What latents must have in common to be read by one run, as the manifest calls it.
_FACTS = (
    'kind', 'autoencoder', 'autoencoder_hash', 'resolution', 'crop', 'mirrored', 'latent_shape', 'background',
    'published',
)  # fmt: skip
# What a conversion besides records of its encoder; latents of other tools have no such record.
_RECORDED = ('store', 'precision')


class DataSets(Encoder):
    """Finished data sets whose manifests agree (``UserError`` where not); their rows are stored as they are."""

    def __init__(self, settings: MergeSettings, device: torch.device) -> None:
        self.device = device
        splits = {folder: _manifests(folder) for folder in settings.folders}
        self._manifests = {root / name: each for root, named in splits.items() for name, each in named.items()}
        manifest_of = {root: next(iter(named.values())) for root, named in splits.items()}
        facts = {root: _facts(root, manifest) for root, manifest in manifest_of.items()}
        _check_equal(facts)
        # Of what some do not say, what the others say; of what conversions record besides, what all say.
        common = {name: value for each in facts.values() for name, value in each.items() if value is not None}
        for name in _FACTS:
            setattr(self, name, common.get(name))
        recorded = [name for name in _RECORDED if all(name in each for each in facts.values())]
        lists = {root: manifest.class_names for root, manifest in manifest_of.items()}
        self.class_names = _joint_classes(lists, settings.class_names)
        reader = read_index(next(iter(self._manifests)))[0].reader  # decodes a row: all shards have the same columns
        self.prepare = functools.partial(_views, reader, self.mirrored)
        self.particulars = {
            'layout': 'data sets',
            'kind': self.kind,
            **{name: common.get(name) for name in recorded},
            'indexes': sorted(file_hash(folder / 'index.json') for folder in self._manifests),
        }
        counts = ', '.join(f'{len(names):,} in {folder}' for folder, names in lists.items())
        self.description = (
            f'{len(lists)} data sets of {self.autoencoder or "pixels"}; {len(self.class_names):,} classes of these '
            f'names: {counts}'
        )

    def sources(self, scratch: Path) -> Mapping[str, Source]:
        """All rows of each split, in the order of a conversion: by label and name. Reads every byte."""
        del scratch
        return {name: self._source(name) for name in sorted({folder.name for folder in self._manifests})}

    def _source(self, split: str) -> Source:
        members = [(folder, manifest) for folder, manifest in self._manifests.items() if folder.name == split]
        for folder, manifest in members:
            check_shards(folder, manifest)
        shards = [shard for folder, _ in members for shard in read_index(folder)]
        labels = {folder: _labels(manifest, self.class_names) for folder, manifest in members}
        images, origins = Images(class_names=self.class_names), dict[str, Path]()
        total = sum(manifest.num_samples for _, manifest in members)
        progress = Progress(f'{split}: reading', total, 'samples')
        for number, shard in enumerate(shards):
            if not shard.path.is_file():
                raise UserError(f'{shard.path}: only its compressed form is here; decompress it (zstd -d) first')
            for place, row in sound_rows(shard):
                label, name = int(row[LABEL]), row[NAME]
                if label not in labels[shard.folder]:
                    raise UserError(f'{shard.path}: {name}: label {label} is no class of its manifest; run verify.py')
                if origins.setdefault(name, shard.folder) != shard.folder:
                    raise UserError(
                        f'{name} is in {origins[name]} and in {shard.folder}: names tell samples apart. If it is one '
                        f'image, leave it out of one source; if it is two, rename one; then convert that source again'
                    )
                images.names.append(name)
                images.labels.append(labels[shard.folder][label])
                images.places.append((number, *place))
            progress.add(shard.samples)
        source = arranged('data sets', Path(split), images, IndexedFiles(shard.path for shard in shards).read)
        origin = '; '.join(manifest.source for _, manifest in members)
        source.description = f'{len(members)} data sets, merged: {origin}'
        return source


def _manifests(root: Path) -> dict[str, Manifest]:
    """Of each split of a data set, whose classes are the same."""
    if not root.is_dir():
        raise UserError(f'{root}: no such folder; give those of finished data sets on this machine')
    if (root / MANIFEST_NAME).is_file():
        raise UserError(f'{root}: is one split; give the folder of the whole data set, {root.parent}')
    splits = {path.parent.name: Manifest.load(path.parent) for path in sorted(root.glob(f'*/{MANIFEST_NAME}'))}
    record = read_record(root)
    undone = [name for name in record['splits'] if name not in splits] if record else []
    if undone or not splits:
        state = f'{", ".join(undone)} not finished' if undone else f'no split with a {MANIFEST_NAME}'
        raise UserError(f'{root}: {state}; run its conversion to the end first')
    facts = {root / name: _facts(root, manifest) for name, manifest in splits.items()}
    _check_equal({path: {**facts[path], 'class_names': splits[path.name].class_names} for path in facts})
    return splits


def _facts(root: Path, manifest: Manifest) -> dict[str, Any]:
    facts = {name: getattr(manifest, name, None) for name in _FACTS}
    scaling = manifest.scaling
    if scaling is not None and scaling.source != 'measured':
        name = scaling.source.removeprefix('published for ')
        facts['published'] = Published(name, scaling.scale[0], scaling.shift[0])
    record = (read_record(root) or {'content': {}})['content']
    if 'store' in record:  # without a word on its background it kept the colours
        facts['background'] = manifest.background or 'stored'
    return facts | {name: record[name] for name in _RECORDED if name in record}


def _check_equal(facts: Mapping[Path, Mapping[str, Any]]) -> None:
    if lines := contradictions(facts):
        head = 'these data contradict each other, so no run could read them together:'
        raise UserError('\n  '.join([head, *lines]))


def _joint_classes(lists: Mapping[Path, tuple[str, ...]], file: str | None) -> tuple[str, ...]:
    """The names of all classes in label order. A class is its name: numbers of independent conversions mean nothing."""
    distinct = set(lists.values())
    bare = [folder for folder, names in lists.items() if not names]
    if bare and (file or len(distinct) > 1):
        raise UserError(f'{bare[0]}: has no classes, so only data sets without classes join it, and no --class-names')
    if file is None and len(distinct) == 1:
        return distinct.pop()
    remedy = 'give the names of all in label order with --class-names FILE'
    for folder, names in lists.items():
        repeated = {name for name in names if names.count(name) > 1}
        if repeated:
            raise UserError(
                f'{folder}: several classes are called {few(repeated)}, so nobody can say which of them another data '
                f'set means; convert with names that differ, such as synsets'
            )
        if file is None and names != in_label_order(names):
            raise UserError(f'{folder}: its classes are not in the order of their names, and others differ; {remedy}')
    union = {name for names in lists.values() for name in names}
    if file is None:
        return in_label_order(union)
    joint = read_class_names(Path(file))
    if missing := union - set(joint):
        raise UserError(f'--class-names {file}: lacks {len(missing):,} classes of the data sets: {few(missing)}')
    return joint


def _labels(manifest: Manifest, joint: tuple[str, ...]) -> dict[int, int]:
    """Label of a data set -> label in all."""
    if manifest.class_names == joint:  # names for people may occur twice
        return {label: label for label in range(max(len(joint), 1))}
    label_of = {name: label for label, name in enumerate(joint)}
    return {label: label_of[name] for label, name in enumerate(manifest.class_names)}


def _views(reader: MDSReader, mirrored: bool, row: bytes) -> Sample:
    """The arrays of a row as they are stored, float16 ``[V, K, H, W]``."""
    values = reader.decode_sample(row)
    return Sample(np.stack([values[column] for column in (LATENTS, LATENTS_MIRRORED)[: 1 + mirrored]]))
