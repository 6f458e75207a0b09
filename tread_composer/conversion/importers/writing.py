"""Writing other people's latents as a split of ours: raw again, permuted once, whole or not there.

Legend: B samples, K stored channels, C latent channels (K is 2C for moments), H x W latent pixels.
"""

import errno
import glob
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from streaming import MDSWriter
from streaming.base.compression import get_compressions, is_compression

import tread_composer
from tread_composer.conversion.importers.layouts import Layout
from tread_composer.core.errors import UserError
from tread_composer.data.columns import LABEL, LATENTS, LATENTS_MIRRORED, NAME, Kind, columns
from tread_composer.data.manifest import FORMAT_VERSION, Manifest
from tread_composer.io.files import to_disk
from tread_composer.io.locks import locked
from tread_composer.io.progress import Progress

__all__ = ['Facts', 'import_latents']

_CHUNK = 64
_LOGVAR_RANGE = (-30.0, 20.0)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


@dataclass(frozen=True)
class Facts:
    """What the files do not say about themselves.

    Args:
        kind: ``'moments'`` or ``'samples'``.
        autoencoder: As the manifest is to name it.
        autoencoder_hash: ``KL.weight_hash()``.
        resolution: Side of the images in pixels.
        crop: ``'none'`` or ``'center'``.
        class_names: One for each class; empty for data without labels.
        channels: C, if it is known; else it is read off the first sample.
        downsampling: Pixels per latent pixel, if it is known.
        scale: The stored numbers are ``(raw - shift) * scale``; one number, or one for each channel.
        shift: Likewise.
    """

    kind: Kind
    autoencoder: str
    autoencoder_hash: str
    resolution: int
    crop: str
    class_names: tuple[str, ...]
    channels: int | None = None
    downsampling: int | None = None
    scale: tuple[float, ...] = (1.0,)
    shift: tuple[float, ...] = (0.0,)


def import_latents(
    layout: Layout,
    out: Path,
    split: str,
    facts: Facts,
    *,
    seed: int = 0,
    compression: str | None = None,
    say: Callable[[str], None] = print,
) -> Manifest:
    """Write ``out/split``. It is made beside its place and renamed at the end, so it is complete or absent.

    The order is permuted once with ``seed``. Shift and scale are undone: the shards hold raw latents in half precision.

    Args:
        layout: Where the samples are.
        out: Folder of the data set.
        split: Name of the split.
        facts: What the layout does not say.
        seed: Of the permutation.
        compression: As ``MDSWriter`` wants it.
        say: Where progress goes, a line at a time.

    Raises:
        UserError: The split is there already, facts and samples contradict each other, a value is not finite or too
            large for half precision, or the disk is full. Nothing is left behind.
    """
    target = out / split
    if not split or Path(split).name != split or split.startswith('.'):
        raise UserError(f'split {split!r}: the name of a folder is needed, such as train')
    if compression is not None and not is_compression(compression):
        raise UserError(
            f'compression {compression!r} is not known; choose one of {", ".join(sorted(get_compressions()))}'
        )
    shape = _latent_shape(layout, facts)
    labels = _labels(layout, facts, say)
    _refuse_existing(target)
    try:
        out.mkdir(parents=True, exist_ok=True)
        busy = f'{out}: another import is writing this split; wait for it, or stop it'
        with locked(out / f'.{split}.lock', busy):
            _refuse_existing(target)  # another import may have finished in the meantime
            for left_over in out.glob(f'.{glob.escape(split)}.partial-*'):
                shutil.rmtree(left_over)  # of a run that was killed: whoever holds the lock is the only writer
            return _write(layout, target, facts, shape, labels, seed, compression, say)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise UserError(f'{out}: cannot be written ({error}); make room or give leave. Nothing was kept') from error


