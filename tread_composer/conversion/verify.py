"""Is a data set what it says it is? Every file, every sample, and the manifest against both.

For after a conversion, a copy or a doubt; training itself only looks at presence, sizes and counts. A fault never hides
the next one: whatever can still be read is read. Memory: one shard, and labels and names of the split.
Legend: B samples, C latent channels, K stored channels (2C for moments), H x W latent pixels.
"""

import contextlib
import itertools
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from streaming.base.storage.download import CloudDownloader

from tread_composer.conversion.contents import LOGVAR_RANGE, Content, channel_sums, read_shard
from tread_composer.conversion.destination import RECORD, read_record
from tread_composer.conversion.settings import is_remote
from tread_composer.conversion.sources.source import few
from tread_composer.conversion.splits import PART_FILE
from tread_composer.core.errors import UserError
from tread_composer.data.checks import fetch_descriptions
from tread_composer.data.columns import LABEL, LATENTS, LATENTS_MIRRORED, NAME, columns
from tread_composer.data.manifest import MANIFEST_NAME, Manifest, contradictions
from tread_composer.data.shards import Shard, read_index
from tread_composer.io.progress import Progress

__all__ = ['STATISTICS_TOLERANCE', 'verify']

_COMMON = ('kind', 'autoencoder_hash', 'latent_shape', 'resolution', 'crop', 'class_names')  # to all splits
STATISTICS_TOLERANCE = 0.05  # of the standard deviation: the splits of a data set may carry those of `train`
_SUSPICIOUS_SHARE = 0.1  # of mirrored pairs that are equal
_ASYMMETRY = 0.3  # of the standard deviation, by which a latent differs from its flipped array: else its image may be
# plain or symmetric, and that of the mirror image is rightly the same
_FEW = 10  # samples a class, on average: with more, a class without any is no accident
_CHUNK = 64  # samples that are looked at together


def verify(folder: str | Path, *, say: Callable[[str], None] = print) -> list[str]:
    """Compare a data set with its indexes and manifests, reading every byte.

    Per shard: presence, size, every hash of the index, header. Per sample: can be decoded, finite, log-variance within
    -30..20, label known. Per split: counts, columns, a class without samples (a fault from ten samples a class on, but
    not of ``val``, which may miss a rare one), equal names, classes in a row in spite of ``permutation_seed``, mean and
    standard deviation within 5% of a standard deviation, mirrored latents that are copies or mirror images of the
    others (of pixels: that are not). Between splits: the same autoencoder, shape, crop and classes. Of a conversion:
    all of its splits.

    Args:
        folder: A data set with splits in it, or one split; or the URL of one, whose shards are fetched one by one.
        say: Where counts, histograms and progress go, a line at a time.

    Returns:
        The faults, one line each: file, sample in it, what is wrong. Empty if there are none.

    Raises:
        UserError: There is no data set at ``folder``.
    """
    place = str(folder).removeprefix('file://')
    with tempfile.TemporaryDirectory() as scratch:
        splits = _fetched_splits(place.rstrip('/'), Path(scratch)) if is_remote(place) else _splits(Path(place))

        def at_home(text: str) -> str:
            for split, url in splits.items():
                text = text.replace(str(split), url or str(split))
            return text

        faults, facts = [], {}
        for split, url in splits.items():
            check = _SplitCheck(split, lambda line: say(at_home(line)), url)
            faults += check.run()
            if check.manifest is not None:
                facts[split / MANIFEST_NAME] = {name: getattr(check.manifest, name) for name in _COMMON}
        faults += contradictions(facts)
        faults += _unfinished(place, splits, Path(scratch) / 'record')
        return [at_home(fault) for fault in faults]


def _unfinished(place: str, splits: Iterable[Path], scratch: Path) -> list[str]:
    """Splits that a conversion has begun at this place and that are not among those which can be checked."""
    folder = Path(place)
    if is_remote(place):
        folder, url = scratch, f'{place.rstrip("/")}/{RECORD}'
        scratch.mkdir()
        with contextlib.suppress(Exception):  # each of the clouds has its own; data of other tools have no record
            CloudDownloader.get(url).download(url, str(scratch / RECORD), timeout=60)
    record, present = read_record(folder) or {'splits': {}}, {split.name for split in splits}
    return [
        f'{name}: {os.path.join(place, RECORD)} names this split, and it is not finished or not here. Run the '
        f'conversion again to finish it, or copy the data completely'
        for name in record['splits']
        if name not in present
    ]


