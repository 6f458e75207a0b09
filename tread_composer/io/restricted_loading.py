"""What Composer and torch load for a run, without running code that a checkpoint may name.

Composer reads its checkpoints with ``weights_only=False``, and so does torch's reader of sharded ones. A checkpoint may
come from anywhere; ``restricted_loading`` takes that liberty from both.
"""

import contextlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader

from tread_composer.core.errors import UserError
from tread_composer.io.checkpoint_reader import harmless_types, read_checkpoint, refusal

__all__ = ['check_harmless', 'restricted_loading']

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
            raise refusal(str(file), error) from None
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
    try:
        with _forced(), _checked_metadata(), harmless_types():
            yield
    except pickle.UnpicklingError as error:
        raise refusal('the checkpoint', error) from None
    except CheckpointException as error:  # with what each rank has met
        for failure, _ in error.failures.values():
            if isinstance(failure, UserError):
                raise failure from None
            if isinstance(failure, pickle.UnpicklingError):
                raise refusal('the sharded checkpoint', failure) from None
        raise


@contextlib.contextmanager
def _forced() -> Iterator[None]:
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = '1'
    try:
        yield
    finally:
        del os.environ[_FORCE]
        if before is not None:
            os.environ[_FORCE] = before


@contextlib.contextmanager
def _checked_metadata() -> Iterator[None]:
    """``.metadata`` is a plain pickle, which torch has no restricted reader for: checked before each reading."""
    read_metadata = FileSystemReader.read_metadata

    def read_checked(reader: FileSystemReader, *args: Any, **keywords: Any) -> Any:
        check_harmless(reader.path)
        return read_metadata(reader, *args, **keywords)

    FileSystemReader.read_metadata = read_checked  # type: ignore[method-assign]
    try:
        yield
    finally:
        FileSystemReader.read_metadata = read_metadata  # type: ignore[method-assign]