def _latent_shape(layout: Layout, facts: Facts) -> tuple[int, int, int]:
    """Of the first sample, compared with what is said about all of them."""
    stored = layout.read(0)[0].shape
    name = layout.name(0)
    if len(stored) != 3 or (facts.kind == 'moments' and stored[0] % 2):
        raise UserError(f'{name}: shape {stored} cannot be channels, height, width of {facts.kind}')
    shape = (stored[0] // 2 if facts.kind == 'moments' else stored[0], stored[1], stored[2])
    if facts.channels not in (None, shape[0]):
        hint = ' Twice as many are moments, half as many are samples: is --kind right?' * (
            facts.channels in (2 * shape[0], shape[0] / 2)
        )
        raise UserError(
            f'{name}: shape {stored} as {facts.kind} means {shape[0]} channels, {facts.channels} are stated.{hint}'
        )
    if facts.downsampling is not None and any(side * facts.downsampling != facts.resolution for side in shape[1:]):
        raise UserError(
            f'{name}: {shape[1]} x {shape[2]} latent pixels are {shape[1] * facts.downsampling} pixels a side with '
            f'this autoencoder, which divides by {facts.downsampling}; --resolution {facts.resolution} is not that'
        )
    for key, values in (('--stored-scale', facts.scale), ('--stored-shift', facts.shift)):
        if len(values) not in (1, shape[0]):
            raise UserError(f'{key}: {len(values)} numbers for {shape[0]} channels; give one, or one for each')
    if not all(np.isfinite(facts.scale)) or not all(facts.scale) or not all(np.isfinite(facts.shift)):
        raise UserError(f'--stored-scale {facts.scale}, --stored-shift {facts.shift}: finite, and no scale is zero')
    return shape


def _labels(layout: Layout, facts: Facts, say: Callable[[str], None]) -> np.ndarray:
    classes = len(facts.class_names)
    if not classes:
        say('no classes: the labels of the source are left out')
        return np.zeros_like(layout.labels)
    wrong = np.flatnonzero((layout.labels < 0) | (layout.labels >= classes))
    if len(wrong):
        position = int(wrong[0])
        raise UserError(
            f'{layout.name(position)}: label {layout.labels[position]} with {classes} classes (0..{classes - 1}), and '
            f'{len(wrong) - 1} more like it; is --num-classes right?'
        )
    return layout.labels


def _refuse_existing(target: Path) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f'{target}: is there already and is never overwritten; choose another --out or --split')


def _write(
    layout: Layout,
    target: Path,
    facts: Facts,
    shape: tuple[int, int, int],
    labels: np.ndarray,
    seed: int,
    compression: str | None,
    say: Callable[[str], None],
) -> Manifest:
    encodings = columns(facts.kind, shape, layout.mirrored)
    order = np.random.default_rng(np.random.SeedSequence(seed)).permutation(len(labels))
    partial = Path(tempfile.mkdtemp(prefix=f'.{target.name}.partial-', dir=target.parent))
    try:
        statistics = np.zeros((2, shape[0])), 0
        progress = Progress(str(target), len(order), 'samples', log=say)
        out = str(partial / 'shards')  # the writer wants a folder that is not there
        with MDSWriter(out=out, columns=encodings, compression=compression, hashes=['xxh64']) as writer:
            _refuse_if_full(target.parent, writer, encodings, layout, order, say)
            for start in range(0, len(order), _CHUNK):
                positions = order[start : start + _CHUNK].tolist()
                views = _raw_views(layout, positions, facts, shape)
                statistics = _added(statistics, views, facts.kind)
                for row, position in enumerate(positions):
                    arrays = dict(zip((LATENTS, LATENTS_MIRRORED), (view[row] for view in views), strict=False))
                    writer.write({**arrays, LABEL: int(labels[position]), NAME: layout.name(position)})
                progress.add(len(positions))
        manifest = _manifest(layout, facts, shape, len(order), seed, statistics)
        shards = partial / 'shards'
        manifest.save(shards)
        for path in [*shards.iterdir(), shards]:
            to_disk(path)
        shards.rename(target)
        to_disk(target.parent)
        return manifest
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _refuse_if_full(
    folder: Path, writer: MDSWriter, encodings: dict, layout: Layout, order: np.ndarray, say: Callable[[str], None]
) -> None:
    """Compare the size without compression with what is free: the values of latents hardly compress."""
    fixed = sum(size or 4 for size in writer.column_sizes) + writer.extra_bytes_per_sample
    names = sum(len(layout.name(int(position)).encode()) for position in order[:1000]) / min(len(order), 1000)
    needed, free = int(len(order) * (fixed + names)), shutil.disk_usage(folder).free
    say(f'{len(order):,} samples of {fixed + names:.0f} bytes: {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free')
    if needed > free:
        raise UserError(f'{folder}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; make room')


