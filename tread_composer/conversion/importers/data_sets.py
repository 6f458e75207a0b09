"""Data sets that independent machines converted, as the source of one: one map of classes, one permutation.

The rows go through the converter's own parts, so resuming, refusals, statistics and the order are those of a conversion
of all images at once.
Legend: V views (the image, its mirror image), K stored channels, H x W latent pixels.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from streaming.base.format.mds.reader import MDSReader
from torch import Tensor

from tread_composer.autoencoders.published import Published
from tread_composer.conversion.contents import Content, read_shard
from tread_composer.conversion.encoding import Encoded, Encoder, Sample
from tread_composer.conversion.importers.settings import MergeSettings
from tread_composer.conversion.output import RECORD
from tread_composer.conversion.sources.base import Images, IndexedFiles, RangeSource, Source, few, in_label_order
from tread_composer.core.errors import UserError
from tread_composer.data.checks import check_shards
from tread_composer.data.columns import LABEL, LATENTS, LATENTS_MIRRORED, NAME
from tread_composer.data.manifest import MANIFEST_NAME, Manifest, read_class_names
from tread_composer.data.shards import Shard, read_index
from tread_composer.io.files import file_hash, read_json
from tread_composer.io.progress import Progress

__all__ = ['DataSets']

# What latents must have in common to be read by one run, as the manifest calls it.
_FACTS = (
    'kind', 'autoencoder', 'autoencoder_hash', 'resolution', 'crop', 'mirrored', 'channels', 'latent_height',
    'latent_width', 'background',
)  # fmt: skip
# What a conversion besides records of its encoder; latents of other tools have no such record.
_RECORDED = ('store', 'precision')


class DataSets(Encoder):
    """Finished data sets whose manifests agree; their rows are stored as they are.

    Raises:
        UserError: A folder is no finished data set, or two contradict each other, in words.
    """

    def __init__(self, settings: MergeSettings, device: torch.device) -> None:
        self.device = device
        self._manifests = {folder: _manifests(folder) for folder in settings.folders}
        facts = {folder: _facts(folder, next(iter(splits.values()))) for folder, splits in self._manifests.items()}
        _check_equal(facts)
        common = dict(set.intersection(*(set(values.items()) for values in facts.values())))
        manifest = next(manifest for _, manifest in self._all())
        self.kind, self.mirrored, self.resolution, self.crop = (
            manifest.kind,
            manifest.mirrored,
            manifest.resolution,
            manifest.crop,
        )
        self.autoencoder, self.autoencoder_hash = manifest.autoencoder, manifest.autoencoder_hash
        self.background, self.published = (
            next((values[name] for values in facts.values() if values[name] is not None), None)
            for name in ('background', 'published')
        )
        self.latent_shape = manifest.latent_shape
        lists = {folder: next(iter(splits.values())).class_names for folder, splits in self._manifests.items()}
        self.class_names = _joint_classes(lists, settings.class_names)
        self.prepare = functools.partial(_views, self._reader, self.mirrored)
        self.content = {
            'layout': 'data sets',
            'kind': self.kind,
            **self.facts,
            'latent_shape': list(self.latent_shape),
            **{name: common[name] for name in _RECORDED if name in common},
            'indexes': sorted(file_hash(folder / 'index.json') for folder, _ in self._all()),
        }
        counts = ', '.join(f'{len(names):,} in {folder}' for folder, names in lists.items())
        self.description = (
            f'{len(lists)} data sets of {self.autoencoder or "pixels"}; {len(self.class_names):,} classes of these '
            f'names: {counts}'
        )

    def sources(self, scratch: Path) -> Mapping[str, Source]:
        """All rows of each split, in the order of a conversion: by label and name. Reads every byte."""
        del scratch
        names = sorted({folder.name for folder, _ in self._all()})
        return {name: self._source(name) for name in names}

    def __call__(self, samples_BVKHW: Tensor, split: str, positions: Sequence[int]) -> Encoded:
        """Nothing is left to be done."""
        return lambda: [view_BKHW.numpy() for view_BKHW in samples_BVKHW.unbind(1)]

    @property
    def _reader(self) -> MDSReader:
        """What decodes a row: all shards have the same columns."""
        folder = next(folder for folder, _ in self._all())
        return read_index(folder)[0].reader

    def _all(self) -> Iterator[tuple[Path, Manifest]]:
        """Folder and manifest of every split."""
        for root, splits in self._manifests.items():
            yield from ((root / name, manifest) for name, manifest in splits.items())

    def _source(self, split: str) -> Source:
        members = [(folder, manifest) for folder, manifest in self._all() if folder.name == split]
        for folder, manifest in members:
            check_shards(folder, manifest)
        shards = [shard for folder, _ in members for shard in read_index(folder)]
        labels = {folder: _labels(manifest, self.class_names) for folder, manifest in members}
        images, origins = Images(class_names=self.class_names), dict[str, Path]()
        total = sum(manifest.num_samples for _, manifest in members)
        progress = Progress(f'{split}: reading', total, 'samples')
        for number, shard in enumerate(shards):
            for place, label, name in _rows(shard):
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
        files = IndexedFiles(shard.path for shard in shards)
        source = RangeSource.arranged('data sets', Path(split), images, files=files)
        origin = '; '.join(manifest.source for _, manifest in members)
        source.description = f'{len(members)} data sets, merged: {origin}'
        return source


def _manifests(root: Path) -> dict[str, Manifest]:
    """Of each split of a data set, whose classes are the same."""
    if (root / MANIFEST_NAME).is_file():
        raise UserError(f'{root}: is one split; give the folder of the whole data set, {root.parent}')
    splits = {path.parent.name: Manifest.load(path.parent) for path in sorted(root.glob(f'*/{MANIFEST_NAME}'))}
    record = read_json(root / RECORD)['splits'] if (root / RECORD).is_file() else splits
    undone = [name for name in record if name not in splits]
    if undone or not splits:
        state = f'{", ".join(undone)} not finished' if undone else f'no split with a {MANIFEST_NAME}'
        raise UserError(f'{root}: {state}; run its conversion to the end first')
    _check_equal(
        {
            root / name: {**_facts(root, manifest), 'class_names': manifest.class_names}
            for name, manifest in splits.items()
        }
    )
    return splits


def _published(manifest: Manifest) -> Published | None:
    """The scale and shift that the manifest has not measured."""
    scaling = manifest.scaling
    if scaling is None or scaling.source == 'measured':
        return None
    return Published(scaling.source.removeprefix('published for '), scaling.scale[0], scaling.shift[0])


def _facts(root: Path, manifest: Manifest) -> dict[str, Any]:
    facts = {name: getattr(manifest, name) for name in _FACTS}
    facts['published'] = _published(manifest)
    record = read_json(root / RECORD)['content'] if (root / RECORD).is_file() else {}
    if 'store' in record:  # conversions before 0.2.0 kept the colours and did not say so
        facts['background'] = manifest.background or 'stored'
    return facts | {name: record[name] for name in _RECORDED if name in record}


def _check_equal(facts: Mapping[Path, Mapping[str, Any]]) -> None:
    """Refuse what differs between any two; where one does not say a thing, nothing is compared."""
    lines: list[str] = []
    for key in dict.fromkeys(key for values in facts.values() for key in values):
        answers = [(folder, values[key]) for folder, values in facts.items() if values.get(key) is not None]
        for folder, value in answers[1:]:
            if value != answers[0][1]:
                lines.append(f'  {key}: {answers[0][1]!r} in {answers[0][0]}, {value!r} in {folder}')
    if lines:
        raise UserError('\n'.join(['these data contradict each other, so no run could read them together:', *lines]))


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
    joint = read_class_names(Path(file).expanduser())
    if missing := union - set(joint):
        raise UserError(f'--class-names {file}: lacks {len(missing):,} classes of the data sets: {few(missing)}')
    return joint


def _labels(manifest: Manifest, joint: tuple[str, ...]) -> dict[int, int]:
    """Label of a data set -> label in all."""
    if manifest.class_names == joint:  # names for people may occur twice
        return {label: label for label in range(max(len(joint), 1))}
    label_of = {name: label for label, name in enumerate(joint)}
    return {label: label_of[name] for label, name in enumerate(manifest.class_names)}


def _rows(shard: Shard) -> Iterator[tuple[tuple[int, int], int, str]]:
    """Offset and size, label and name of each row; a shard with a changed byte is refused, not hashed anew."""
    if not shard.path.is_file():
        raise UserError(f'{shard.path}: only its compressed form is here; decompress it (zstd -d) and run again')
    data, faults = read_shard(shard)
    try:
        if faults or data is None:
            raise ValueError(faults[0])
        content = Content(shard, data)
        for number in range(shard.samples):
            row = content.row(number)
            yield content.place(number), int(row[LABEL]), row[NAME]
    except ValueError as error:
        raise UserError(f'{shard.path}: {error}; copy or convert it again (verify.py lists every fault)') from None


def _views(reader: MDSReader, mirrored: bool, row: bytes) -> Sample:
    """The arrays of a row as they are stored, float16 ``[V, K, H, W]``."""
    values = reader.decode_sample(row)
    return Sample(np.stack([values[column] for column in (LATENTS, LATENTS_MIRRORED)[: 1 + mirrored]]))
