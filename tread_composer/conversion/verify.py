"""Is a data set what it says it is? Every file, every sample, and the manifest against both.

For after a conversion, a copy or a doubt; training itself only looks at presence, sizes and counts. A fault never hides
the next one: whatever can still be read is read. Memory: one shard, and some 20 bytes for each sample of the split.
Legend: B samples, C latent channels, K stored channels (2C for moments), H x W latent pixels.
"""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from tread_composer.conversion.contents import Content, read_shard, sample_numbers
from tread_composer.conversion.encoding import LOGVAR_RANGE
from tread_composer.core.errors import UserError
from tread_composer.data.columns import LABEL, LATENTS, LATENTS_MIRRORED, NAME, columns
from tread_composer.data.manifest import MANIFEST_NAME, Manifest
from tread_composer.data.shards import Shard, read_index
from tread_composer.io.progress import Progress

__all__ = ['STATISTICS_TOLERANCE', 'verify']

STATISTICS_TOLERANCE = 0.05  # of the standard deviation: the splits of a data set may carry those of `train`
_SUSPICIOUS_SHARE = 0.1  # of mirrored pairs that are equal: a few symmetric images are no fault
_FEW = 10  # samples a class, on average: with more, a class without any is no accident
_CHUNK = 64  # samples that are looked at together
_NO_SAMPLE = np.iinfo(np.int64).min  # a label that cannot be read


def verify(folder: str | Path, *, sample_every: int = 1, say: Callable[[str], None] = print) -> list[str]:
    """Compare a data set with its indexes and manifests, reading every byte.

    Per shard: presence, size, every hash of the index, header. Per sample: can be decoded, finite, log-variance within
    -30..20, label known. Per split: counts, columns, a class without samples (a fault from ten samples a class on),
    equal names, classes in a row in spite of ``permutation_seed``, mean and standard deviation within 5% of a standard
    deviation of the manifest's, mirrored latents that are copies or mirror images of the others (of pixels: that are
    not). Between splits: the same autoencoder, shape, crop and classes.

    Args:
        folder: A data set with splits in it, or one split.
        sample_every: Decode only every so many samples of a shard. Files are still read and hashed as a whole.
        say: Where counts, histograms and progress go, a line at a time.

    Returns:
        The faults, one line each: file, sample in it, what is wrong. Empty if there are none.

    Raises:
        UserError: There is no data set at ``folder``.
    """
    if sample_every < 1:
        raise UserError(f'sample_every: {sample_every} must be at least 1')
    faults, manifests = [], {}
    for split in _splits(Path(folder)):
        check = _SplitCheck(split, sample_every, say)
        faults += check.run()
        if check.manifest is not None:
            manifests[split] = check.manifest
    return faults + _contradictions(manifests)


def _splits(folder: Path) -> list[Path]:
    def is_split(path: Path) -> bool:
        return (path / 'index.json').is_file() or (path / MANIFEST_NAME).is_file()

    if is_split(folder):
        return [folder]
    if not folder.is_dir():
        raise UserError(f'{folder}: no such folder; give that of a data set or of one split')
    splits = sorted(path for path in folder.iterdir() if path.is_dir() and is_split(path))
    if not splits:
        raise UserError(
            f'{folder}: no data set: neither here nor one folder below is an index.json or a {MANIFEST_NAME}. A '
            f'conversion writes them last; if one was interrupted, run it again to finish it'
        )
    return splits


def _contradictions(manifests: dict[Path, Manifest]) -> list[str]:
    """Of all splits with the first: what one run could not read together."""
    if not manifests:
        return []
    (reference_split, reference), *remaining = manifests.items()
    keys = ('kind', 'autoencoder_hash', 'latent_shape', 'resolution', 'crop', 'class_names')
    return [
        f'{split / MANIFEST_NAME}: {key} is not that of {reference_split / MANIFEST_NAME}, so they are not one data set'
        for split, manifest in remaining
        for key in keys
        if getattr(manifest, key) != getattr(reference, key)
    ]


