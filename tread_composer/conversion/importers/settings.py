"""What an import is asked to do. Every fact that the files of a layout do not carry is asked for, with the reason."""

import re
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tread_composer.conversion.settings import Settings, option
from tread_composer.conversion.sources.base import read_class_names
from tread_composer.core.errors import UserError
from tread_composer.data.columns import Kind

__all__ = ['ImportSettings']


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(','))


# How a fact is asked for, and the fields of which one must be given.
_ALWAYS = {
    '--autoencoder-id': ('autoencoder_id',),
    '--autoencoder PATH or --autoencoder-hash': ('autoencoder', 'autoencoder_hash'),
    '--resolution': ('resolution',),
    '--crop': ('crop',),
    '--num-classes or --class-names': ('num_classes', 'class_names'),
}
_MIRRORS = {'--mirrors': ('mirrors',)}
_OF_LAYOUT: dict[str, dict[str, tuple[str, ...]]] = {
    'maskdit-lmdb': {'--channels or --autoencoder PATH': ('channels', 'autoencoder'), **_MIRRORS},
    'maskdit-webdataset': _MIRRORS,
    'tread-webdataset': {
        '--kind': ('kind',), '--stored-scale': ('stored_scale',), '--stored-shift': ('stored_shift',)
    },
    'lightningdit': {},
}  # fmt: skip


@dataclass(frozen=True)
class ImportSettings(Settings):
    """Latents of one split, and what their files do not say about themselves."""

    source: str = option(MISSING, 'folder with the files of one split', names=('source',))
    layout: str = option('', 'whose files they are', choices=tuple(_OF_LAYOUT), required=True)
    split: str = option('', 'train or val', required=True)
    files: str | None = option(None, "of tars or safetensors, e.g. '*-train-*.tar' (default: all)", metavar='PATTERN')
    autoencoder_id: str | None = option(None, 'which autoencoder made the latents; the YAML of a run names the same')
    autoencoder: str | None = option(None, 'its weights, so that no other decoder is used', metavar='PATH')
    autoencoder_hash: str | None = option(None, 'or their hash, as KL(...).weight_hash() gives it')
    resolution: int | None = option(None, 'side of the images in pixels', type=int, least=1)
    crop: str | None = option(None, "'center' is ADM's, which all these projects use", choices=('none', 'center'))
    num_classes: int | None = option(None, 'a class may have no sample here; 0 for no labels', type=int, least=0)
    class_names: str | None = option(None, 'one name a line, in label order (default: the numbers)', metavar='FILE')
    channels: int | None = option(
        None, 'of a latent (4 for SD-VAE); an LMDB holds bytes without a shape', type=int, least=1
    )
    mirrors: str | None = option(
        None,
        "'second-half' if it was extracted with --xflip, 'none' if not (MaskDiT layouts only, whose files look alike)",
        choices=('none', 'second-half'),
    )
    kind: Literal['moments', 'samples'] | None = option(
        None,
        "'samples' if the values were drawn from the posterior (as CompVis/tread reads them), else 'moments'",
        choices=('moments', 'samples'),
    )
    stored_scale: tuple[float, ...] | None = option(
        None, 'what raw latents were multiplied by (CompVis/tread: 0.18215)', type=_numbers, metavar='S[,S...]'
    )
    stored_shift: tuple[float, ...] | None = option(
        None, 'what was subtracted before that (SD-VAE: 0); one, or one a channel', type=_numbers, metavar='S[,S...]'
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if Path(self.split).name != self.split or self.split.startswith('.'):
            raise UserError(f'--split {self.split}: the name of a folder is needed, such as train')
        asked = {**_ALWAYS, **_OF_LAYOUT[self.layout]}
        reasons = {item.name: item.metadata.get('help') for item in fields(self)}
        lines = [
            f'  {name}: {reasons[names[0]]}'
            for name, names in asked.items()
            if all(getattr(self, field) is None for field in names)
        ]
        if lines:
            raise UserError('\n'.join([f'the files of layout {self.layout} do not say everything; missing:', *lines]))
        if self.mirrors and 'mirrors' not in sum(asked.values(), ()):
            raise UserError(f'--mirrors belongs to the MaskDiT layouts; {self.layout} says itself what it holds')
        if self.autoencoder and self.autoencoder_hash:
            raise UserError('give --autoencoder or --autoencoder-hash, not both')
        if self.autoencoder_hash and not re.fullmatch(r'sha256:[0-9a-f]{64}', self.autoencoder_hash):
            raise UserError(
                f'--autoencoder-hash {self.autoencoder_hash}: not of the form sha256:<64 hexadecimal digits>'
            )
        object.__setattr__(self, 'splits', (self.split,))

    @property
    def stored_kind(self) -> Kind:
        """What is stored: MaskDiT keeps what the encoder gives, the others draws from it."""
        return self.kind or ('moments' if self.layout.startswith('maskdit') else 'samples')

    @property
    def names_of_classes(self) -> tuple[str, ...]:
        """One for each class; empty for data without labels."""
        if self.class_names is None:
            return tuple(str(label) for label in range(self.num_classes or 0))
        names = read_class_names(Path(self.class_names))
        if self.num_classes not in (None, len(names)):
            raise UserError(f'--num-classes {self.num_classes}: {self.class_names} has {len(names)} names')
        return names

    def scale_and_shift(self, channels: int) -> tuple[Any, Any]:
        """What undoes ``stored = (raw - shift) * scale``, float32 ``[C or 1, 1, 1]`` each.

        Raises:
            UserError: Not one number or one for each channel, a scale of zero, or one that is not finite.
        """
        # MaskDiT and LightningDiT store what the encoder gives; both scale when they read.
        scale, shift = self.stored_scale or (1.0,), self.stored_shift or (0.0,)
        for name, values in (('--stored-scale', scale), ('--stored-shift', shift)):
            if len(values) not in (1, channels):
                raise UserError(f'{name}: {len(values)} numbers for {channels} channels; give one, or one for each')
        if not np.isfinite([*scale, *shift]).all() or 0 in scale:
            raise UserError(f'--stored-scale {scale}, --stored-shift {shift}: finite, and no scale is zero')
        return tuple(np.array(values, np.float32).reshape(-1, 1, 1) for values in (scale, shift))  # type: ignore[return-value]