def _raw_views(layout: Layout, positions: Sequence[int], facts: Facts, shape: tuple[int, int, int]) -> list[np.ndarray]:
    """Raw latents, float16 ``[B, K, H, W]``: of the images, then of their mirror images if there are any."""
    stored = ((2 if facts.kind == 'moments' else 1) * shape[0], *shape[1:])
    rows = [layout.read(position) for position in positions]
    views = []
    for view in range(2 if layout.mirrored else 1):
        arrays = [row[view] for row in rows]
        for array, position in zip(arrays, positions, strict=True):
            if array.shape != stored or array.dtype.kind != 'f':
                raise UserError(
                    f'{layout.name(position)}: {array.dtype} values of shape {array.shape}, the first sample has '
                    f'floats of shape {stored}'
                )
        raw = _raw(np.stack(arrays).astype(np.float32), facts, shape[0])
        with np.errstate(over='ignore'):  # found below
            half = raw.astype(np.float16)
        broken = np.flatnonzero(~np.isfinite(half).all((1, 2, 3)))
        if len(broken):
            name = layout.name(positions[broken[0]])
            raise UserError(
                f'{name}: holds NaN, infinity or raw latents beyond 65504, which half precision cannot hold; if the '
                f'values look healthy, --stored-scale is not right'
            )
        views.append(half)
    return views


def _raw(stored_BKHW: np.ndarray, facts: Facts, channels: int) -> np.ndarray:
    """Undo ``stored = (raw - shift) * scale``; a log-variance moves by the logarithm of the squared scale."""
    scale_C11 = np.asarray(facts.scale, np.float32).reshape(-1, 1, 1)
    shift_C11 = np.asarray(facts.shift, np.float32).reshape(-1, 1, 1)
    mean = stored_BKHW[:, :channels] / scale_C11 + shift_C11
    if facts.kind != 'moments':
        return mean
    logvar = (stored_BKHW[:, channels:] - 2 * np.log(np.abs(scale_C11))).clip(*_LOGVAR_RANGE)
    return np.concatenate([mean, logvar], axis=1)


def _added(sums: tuple[np.ndarray, int], views: list[np.ndarray], kind: str) -> tuple[np.ndarray, int]:
    """Sums of x and of x squared by channel, and the number of values; of moments x is a draw, by expectation."""
    total, count = sums
    for view in views:
        values = view.astype(np.float64)
        mean, logvar = np.split(values, 2, axis=1) if kind == 'moments' else (values, None)
        second = mean**2 if logvar is None else mean**2 + np.exp(logvar)
        total = total + np.stack([mean.sum((0, 2, 3)), second.sum((0, 2, 3))])
        count += mean[:, 0].size
    return total, count


def _manifest(
    layout: Layout,
    facts: Facts,
    shape: tuple[int, int, int],
    samples: int,
    seed: int,
    statistics: tuple[np.ndarray, int],
) -> Manifest:
    (mean, second), count = statistics[0] / statistics[1], statistics[1]
    std = np.sqrt(np.maximum(second - mean**2, 0))
    assert count > 0
    if not std.all():
        raise UserError(f'channel {int(std.argmin())} is the same in all samples; this is no data to train on')
    assert facts.crop in ('none', 'center')
    return Manifest(
        format_version=FORMAT_VERSION,
        kind=facts.kind,
        autoencoder=facts.autoencoder,
        autoencoder_hash=facts.autoencoder_hash,
        channels=shape[0],
        latent_height=shape[1],
        latent_width=shape[2],
        resolution=facts.resolution,
        crop=facts.crop,
        mirrored=layout.mirrored,
        num_samples=samples,
        num_classes=len(facts.class_names),
        class_names=facts.class_names,
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        permutation_seed=seed,
        tool_version=tread_composer.__version__,
        source=f'imported: {layout.description}',
    )