class _SplitCheck:
    """The check of one split: what is known of its samples, and the faults so far."""

    def __init__(self, folder: Path, sample_every: int, say: Callable[[str], None]) -> None:
        self.folder, self.sample_every, self.say = folder, sample_every, say
        self.manifest: Manifest | None = None
        self.faults: list[str] = []

    def run(self) -> list[str]:
        """All checks of one split; the faults in words."""
        try:
            self.manifest = Manifest.load(self.folder)
        except UserError as error:
            self.faults.append(str(error))
        try:
            self.shards = read_index(self.folder)
        except UserError as error:
            return [*self.faults, str(error)]
        total = sum(shard.samples for shard in self.shards)
        self.labels = np.full(total, _NO_SAMPLE, np.int64)
        self.names = np.zeros(total, np.uint64)  # hashes of them: the names of ImageNet would take 100 MB
        self.statistics = _Statistics()
        if self.manifest and total != self.manifest.num_samples:
            self._fault('index.json', f'{total} samples, the manifest has num_samples={self.manifest.num_samples}')
        progress = Progress(str(self.folder), total, 'samples', log=self.say)
        for shard in self.shards:
            data, faults = read_shard(shard)
            self.faults += faults
            if self.manifest is not None:  # else nobody knows what is in the bytes
                self._check_shard(shard, data, self.manifest)
            progress.add(shard.samples)
        self._note_files()
        read = np.flatnonzero(self.labels != _NO_SAMPLE)
        if self.manifest:
            self._note(f'{total:,} samples by the index, {len(read):,} of them read; {self.manifest.source}', '')
            if len(read):
                self._check_labels(self.manifest, self.labels[read])
                self._check_names(read)
                self._check_statistics(self.manifest, len(read))
        return self.faults

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
        numbers = list(range(0, shard.samples, self.sample_every))
        for start in range(0, len(numbers), _CHUNK):
            rows = {}
            for number in numbers[start : start + _CHUNK]:
                try:
                    rows[number] = content.row(number)
                except ValueError as error:
                    problems[str(error)].append(number)
            if rows:
                self._check_rows(shard, rows, manifest, problems)
        for words, positions in problems.items():
            self._fault(name, f'{sample_numbers(positions)}: {words}')

    def _check_rows(self, shard: Shard, rows: dict[int, dict], manifest: Manifest, problems: dict) -> None:
        numbers = np.array(list(rows))
        labels = np.array([row[LABEL] for row in rows.values()], np.int64)
        self.labels[shard.start + numbers] = labels
        self.names[shard.start + numbers] = [xxhash.xxh64_intdigest(row[NAME].encode()) for row in rows.values()]
        in_range = (labels >= 0) & (labels < max(manifest.num_classes, 1))
        for number, label in zip(numbers[~in_range].tolist(), labels[~in_range].tolist(), strict=True):
            problems[f'label {label} is not one of the {manifest.num_classes} classes of the manifest'].append(number)
        latents = {}
        for column in (LATENTS, LATENTS_MIRRORED) if manifest.mirrored else (LATENTS,):
            # Single precision: on a CPU, half precision is several times slower in all that follows.
            stored_BKHW = torch.from_numpy(np.stack([row[column] for row in rows.values()])).float()
            finite_B = torch.stack(stored_BKHW.flatten(1).aminmax(dim=1)).isfinite().all(0)  # NaN is both of them
            if not finite_B.all():
                problems[f'NaN or infinity in {column}'] += numbers[~finite_B.numpy()].tolist()
            if manifest.kind == 'moments':
                low_B, high_B = stored_BKHW[:, manifest.channels :].flatten(1).aminmax(dim=1)
                outside_B = ((low_B < LOGVAR_RANGE[0]) | (high_B > LOGVAR_RANGE[1])) & finite_B
                if outside_B.any():
                    words = f'log-variance outside of {LOGVAR_RANGE[0]:g}..{LOGVAR_RANGE[1]:g} in {column}'
                    problems[words] += numbers[outside_B.numpy()].tolist()
            self.statistics.add(stored_BKHW[finite_B], manifest.channels)
            latents[column] = stored_BKHW
        if manifest.mirrored:
            flipped_B = self.statistics.add_pairs(latents[LATENTS], latents[LATENTS_MIRRORED])
            if manifest.kind == 'pixels' and not flipped_B.all():
                problems[f'{LATENTS_MIRRORED} are not the mirrored pixels'] += numbers[~flipped_B.numpy()].tolist()

    def _note_files(self) -> None:
        """What lies there beside the data, and hashes that are not there: no faults, but worth knowing."""
        listed = {info.basename for shard in self.shards for info in shard.forms}
        present = {str(path.relative_to(self.folder)) for path in self.folder.rglob('*.mds*')}
        if strange := sorted(present - listed):
            self._note(f'{len(strange)} shard files are not in the index, e.g. {strange[0]}')
        if bare := sum(not shard.reader.raw_data.hashes for shard in self.shards):
            self._note(f'the index has no hash of {bare} shards: changed bytes cannot be found')

    def _check_labels(self, manifest: Manifest, labels: np.ndarray) -> None:
        if manifest.num_classes:
            inside = labels[(labels >= 0) & (labels < manifest.num_classes)]
            counts = np.bincount(inside, minlength=manifest.num_classes)
            absent = [f'{label} ({manifest.class_names[label]})' for label in np.flatnonzero(counts == 0)]
            self._note(
                f'{manifest.num_classes} classes with {counts.min()} to {counts.max()} samples, median '
                f'{np.median(counts):g}; {len(absent) or "no"} class{"es" * (len(absent) != 1)} without any',
                '',
            )
            if absent:
                more = f' and {len(absent) - 5} more' if len(absent) > 5 else ''
                words = f'no sample of class {", ".join(absent[:5])}{more}'
                if len(labels) >= _FEW * manifest.num_classes and self.sample_every == 1:
                    self._fault(MANIFEST_NAME, words)
                else:
                    self._note(words)
        place = _in_class_order(labels)
        if manifest.permutation_seed is not None and place:
            self._fault(
                MANIFEST_NAME,
                f'permutation_seed is {manifest.permutation_seed}, but the labels are not mixed: {place}',
            )

    def _check_names(self, read: np.ndarray) -> None:
        values, counts = np.unique(self.names[read], return_counts=True)
        if len(values) == 1 and len(read) > 1:
            self._note('all samples have the same name')
            return
        repeated = values[counts > 1]
        for value in repeated[:_FEW]:
            places, name = [], ''
            for position in read[self.names[read] == value][:3]:
                shard = next(shard for shard in reversed(self.shards) if shard.start <= position)
                places.append(f'{shard.reader.raw_data.basename} sample {position - shard.start}')
                data, _ = read_shard(shard)
                assert data is not None  # it was read a moment ago
                name = Content(shard, data).row(int(position - shard.start))[NAME]
            self._fault(MANIFEST_NAME, f'the same name, {name!r}, of {" and ".join(places)}')
        if len(repeated) > _FEW:
            self._fault(MANIFEST_NAME, f'{len(repeated) - _FEW} more names that stand for several samples')

    def _check_statistics(self, manifest: Manifest, images: int) -> None:
        mean, std = self.statistics.result()
        if not mean:
            return
        # A part of the samples has other statistics than all of them: four standard errors of a mean over images.
        margin = STATISTICS_TOLERANCE + (4 / images**0.5 if self.sample_every > 1 else 0)
        for key, measured, stated in (('mean', mean, manifest.mean), ('std', std, manifest.std)):
            far = [c for c, value in enumerate(stated) if not abs(measured[c] - value) <= margin * manifest.std[c]]
            if far:
                words = ', '.join(f'channel {c} has {measured[c]:.4g}, stated is {stated[c]:.4g}' for c in far[:3])
                more = f' and {len(far) - 3} more channels' if len(far) > 3 else ''
                self._fault(MANIFEST_NAME, f'{key}: {words}{more} (further than {margin:.2f} standard deviations)')
        if manifest.mirrored and manifest.kind != 'pixels':
            pairs = self.statistics.pairs
            for count, words in (
                (self.statistics.equal, 'equal to'),
                (self.statistics.flipped, 'only the flipped arrays of'),
            ):
                if count > _SUSPICIOUS_SHARE * pairs:
                    self._fault(
                        MANIFEST_NAME,
                        f'{count} of {pairs} {LATENTS_MIRRORED} are {words} {LATENTS}, not those of mirrored images',
                    )


