"""Autoencoders in files of weights alone, and the one door to those of every form.

A file says nothing about its architecture, which is read off names and shapes of its tensors.
"""

import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tread_composer.autoencoders.folder import Folder
from tread_composer.autoencoders.ldm import ldm_network
from tread_composer.autoencoders.pretrained import Pretrained
from tread_composer.autoencoders.taesd import taesd_network, taesd_part
from tread_composer.core.errors import UserError
from tread_composer.io.checkpoint_reader import read_pickled

__all__ = ['File', 'open_autoencoder']

_SUFFIXES = ('.safetensors', '.pt', '.pth', '.ckpt', '.bin')


class File(Pretrained):
    """A frozen autoencoder from one file of the latent-diffusion layout, or from two of the taesd repository.

    The file is ``.safetensors``, or of ``torch.save`` (read without running code that it may name). The tensors may
    stand under ``state_dict`` or ``model``. Of an encoder's file the decoder's lies beside it, under the same name with
    ``decoder`` in place of ``encoder``; either may be named.

    Raises:
        UserError: On first use: no such file, other contents, or a tensor that is missing, left over or of another
            shape than the rest asks for; names it.
    """

    def weight_file(self) -> Path | None:
        """The file; of a pair the encoder's."""
        path = Path(self.path)
        return _half(path, 'encoder') if type(self.network).__name__ == 'TAESD' else path

    def _load(self) -> Any:
        path, tensors = Path(self.path), _read(self.path)
        if taesd_part(tensors) is None:
            return ldm_network(tensors, self.path)
        halves = {}
        for part in ('encoder', 'decoder'):
            half = _half(path, part)
            if not half.is_file():
                raise UserError(
                    f'autoencoder {self.path!r}: one half of a pair of files of the taesd repository; the {part} is '
                    f'missing: {half}'
                )
            halves[part] = _read(str(half))
            if taesd_part(halves[part]) != part:
                raise UserError(f'autoencoder {self.path!r}: {half} holds no {part} of the taesd repository')
        return taesd_network(halves['encoder'], halves['decoder'], self.path)


def open_autoencoder(
    path: str,
    *,
    id: str | None = None,  # noqa: A002 - as configurations have always written it
    subfolder: str | None = None,
    revision: str | None = None,
    other_weights: bool = False,
) -> Pretrained:
    """The autoencoder at ``path``: a ``File``, or a ``Folder`` for a folder or a hub id. Loads nothing yet.

    Args:
        path: A folder of diffusers (AutoencoderKL, -Tiny, -DC), a hub id such as ``stabilityai/sd-vae-ft-ema``, a file
            of the latent-diffusion layout, or the encoder's of the two of the taesd repository.
        id: What the manifest of the data calls it. (Default: ``path``.)
        subfolder: Where in a folder or hub id it lies.
        revision: Commit of a hub id.
        other_weights: Decode with weights that are not those of the data, such as a fine-tuned decoder.

    Raises:
        UserError: ``subfolder`` or ``revision`` with a file.
    """
    autoencoder: Pretrained
    if not Path(path).is_file() and Path(path).suffix not in _SUFFIXES:
        autoencoder = Folder(path, subfolder=subfolder, revision=revision)
    elif subfolder is not None or revision is not None:
        raise UserError(f'autoencoder {path!r} is one file, which has no subfolder and no revision; leave them out')
    else:
        autoencoder = File(path)
    autoencoder.id, autoencoder.other_weights = id or autoencoder.path, other_weights
    return autoencoder


def _half(path: Path, part: str) -> Path:
    return path.with_name(re.sub('encoder|decoder', part, path.name))


def _read(path: str) -> dict[str, Tensor]:
    suffix = Path(path).suffix
    if suffix not in _SUFFIXES:
        raise UserError(f'autoencoder {path!r}: files end with one of {", ".join(_SUFFIXES)}')
    if not Path(path).is_file():
        raise UserError(f'autoencoder {path!r}: no such file')
    try:
        content = load_file(path) if suffix == '.safetensors' else read_pickled(path)
    except SafetensorError as error:
        raise UserError(f'autoencoder {path!r}: no safetensors file, or a damaged one: {error}') from None
    while isinstance(content, dict) and (nested := content.get('state_dict', content.get('model'))) is not None:
        content = nested
    if not isinstance(content, dict):
        raise UserError(f'autoencoder {path!r}: holds a {type(content).__name__}, not names and tensors')
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
