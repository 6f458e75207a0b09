"""The checkpoints in the folder of a run: which is the newest whole one, and what a killed write left behind.

A checkpoint is a file of ``torch.save`` or, sharded, a folder with files of each rank. Both are written under a name
that begins with ``UNFINISHED`` and renamed when every byte is on the disk, so under its own name a checkpoint is whole
unless the disk itself has changed it. Checksums show that: a file carries those of ``torch.save``, one for each tensor
(all zip archives have them, so those of earlier versions are checked too); a folder has them in ``DIGESTS``.
"""

import contextlib
import errno
import json
import os
import pickle
import re
import shutil
import sys
import zipfile
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch

from tread_composer.core.errors import UserError
from tread_composer.io.checkpoint_reader import read_checkpoint
from tread_composer.io.files import UNFINISHED, file_hash, to_disk

__all__ = [
    'DIGESTS', 'check_whole', 'checkpoints_in', 'damage', 'file_digests', 'find_checkpoint', 'newest_whole', 'point_to',
    'publish', 'remove', 'remove_unfinished', 'set_aside', 'write_digests',
]  # fmt: skip

DIGESTS = 'digests.json'
"""In the folder of a sharded checkpoint: size and sha256 of each of its files."""

_ASIDE = ('.damaged', '.replaced')
_ANY_NAME = (re.compile(r'(?:.*[^a-z])?ba(?P<batch>\d+)(?:\D.*)?'),)
_RUN_FILES = ('config.yaml.', 'data.json.', 'environment.json.')
_LATEST = 'latest-rank0.pt'
_CHUNK = 2**22
_OF_BYTES = (errno.EIO, errno.ENOENT, errno.EINVAL)
"""Errors of the system that are damage: the disk has lost bytes, or a file; a changed offset leads out of a file."""
_DIRECTORY = 0x10  # torch's reader leaves the memory of an entry with this attribute unfilled, without a word


def find_checkpoint(folder: Path) -> Path:
    """The newest whole checkpoint of a run that is one file; damaged ones are passed over with a line on stderr.

    Only reads: it is ``WholeCheckpointSaver`` that sets damaged ones aside, when the run itself starts again.

    Raises:
        UserError: There is none, all are damaged, or the newest is sharded.
    """
    newest, damaged = newest_whole(folder)
    for path, reason in damaged.items():
        print(f'{path}: passed over, it is damaged: {reason}', file=sys.stderr)
    if newest is not None and not newest.is_dir():
        return newest
    if newest is not None:
        raise UserError(
            f'{newest}: a sharded checkpoint, a folder with files of each rank, which only training under FSDP reads. '
            f'Make one file of it, and give that: python -m torch.distributed.checkpoint.format_utils dcp_to_torch '
            f'{newest} {folder / "whole-rank0.pt"} (a run with parallelism_config.fsdp.state_dict_type=full saves one)'
        )
    if damaged:
        lines = '\n'.join(f'  {path.name}: {reason}' for path, reason in damaged.items())
        raise UserError(f'{folder}: each checkpoint in it is damaged. Was it copied to its end?\n{lines}')
    raise UserError(
        f'{folder}: holds no checkpoint (latest-rank0.pt or ep*-ba*-rank0.pt); the run has not saved one yet, or this '
        f'is not the folder of a run. Give the folder with config.yaml, a checkpoint, or an exported .safetensors'
    )


def newest_whole(folder: Path, names: Iterable[re.Pattern[str]] = _ANY_NAME) -> tuple[Path | None, dict[Path, str]]:
    """The checkpoint to go on from, and the damaged ones that are newer, each with what is wrong with it.

    The folder may be missing. ``names`` are what a checkpoint's, without ``.pt``, may match, with a group ``batch``.
    """
    damaged: dict[Path, str] = {}
    for path in checkpoints_in(folder, names):
        reason = damage(path)
        if reason is None:
            return path, damaged
        if path.exists():  # a run that goes on meanwhile removes its oldest
            damaged[path] = reason
    return None, damaged


