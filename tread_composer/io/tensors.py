"""Safetensors files written in one step, and the digest by which weights are known again."""

import copy
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_map

from tread_composer.io.files import whole_file

__all__ = ['TensorDigest', 'digest_of', 'host_copy', 'write_tensors']


class TensorDigest:
    """The digest of ``digest_of``, tensor by tensor: files may be larger than the memory. ``preface`` counts too."""

    def __init__(self, preface: str = '') -> None:
        self._digest = hashlib.sha256(preface.encode())

    def add(self, name: str, tensor: Tensor) -> None:
        """Take in the next tensor; names must ascend."""
        self._digest.update(f'{name} {tuple(tensor.shape)}'.encode())
        self._digest.update(tensor.detach().float().cpu().contiguous().numpy().data)

    @property
    def value(self) -> str:
        """Of what was taken in so far."""
        return f'sha256:{self._digest.hexdigest()}'


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """``'sha256:...'`` over names, shapes and float32 values: the same for any file, another for other weights."""
    digest = TensorDigest()
    for name, tensor in sorted(tensors.items()):
        digest.add(name, tensor)
    return digest.value


def host_copy(content: Any) -> Any:
    """Nested dicts, lists and tuples, with every tensor copied to the memory of the host and the rest copied deeply."""

    def copied(leaf: Any) -> Any:
        return leaf.detach().to('cpu', copy=True) if isinstance(leaf, Tensor) else copy.deepcopy(leaf)

    return tree_map(copied, content)


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, replacing what is there in one step; makes the folder if it is missing.

    Raises:
        OSError, SafetensorError: It cannot be written; what was there is unchanged.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as unfinished:
        save_file(ready, unfinished, metadata=dict(metadata))