def _fetched_splits(url: str, scratch: Path) -> dict[Path, str]:
    """Local folders with the descriptions of the splits at a URL, or of the split that it is itself."""
    splits, problems = {}, []
    for name in ('train', 'val', ''):
        address = f'{url}/{name}' if name else url
        if name or not splits:
            try:
                fetch_descriptions(address, scratch / (name or Path(url).name))
                splits[scratch / (name or Path(url).name)] = address
            except UserError as error:
                problems.append(str(error))
    if not splits:
        raise UserError('\n'.join([f'{url}: no data set: neither in train/ or val/ nor here', *problems]))
    return splits


def _splits(folder: Path) -> dict[Path, str]:
    def is_split(path: Path) -> bool:
        return (path / 'index.json').is_file() or (path / MANIFEST_NAME).is_file()

    if is_split(folder):
        return {folder: ''}
    if not folder.is_dir():
        raise UserError(f'{folder}: no such folder; give that of a data set or of one split')
    splits = sorted(path for path in folder.iterdir() if path.is_dir() and is_split(path))
    if not splits:
        raise UserError(
            f'{folder}: no data set: neither here nor one folder below is an index.json or a {MANIFEST_NAME}. A '
            f'conversion writes them last; if one was interrupted, run it again to finish it'
        )
    return dict.fromkeys(splits, '')