def checkpoints_in(folder: Path, names: Iterable[re.Pattern[str]] = _ANY_NAME, after: int = -1) -> list[Path]:
    """Checkpoints of batches later than ``after``, by the batch in their name, the newest first, whole or not.

    A ``latest-rank0.pt`` that is no link to one of them is a checkpoint itself, of the batch that it holds: it was
    copied with links followed, or names a file whose name has no batch. If that cannot be read, it comes before all.
    """
    entries: list[tuple[float, bool, Path]] = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith('.') or path.name.endswith(_ASIDE) or not path.exists():
            continue
        match, target = _match(path, names), path.resolve()
        if path.name == _LATEST:
            is_counted = path.is_symlink() and target.parent == folder.resolve() and _match(target, names)
            if not is_counted:
                entries.append((_batch_in(path), path.is_file(), path))
        elif match and (path.is_file() if path.suffix == '.pt' else _is_sharded(path)):
            entries.append((int(match['batch']), path.is_file(), path))
    return [path for batch, _, path in sorted(entries, reverse=True) if batch > after]


def _match(path: Path, names: Iterable[re.Pattern[str]]) -> re.Match[str] | None:
    return next(filter(None, (pattern.fullmatch(path.name.removesuffix('.pt')) for pattern in names)), None)


def _batch_in(path: Path) -> float:
    """The batch that a file was saved at; infinity where only reading all of it would show that, or nothing does."""
    if not path.is_file():
        return float('inf')
    try:
        return int(read_checkpoint(path)['timestamp']['Timestamp']['batch'])
    except (UserError, LookupError, TypeError, ValueError):
        return float('inf')