class _Statistics:
    """Per channel: mean and standard deviation of the latents (of moments: of their draws); and of mirrored pairs."""

    def __init__(self) -> None:
        self._sums: Tensor | float = 0.0  # of x and of x squared, [2, C]
        self._count = 0
        self.pairs = self.equal = self.flipped = 0

    def add(self, stored_BKHW: Tensor, channels: int) -> None:
        """Take a batch into the sums: means, or latents that are their own."""
        mean, logvar = stored_BKHW[:, :channels], stored_BKHW[:, channels:]
        second = mean.square()
        if logvar.shape[1]:
            second = second + logvar.exp()
        # Sums in double: over 10^9 values single precision would drift by more than the tolerance.
        self._sums = self._sums + torch.stack([mean, second]).sum((3, 4)).double().sum(1)
        self._count += mean.shape[0] * mean.shape[2] * mean.shape[3]

    def add_pairs(self, latents_BKHW: Tensor, mirrored_BKHW: Tensor) -> Tensor:
        """Counts pairs that show that nothing was encoded twice; returns which are flips of one another."""
        flipped_B = (latents_BKHW.flip(-1) == mirrored_BKHW).flatten(1).all(1)
        self.pairs += len(flipped_B)
        self.equal += int((latents_BKHW == mirrored_BKHW).flatten(1).all(1).sum())
        self.flipped += int(flipped_B.sum())
        return flipped_B

    def result(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel; empty if there was no finite sample."""
        if not self._count:
            return [], []
        mean, second = torch.as_tensor(self._sums) / self._count
        return mean.tolist(), (second - mean.square()).clamp(min=0).sqrt().tolist()


def _in_class_order(labels: np.ndarray) -> str:
    """Where more neighbours have the same label than a random order would ever give; '' if nowhere.

    In a random order of these labels, two neighbours are equal with probability ``sum_c n_c (n_c - 1) / (n (n - 1))``.
    """
    count = len(labels)
    if count < 3:
        return ''
    sizes = np.unique(labels, return_counts=True)[1].astype(np.float64)
    chance = float((sizes * (sizes - 1)).sum() / (count * (count - 1)))
    equal = labels[1:] == labels[:-1]
    # All of them, then stretches, which are many: those must be further off before a chance hit can be excluded.
    for length, sigmas in ((len(equal), 5), (1024, 8)):
        for start in range(0, len(equal) - length + 1, length):
            repeats, expected = int(equal[start : start + length].sum()), chance * length
            if repeats > expected + sigmas * (expected * (1 - chance)) ** 0.5 + sigmas:
                return (
                    f'{repeats} of {length} neighbours from sample {start} on are of the same class, '
                    f'{expected:.1f} would be expected'
                )
    return ''