class _SplitCheck:
    """The check of one split: what is known of its samples, and the faults so far."""

    def __init__(self, folder: Path, say: Callable[[str], None], url: str) -> None:
        self.folder, self.say, self.url = folder, say, url
        self.manifest: Manifest | None = None
        self.faults: list[str] = []
        # Of the samples that can be read, in their order.
        self.labels: list[int] = []
        self.names: list[str] = []
        self.sums: Any = 0.0  # of x and of x squared, [2, C]
        self.values = 0
        self.pairs: Counter[str] = Counter()  # of an image and its mirror image
        self.damaged_parts: set[str] = set()  # of a conversion, which makes them anew

    def run(self) -> list[str]:
        """All checks of one split; the faults in words."""
        try:
            self.manifest = Manifest.load(self.folder)
        except UserError as error:
            self.faults.append(str(error))
        try:
            shards = read_index(self.folder)
        except UserError as error:
            return [*self.faults, str(error)]
        total = sum(shard.samples for shard in shards)
        if self.manifest and total != self.manifest.num_samples:
            self._fault('index.json', f'{total} samples, the manifest has num_samples={self.manifest.num_samples}')
        progress = Progress(str(self.folder), total, 'samples', log=self.say)
        for shard in shards:
            data, faults = self._read(shard)
            self.faults += faults
            if faults and (shard.path.parent / PART_FILE).is_file():
                self.damaged_parts.add(str(shard.path.parent))
            if self.manifest is not None:  # else nobody knows what is in the bytes
                self._check_shard(shard, data, self.manifest)
            progress.add(shard.samples)
        self._note_files(shards)
        if self.damaged_parts:
            self._note(
                f'{len(self.damaged_parts)} parts are damaged: {few(self.damaged_parts)}. Remove these folders and run '
                f'the conversion again: it makes only them anew'
            )
        if self.manifest:
            self._note(f'{total:,} samples by the index, {len(self.labels):,} of them read; {self.manifest.source}', '')
            if self.labels:
                self._check_labels(self.manifest, np.array(self.labels))
                self._check_names()
            if self.values:
                self._check_statistics(self.manifest)
        return self.faults

    def _read(self, shard: Shard) -> tuple[bytes | None, list[str]]:
        if not self.url:
            return read_shard(shard)
        form = shard.reader.zip_data or shard.reader.raw_data  # as it was uploaded
        path = shard.folder / form.basename
        path.parent.mkdir(exist_ok=True)
        try:
            url = f'{self.url}/{form.basename}'
            CloudDownloader.get(url).download(url, str(path), timeout=600)
        except Exception as error:  # each of the clouds has its own
            return None, [f'{path}: cannot be fetched: {error}']
        try:
            return read_shard(shard)
        finally:
            path.unlink()

    def _fault(self, file: str, words: str) -> None:
        self.faults.append(f'{self.folder / file}: {words}')

    def _note(self, words: str, kind: str = 'note: ') -> None:
        self.say(f'{self.folder}: {kind}{words}')

    def _check_shard(self, shard: Shard, data: bytes | None, manifest: Manifest) -> None:
        name = shard.reader.raw_data.basename
        expected = columns(manifest.kind, manifest.latent_shape, manifest.mirrored)
        if shard.encodings != expected:  # decoding foreign columns could even mean running a pickle
            self._fault(name, f'its columns are {shard.encodings}, the manifest describes {expected}; not read')
            return
        if data is None:
            return
        try:
            content = Content(shard, data)
        except ValueError as error:
            self._fault(name, f'{error}; its samples cannot be found')
            return
        problems: dict[str, list[int]] = defaultdict(list)
        for start in range(0, shard.samples, _CHUNK):
            rows = {}
            for number in range(start, min(start + _CHUNK, shard.samples)):
                try:
                    rows[number] = content.row(number)
                except ValueError as error:
                    problems[str(error)].append(number)
            if rows:
                self._check_rows(rows, manifest, problems)
        for words, numbers in problems.items():
            self._fault(name, f'{_sample_numbers(numbers)}: {words}')

    def _check_rows(self, rows: dict[int, dict], manifest: Manifest, problems: dict[str, list[int]]) -> None:
        numbers = np.array(list(rows))

        def report(words: str, wrong_B: Any) -> None:
            if wrong_B.any():
                problems[words] += numbers[wrong_B].tolist()

        labels = [int(row[LABEL]) for row in rows.values()]
        self.labels += labels
        self.names += [row[NAME] for row in rows.values()]
        for label in {label for label in labels if not 0 <= label < max(manifest.num_classes, 1)}:
            words = f'label {label} is not one of the {manifest.num_classes} classes of the manifest'
            report(words, np.array([value == label for value in labels]))
        latents = {}
        for column in (LATENTS, LATENTS_MIRRORED) if manifest.mirrored else (LATENTS,):
            # Single precision: on a CPU, half precision is several times slower in all that follows.
            latents[column] = stored_BKHW = np.stack([row[column] for row in rows.values()]).astype(np.float32)
            finite_B = np.isfinite(stored_BKHW).all(axis=(1, 2, 3))
            report(f'NaN or infinity in {column}', ~finite_B)
            logvar_BCHW, (low, high) = stored_BKHW[:, manifest.channels :], LOGVAR_RANGE  # only moments have such
            outside_B = ((logvar_BCHW < low) | (logvar_BCHW > high)).any(axis=(1, 2, 3))
            report(f'log-variance outside of {low:g}..{high:g} in {column}', outside_B & finite_B)
            self.sums = self.sums + channel_sums(stored_BKHW[finite_B], manifest.kind).sum(axis=0)
            self.values += int(finite_B.sum()) * stored_BKHW.shape[2] * stored_BKHW.shape[3]
        if manifest.mirrored:
            mirrored = latents[LATENTS_MIRRORED]
            flipped_B = (latents[LATENTS][..., ::-1] == mirrored).all(axis=(1, 2, 3))
            equal_B = (latents[LATENTS] == mirrored).all(axis=(1, 2, 3))
            # Of symmetric images all of these are right, so they are left out.
            means_BCHW = np.nan_to_num(latents[LATENTS][:, : manifest.channels], posinf=0, neginf=0)
            difference_BCHW = (means_BCHW - means_BCHW[..., ::-1]) / np.reshape(manifest.std, (-1, 1, 1))
            lopsided_B = np.sqrt((difference_BCHW**2).mean(axis=(1, 2, 3))) > _ASYMMETRY
            equal, flipped = int((equal_B & lopsided_B).sum()), int((flipped_B & lopsided_B).sum())
            self.pairs.update(all=int(lopsided_B.sum()), equal=equal, flipped=flipped)
            if manifest.kind == 'pixels':
                report(f'{LATENTS_MIRRORED} are not the mirrored pixels', ~flipped_B)

    def _note_files(self, shards: list[Shard]) -> None:
        """No faults, but worth knowing."""
        listed = {info.basename for shard in shards for info in shard.forms}
        present = {str(path.relative_to(self.folder)) for path in self.folder.rglob('*.mds*')}
        if strange := sorted(present - listed):
            self._note(f'{len(strange)} shard files are not in the index, e.g. {strange[0]}')
        if bare := sum(not shard.reader.raw_data.hashes for shard in shards):
            self._note(f'the index has no hash of {bare} shards: changed bytes cannot be found')

    def _check_labels(self, manifest: Manifest, labels: np.ndarray) -> None:
        if manifest.num_classes:
            inside = labels[(labels >= 0) & (labels < manifest.num_classes)]
            counts = np.bincount(inside, minlength=manifest.num_classes)
            absent = [f'{label} ({manifest.class_names[label]})' for label in np.flatnonzero(counts == 0)]
            spread = f'{counts.min()} to {counts.max()} samples, median {np.median(counts):g}'
            without = f'{len(absent) or "no"} class{"es" * (len(absent) != 1)} without any'
            self._note(f'{manifest.num_classes} classes with {spread}; {without}', '')
            if absent:
                more = f' and {len(absent) - 5} more' if len(absent) > 5 else ''
                words = f'no sample of class {", ".join(absent[:5])}{more}'
                if len(labels) >= _FEW * manifest.num_classes and self.folder.name != 'val':
                    self._fault(MANIFEST_NAME, words)
                else:
                    self._note(words)
        if manifest.permutation_seed is not None and (place := _in_class_order(labels)):
            words = f'permutation_seed is {manifest.permutation_seed}, but the labels are not mixed: {place}'
            self._fault(MANIFEST_NAME, words)

    def _check_names(self) -> None:
        counts = Counter(self.names)
        repeated = [name for name, count in counts.items() if count > 1]
        if len(counts) == 1 and repeated:
            self._note('all samples have the same name')
        elif repeated:
            words = f'{len(repeated)} names stand for several samples, such as {repeated[0]!r}'
            self._fault(MANIFEST_NAME, f'{words} for {counts[repeated[0]]}')

    def _check_statistics(self, manifest: Manifest) -> None:
        mean, second = self.sums / self.values
        std = np.sqrt(np.maximum(second - mean**2, 0))
        for key, measured, stated in (('mean', mean, manifest.mean), ('std', std, manifest.std)):
            is_near = np.abs(measured - stated) <= STATISTICS_TOLERANCE * np.array(manifest.std)
            for channel in np.flatnonzero(~is_near)[:1]:
                values = f'channel {channel} has {measured[channel]:.4g}, stated is {stated[channel]:.4g}'
                share = f'{sum(~is_near)} channels are off by more than {STATISTICS_TOLERANCE:.2f} standard deviations'
                self._fault(MANIFEST_NAME, f'{key}: {values}; {share}')
        if manifest.mirrored and manifest.kind != 'pixels':
            for kind, words in (('equal', 'equal to'), ('flipped', 'only the flipped arrays of')):
                if self.pairs[kind] > _SUSPICIOUS_SHARE * self.pairs['all']:
                    share = f'{self.pairs[kind]} of {self.pairs["all"]} {LATENTS_MIRRORED}'
                    self._fault(MANIFEST_NAME, f'{share} are {words} {LATENTS}, not those of mirrored images')


def _sample_numbers(numbers: list[int]) -> str:
    """``'sample 4'``, ``'samples 1, 5-9'``: all of them, in little room."""
    words = []
    for _, run in itertools.groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0]):
        begin, *_, end = [number for _, number in run] * 2  # one number is both
        words.append(str(begin) if begin == end else f'{begin}-{end}')
    return f'sample{"s" if len(numbers) > 1 else ""} {", ".join(words)}'


def _in_class_order(labels: np.ndarray) -> str:
    """Whether more neighbours have the same label than a random order would ever give; '' if not.

    In a random order of these labels, two neighbours are equal with probability ``sum_c n_c (n_c - 1) / (n (n - 1))``.
    """
    count = len(labels)
    if count < 3:
        return ''
    sizes = np.unique(labels, return_counts=True)[1].astype(np.float64)
    chance = float((sizes * (sizes - 1)).sum() / (count * (count - 1)))
    repeats, expected = int((labels[1:] == labels[:-1]).sum()), chance * (count - 1)
    if repeats <= expected + 5 * (expected * (1 - chance)) ** 0.5 + 5:
        return ''
    return f'{repeats} of {count - 1} neighbours are of the same class, {expected:.1f} would be expected'