def _is_sharded(path: Path) -> bool:
    return path.is_dir() and ((path / '.metadata').exists() or any(path.glob('*.distcp')))


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if every byte is as it was written.

    Reads all of it: half a second of computing for each gigabyte, and what the disk takes.

    Raises:
        UserError: It cannot be read now, which says nothing of its bytes: no leave, no memory, no answer of a server.
    """
    try:
        return _damage_of_folder(path) if path.is_dir() else _damage_of_file(path)
    except Exception as error:  # changed bytes make the readers of an archive raise nearly anything
        hindrance = _hindrance(error)
        if hindrance is None:
            return f'it cannot be read ({str(error) or type(error).__name__})'
        raise UserError(
            f'{path}: cannot be read now: {hindrance}; nothing was renamed. Put that right (leave to read, memory, '
            f'open files, the disk or its server), then run the same command again'
        ) from error


def _hindrance(error: BaseException) -> str | None:
    """What kept a file from being read, if that was not its bytes."""
    if isinstance(error, OSError):
        return None if error.errno in _OF_BYTES else str(error)
    if isinstance(error, MemoryError):
        return 'there is not enough memory'
    if isinstance(error, zipfile.BadZipFile) and isinstance(error.__context__, OSError):
        return _hindrance(error.__context__)  # `zipfile` takes an error of the disk at the end of a file for no archive
    # torch and threads raise it with the words of the system, without its number.
    words = [os.strerror(code) for code in errno.errorcode if code not in _OF_BYTES]
    text = str(error)
    if isinstance(error, RuntimeError) and any(word in text for word in (*words, 'unable to mmap', "can't start new")):
        return text.splitlines()[0]
    return None


def check_whole(path: Path) -> Path:
    """The path itself; ``UserError`` if what is there is damaged, or no checkpoint."""
    reason = damage(path)
    if reason is not None:
        raise UserError(f'{path}: damaged, or no checkpoint: {reason}. Was it copied to its end?')
    return path


def _damage_of_file(path: Path) -> str | None:
    with contextlib.ExitStack() as stack:
        try:  # not `is_zipfile`: to that, a file which cannot be opened is none
            archive = stack.enter_context(zipfile.ZipFile(path))
        except zipfile.BadZipFile as error:
            if _hindrance(error) is not None:
                raise
            return f'it is cut off, or no file of torch.save ({path.stat().st_size:,} bytes)'
        if not any(name.endswith('/data.pkl') for name in archive.namelist()):
            return 'it is an archive, but none of torch.save'
        # Entry by entry: `testzip` goes by name, and a changed name can be that of a neighbour, which it reads twice.
        for entry in archive.infolist():
            if entry.external_attr & _DIRECTORY:
                return f'bytes have changed since it was written ({entry.filename} says that it is a folder)'
            try:
                with archive.open(entry) as part:
                    while part.read(_CHUNK):
                        pass
            except zipfile.BadZipFile as error:
                return f'bytes have changed since it was written ({error})'
    with contextlib.suppress(pickle.UnpicklingError):  # whole, but it holds what only Composer reads
        # Bytes between the parts have no checksum, and torch is stricter about them. Mapped: no tensor is read again.
        torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    return None


def _damage_of_folder(path: Path) -> str | None:
    # torch's writer renames it into place last, when each rank has written its files.
    if not (path / '.metadata').is_file():
        return 'it has no .metadata: not all ranks have written their files'
    if not (path / DIGESTS).exists():  # saved before these were written: that it is complete is all that can be seen
        return None
    digests = json.loads((path / DIGESTS).read_text())
    present = file_digests(path, [name for name in digests if (path / name).is_file()])
    different = sorted(name for name in digests if digests[name] != present.get(name))
    return f'{different[0]} is missing or has changed since it was written' if different else None


def file_digests(folder: Path, names: Collection[str]) -> dict[str, str]:
    """``'<bytes>:sha256:...'`` of files in a folder; four at once, as hashing leaves the interpreter free."""

    def digest_of(name: str) -> str:
        return f'{(folder / name).stat().st_size}:{file_hash(folder / name)}'

    with ThreadPoolExecutor(4) as pool:
        return dict(zip(names, pool.map(digest_of, names), strict=True))


def write_digests(folder: Path, digests: Mapping[str, str]) -> None:
    """Write ``DIGESTS`` into the folder of a sharded checkpoint that is still unfinished."""
    (folder / DIGESTS).write_text(json.dumps(digests, indent=1, sort_keys=True))
    to_disk(folder / DIGESTS)
    to_disk(folder)


def publish(unfinished: Path, path: Path) -> None:
    """Give a checkpoint, of which every byte is on the disk, its name."""
    if path.is_dir():  # only with save_overwrite: a folder cannot take the place of a full one
        remove(path)
    os.replace(unfinished, path)
    to_disk(path.parent)


def point_to(link: Path, path: Path) -> None:
    """Make ``link`` name a checkpoint beside it, in one step: there is no moment without a latest checkpoint."""
    target = os.path.relpath(path, link.parent)
    if link.is_symlink() and os.readlink(link) == target:
        return
    beside = link.with_name(f'{UNFINISHED}{link.name}')
    beside.unlink(missing_ok=True)
    beside.symlink_to(target)
    if link.is_dir() and not link.is_symlink():  # a sharded checkpoint, copied with links followed
        set_aside(link, '.replaced')
    os.replace(beside, link)
    to_disk(link.parent)


def remove(path: Path) -> None:
    """Delete a checkpoint; a folder loses its name first, so that half of one never looks like a checkpoint."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    leaving = path.with_name(f'{UNFINISHED}{path.name}-removed')
    os.replace(path, leaving)
    shutil.rmtree(leaving)


def set_aside(path: Path, ending: Literal['.damaged', '.replaced'] = '.damaged') -> Path:
    """Rename a checkpoint so that it is none any more, and return its new name. It is not deleted."""
    # The same batch may be set aside twice.
    names = (path.with_name(f'{path.name}{number}{ending}') for number in ('', *(f'.{n}' for n in range(2, 10_000))))
    aside = next(name for name in names if not os.path.lexists(name))
    os.replace(path, aside)
    return aside


def remove_unfinished(folder: Path) -> list[Path]:
    """Delete what a killed run left of its checkpoints, their link and its files, and say what that was.

    What sampling, evaluation or an export is writing in the folder meanwhile has such a name too, and stays. Only
    while no other process trains there.
    """
    leftovers = sorted(path for path in folder.glob(f'{UNFINISHED}*') if _is_of_the_run(path))
    for path in leftovers:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return leftovers


def _is_of_the_run(path: Path) -> bool:
    name = path.name.removeprefix(UNFINISHED)
    if path.is_symlink() or path.suffix == '.pt':  # `whole_file` makes no links, and puts letters behind the name
        return True
    return _match(Path(name), _ANY_NAME) is not None if path.is_dir() else name.startswith(_RUN_FILES)
