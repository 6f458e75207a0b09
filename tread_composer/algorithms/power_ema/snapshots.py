"""Snapshots of power-function averages as files: ``PowerEMA`` writes them into a run's folder, ``posthoc`` reads them.

A file holds the averages of all widths at one batch. It names the run and the digest of the snapshot before it, so that
a missing file, one of another run and one of a continuation that was given up are known for what they are.

Source: Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models (EDM2), arXiv 2312.02696,
section 3 and appendix C.
"""

import dataclasses
import itertools
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tread_composer.core.errors import UserError
from tread_composer.io.tensors import TensorDigest, write_tensors

__all__ = ['Snapshot', 'list_snapshots', 'posthoc_width', 'power_exponent', 'read_snapshot', 'write_snapshot']

log = logging.getLogger(__name__)

WIDEST = 12**-0.5
"""Relative standard deviation of the plain mean over the whole run (exponent 0, 0.2887): no average is wider."""

_FORMAT = 'tread_composer power_ema 1'
_KEY = 'snapshot'  # one metadata entry: safetensors writes several in no fixed order, and equal runs have equal files


def power_exponent(width: float) -> float:
    """The exponent gamma of the power-function average whose standard deviation is ``width`` times the run so far.

    The positive root of ``width = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3))``, EDM2 Eq. 123; ``ValueError`` if no
    average has this width.
    """
    if not 0 < width < WIDEST:
        raise ValueError(f'{width!r} is no width: it is a share of the run so far, above 0 and below {WIDEST:.4f}')
    # (gamma + 2)^2 (gamma + 3) = (gamma + 1) / width^2; below WIDEST one root is positive.
    squared = width**-2
    return float(np.roots([1.0, 7.0, 16.0 - squared, 12.0 - squared]).real.max())


def posthoc_width(weights: str) -> float | None:
    """The width that a user names by ``posthoc:0.13``; None for ``ema`` and ``raw``, ``UserError`` if none has it."""
    kind, colon, text = weights.partition(':')
    if kind != 'posthoc' or not colon:
        return None
    try:
        power_exponent(width := float(text))
    except ValueError:
        raise UserError(
            f'weights: {weights!r} names no width; it is a share of the run so far, above 0 and below {WIDEST:.4f}, '
            f'for example posthoc:0.13'
        ) from None
    return width


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What a file says of itself."""

    batch: int  # number of batches that were averaged
    widths: tuple[float, ...]  # relative standard deviations of the averages
    gammas: tuple[float, ...]  # their exponents
    run: str  # its name and the digest of its settings
    previous: str | None  # digest of the snapshot before it; None for the first
    digest: str = ''  # over all tensors and, but for itself, what stands here: so no two snapshots have the same

    def new_digest(self) -> TensorDigest:
        """What the tensors are to be added to, in the order of their names."""
        return TensorDigest(repr(dataclasses.replace(self, digest='')))


def snapshot_path(folder: str | os.PathLike[str], batch: int) -> Path:
    """Where the snapshot of a batch lies."""
    return Path(folder) / f'ba{batch:08d}.safetensors'


def write_snapshot(
    folder: str | os.PathLike[str],
    averages: Mapping[float, Mapping[str, Tensor]],
    *,
    batch: int,
    run: str,
    previous: str | None,
) -> Snapshot:
    """Write the averages of one batch, full tensors by width and parameter's name, unless the same are there already.

    Where the file of this batch holds something else (the run was resumed from an earlier checkpoint and did not repeat
    itself to the bit), that file is kept under another name. ``UserError`` if it is one of another run, or cannot be
    written.
    """
    path = snapshot_path(folder, batch)
    tensors = {f'{width}/{name}': tensor for width, average in averages.items() for name, tensor in average.items()}
    snapshot = Snapshot(batch, tuple(averages), tuple(map(power_exponent, averages)), run, previous)
    digest = snapshot.new_digest()
    for name, tensor in sorted(tensors.items()):
        digest.add(name, tensor)
    snapshot = dataclasses.replace(snapshot, digest=digest.value)
    try:
        if path.exists():
            existing = read_header(path)
            if existing == snapshot:
                return snapshot
            refuse_other_run(existing, run, path)
            names = (path.with_name(f'{path.stem}.given_up{number}.safetensors') for number in itertools.count(1))
            aside = next(name for name in names if not name.exists())
            os.replace(path, aside)
            log.warning(
                'power_ema: the run was resumed from an earlier checkpoint and has come to other averages at batch %d '
                'than before; the old snapshot is kept as %s and not used',
                batch,
                aside,
            )
        write_tensors(path, tensors, {_KEY: json.dumps({'format': _FORMAT, **dataclasses.asdict(snapshot)})})
    except (OSError, SafetensorError) as error:
        raise UserError(f'{path}: this snapshot of the averaged weights cannot be written: {error}') from None
    return snapshot


def refuse_other_run(existing: Snapshot, run: str, path: Path) -> None:
    """Raise ``UserError`` if a snapshot is not one of this run."""
    if existing.run != run:
        raise UserError(
            f'{path}: is a snapshot of another run ({existing.run}), and this one is {run}; take another run_name or '
            f'folder, or move those files away'
        )


def list_snapshots(folder: str | os.PathLike[str]) -> list[tuple[Path, Snapshot]]:
    """All snapshots in a folder by ascending batch, without their tensors and without those that were set aside."""
    paths = sorted(path for path in Path(folder).glob('ba*.safetensors') if path.stem[2:].isdecimal())
    return [(path, read_header(path)) for path in paths]


def read_header(path: str | os.PathLike[str]) -> Snapshot:
    """What a file says of itself; ``UserError`` if it is damaged, or no snapshot."""
    try:
        with safe_open(path, framework='pt') as file:
            header = json.loads((file.metadata() or {}).get(_KEY, '{}'))
        if header.pop('format', None) != _FORMAT:
            raise UserError(f'{path}: is no snapshot of algorithms.power_ema; move it out of this folder')
        widths, gammas = tuple(header['widths']), tuple(header['gammas'])
        return Snapshot(header['batch'], widths, gammas, header['run'], header['previous'], header['digest'])
    except UserError:
        raise
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f'{path}: a damaged snapshot: {error}. Copy it again') from None


def read_snapshot(path: str | os.PathLike[str]) -> Iterator[tuple[float, str, Tensor]]:
    """Width, parameter's name and tensor, one at a time: all of them may not fit into the memory.

    ``UserError``, at the latest behind the last tensor, if the file is damaged: none of them must be used.
    """
    snapshot = read_header(path)
    digest = snapshot.new_digest()
    of_name = {str(width): width for width in snapshot.widths}
    try:
        with safe_open(path, framework='pt') as file:
            for full_name in sorted(file.keys()):
                tensor = file.get_tensor(full_name)
                digest.add(full_name, tensor)
                width, _, name = full_name.partition('/')
                yield of_name[width], name, tensor
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f'{path}: a damaged snapshot: {error}. Copy it again') from None
    if digest.value != snapshot.digest:
        raise UserError(f'{path}: holds something else than was written (its digest differs); copy it again')
