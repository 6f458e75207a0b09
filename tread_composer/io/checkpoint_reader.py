"""Checkpoints, read without running what a pickle may hold: by us, and by Composer and torch within a run.

A pickle is a program. torch's restricted reader makes tensors, plain values and the few harmless types below, and
refuses whatever else a file names. Composer reads its checkpoints with ``weights_only=False``, and so does torch's
reader of sharded ones; a checkpoint may come from anywhere, and ``restricted_loading`` takes that liberty from both.
"""

import argparse
import contextlib
import datetime
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.torch_version import TorchVersion

from tread_composer.core.errors import UserError, first_line

__all__ = ['check_harmless', 'read_checkpoint', 'read_pickled', 'restricted_loading']

# Besides tensors and plain values: what times of Composer's clock, numpy's generator and versions are made of; in
# checkpoints of DiT and SiT, the words of their command line.
_HARMLESS = [
    argparse.Namespace,
    datetime.timedelta,
    TorchVersion,
    np.ndarray,
    np.dtype,
    # What rebuilds arrays and numbers: their module has another name in older versions of numpy.
    np.zeros(0).__reduce__()[0],  # type: ignore[index]
    np.float64(0).__reduce__()[0],  # type: ignore[index]
    *(type(np.dtype(name)) for name in ('bool', 'uint8', 'int32', 'uint32', 'int64', 'uint64', 'float32', 'float64')),
]
_FORCE = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'  # torch's own switch: it outweighs `weights_only=False` of any caller
_METADATA = 'torch.distributed.checkpoint.metadata'
# What torch writes into the `.metadata` of a sharded checkpoint, besides the names of dtypes.
_DESCRIPTIONS = {
    ('pathlib', 'PosixPath'),
    ('torch', 'Size'),
    ('torch.serialization', '_get_layout'),
    ('torch.distributed.checkpoint.filesystem', '_StorageInfo'),
    (_METADATA, 'BytesStorageMetadata'),
    (_METADATA, 'ChunkStorageMetadata'),
    (_METADATA, 'Metadata'),
    (_METADATA, 'MetadataIndex'),
    (_METADATA, 'StorageMeta'),
    (_METADATA, 'TensorProperties'),
    (_METADATA, 'TensorStorageMetadata'),
    (_METADATA, '_MEM_FORMAT_ENCODING'),
}


def _harmless_types() -> torch.serialization.safe_globals:
    # At its end torch forgets what it was given, even if somebody else has allowed that before.
    allowed = torch.serialization.get_safe_globals()
    return torch.serialization.safe_globals([kind for kind in _HARMLESS if kind not in allowed])


def read_pickled(path: str | os.PathLike[str]) -> Any:
    """Read a file of ``torch.save`` on the CPU, without running code that it may name.

    Raises:
        UserError: It cannot be read, is cut off or no such file, or holds objects that only running code could make.
    """
    try:
        with _harmless_types():
            # Mapped: of a checkpoint's optimizer and weights only what is taken out is ever read from the disk.
            return torch.load(path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise UserError(f'{path}: there is no such file; give the path of a checkpoint') from None
    except pickle.UnpicklingError as error:
        raise _refusal(str(path), error) from None
    except Exception as error:  # a damaged file sends the unpickler anywhere: IndexError, AttributeError, struct.error
        text = f'{path}: cannot be read as a file of torch.save: {first_line(error)}. Was it copied to its end?'
        raise UserError(text) from None


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """``state`` of a checkpoint of Composer; ``UserError`` as ``read_pickled``, or if the file is of something else."""
    content = read_pickled(path)
    state = content.get('state') if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not isinstance(state.get('model'), Mapping):
        raise UserError(
            f'{path}: no checkpoint of a run (it has no state/model). Weights of another project: '
            f'python -m tread_composer import'
        )
    return dict(state)


def check_harmless(path: str | os.PathLike[str]) -> None:
    """Refuse a checkpoint, file or folder, that only running code could read.

    Of a sharded one the description of its tensors is checked; ``restricted_loading`` guards the rest.

    Raises:
        UserError: As ``read_checkpoint``, or ``.metadata`` names anything but descriptions of tensors.
    """
    if not os.path.isdir(path):
        read_checkpoint(path)
        return
    for file in sorted(Path(path).glob('*.metadata')):  # newer versions of torch may write one for each rank
        try:
            with open(file, 'rb') as stream:
                _Descriptions(stream).load()
        except pickle.UnpicklingError as error:
            raise _refusal(str(file), error) from None
        except Exception as error:  # damaged bytes send an unpickler anywhere
            text = str(error) or type(error).__name__
            raise UserError(f'{file}: no metadata of a sharded checkpoint, or damaged: {text}') from None


class _Descriptions(pickle.Unpickler):
    """Knows nothing but what describes tensors and where they lie."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == 'torch' and isinstance(vars(torch).get(name), torch.dtype)
        # Only the pair as a whole: `os.mkdir` is a name in that module of torch too, by the dots of protocol 4.
        if is_dtype or (module, name) in _DESCRIPTIONS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f'GLOBAL {module}.{name}')


@contextlib.contextmanager
def restricted_loading() -> Iterator[None]:
    """Within it nothing that calls ``torch.load`` or reads a sharded checkpoint runs code of a file.

    A part of the user's own that saves objects of its own class names it with
    ``torch.serialization.add_safe_globals``, which counts here too.

    Raises:
        UserError: A file would have run code; nothing was run.
    """
    forced, read_metadata = os.environ.get(_FORCE), FileSystemReader.read_metadata

    def read_checked(reader: FileSystemReader, *args: Any, **keywords: Any) -> Any:
        check_harmless(reader.path)  # a plain pickle, which torch has no restricted reader for
        return read_metadata(reader, *args, **keywords)

    os.environ[_FORCE] = '1'
    FileSystemReader.read_metadata = read_checked  # type: ignore[method-assign]
    try:
        with _harmless_types():
            yield
    except pickle.UnpicklingError as error:
        raise _refusal('the checkpoint', error) from None
    except CheckpointException as error:  # with what each rank has met
        for failure, _ in error.failures.values():
            if isinstance(failure, UserError):
                raise failure from None
            if isinstance(failure, pickle.UnpicklingError):
                raise _refusal('the sharded checkpoint', failure) from None
        raise
    finally:
        FileSystemReader.read_metadata = read_metadata  # type: ignore[method-assign]
        del os.environ[_FORCE]
        if forced is not None:
            os.environ[_FORCE] = forced


def _refusal(source: str, error: pickle.UnpicklingError) -> UserError:
    """The restricted reader's error in words; it names the class or function that the file asks for."""
    named = re.search(r'GLOBAL ([\w.]+)', str(error))
    if named is None:
        return UserError(f'{source}: no file of torch.save, or a damaged one: {first_line(error)}')
    return UserError(
        f'{source}: refused: to read {named[1]} out of it could run code, and weights need no such thing. Nothing '
        f'was run. If you trust the file, save its tensors again in a process of your own: torch.save({{name: '
        f'tensor, ...}})'
    )
