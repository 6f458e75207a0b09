"""What an import is asked to do. Every fact that the files of a layout do not carry is asked for, with the reason."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge

from tread_composer.conversion.settings import Settings
from tread_composer.core.errors import UserError
from tread_composer.core.options import Flag, argument_docs
from tread_composer.data.columns import Kind
from tread_composer.data.manifest import read_class_names

__all__ = ['ImportSettings', 'MergeSettings']

Layout = Literal['maskdit-lmdb', 'maskdit-webdataset', 'tread-webdataset', 'lightningdit', 'repa', 'fast-dit']

# The fields of which one must be given, for each fact that is asked for.
_ALWAYS = (('autoencoder_id',), ('autoencoder', 'autoencoder_hash'), ('resolution',), ('crop',),
           ('num_classes', 'class_names'))  # fmt: skip
_OF_LAYOUT: dict[Layout, tuple[tuple[str, ...], ...]] = {
    'maskdit-lmdb': (('channels', 'autoencoder'), ('mirrors',)),
    'maskdit-webdataset': (('mirrors',),),
    'tread-webdataset': (('kind',), ('stored_scale',), ('stored_shift',)),
    'lightningdit': (('num_images',),),
    'repa': (),
    'fast-dit': (('stored_scale',), ('stored_shift',), ('num_images',)),
}


@dataclass(frozen=True, kw_only=True)
class ImportSettings(Settings):
    """Latents of one split, and what their files do not say about themselves.

    Args:
        source: Folder with the files of one split.
        layout: Whose files they are.
        split: train or val.
        files: Which tars or safetensors, e.g. '*-train-*.tar' (default: all).
        autoencoder_id: Which autoencoder made the latents; the YAML of a run names the same.
        autoencoder: Its weights, so that no other decoder is used.
        autoencoder_hash: Or their hash, as KL(...).weight_hash() gives it.
        resolution: Side of the images in pixels.
        crop: How they were cropped; 'center' is ADM's, which all these projects use.
        num_classes: How many classes there are, for one may have no sample here; 0 for no labels.
        class_names: File with one name a line, in label order (default: the numbers).
        num_images: How many images were encoded (ImageNet: 1281167), so that a missing file is noticed.
        channels: Channels of a latent (4 for SD-VAE); an LMDB holds bytes without a shape.
        mirrors: 'second-half' if it was extracted with --xflip, 'none' if not (MaskDiT layouts only, whose files look
            alike).
        kind: 'samples' if the values were drawn from the posterior (as CompVis/tread reads them), else 'moments'.
        stored_scale: What raw latents were multiplied by, one number or one for each channel (CompVis/tread and
            fast-DiT: 0.18215).
        stored_shift: What was subtracted before that, one number or one for each channel (SD-VAE: 0).
    """

    source: Annotated[str, Flag('SOURCE')]
    layout: Layout
    split: Literal['train', 'val']
    files: Annotated[str | None, Flag(metavar='PATTERN')] = None
    autoencoder_id: str | None = None
    autoencoder: str | None = None
    autoencoder_hash: str | None = None
    resolution: Annotated[int | None, Ge(1)] = None
    crop: Literal['none', 'center'] | None = None
    num_classes: Annotated[int | None, Ge(0)] = None
    class_names: str | None = None
    num_images: Annotated[int | None, Ge(1)] = None
    channels: Annotated[int | None, Ge(1)] = None
    mirrors: Literal['none', 'second-half'] | None = None
    kind: Literal['moments', 'samples'] | None = None
    stored_scale: tuple[float, ...] | None = None
    stored_shift: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        reasons, lines = argument_docs(type(self)), []
        for names in (*_ALWAYS, *_OF_LAYOUT[self.layout]):
            if all(getattr(self, name) is None for name in names):
                flags = ' or '.join(f'--{name.replace("_", "-")}' for name in names)
                lines.append(f'  {flags}: {" ".join(reasons[names[0]].split())}')
        if lines:
            raise UserError('\n'.join([f'the files of layout {self.layout} do not say everything; missing:', *lines]))
        if self.mirrors and ('mirrors',) not in _OF_LAYOUT[self.layout]:
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
        """What is stored: MaskDiT and REPA keep what the encoder gives, the others draws from it."""
        return self.kind or ('moments' if self.layout.startswith(('maskdit', 'repa')) else 'samples')

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
        """What undoes ``stored = (raw - shift) * scale``, float32 ``[C or 1, 1, 1]`` each; no scale may be zero."""
        # MaskDiT and LightningDiT store what the encoder gives; both scale when they read.
        scale, shift = self.stored_scale or (1.0,), self.stored_shift or (0.0,)
        for name, values in (('--stored-scale', scale), ('--stored-shift', shift)):
            if len(values) not in (1, channels):
                raise UserError(f'{name}: {len(values)} numbers for {channels} channels; give one, or one for each')
        if 0 in scale:
            raise UserError(f'--stored-scale {scale}: no scale is zero')
        return tuple(np.array(values, np.float32).reshape(-1, 1, 1) for values in (scale, shift))  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class MergeSettings(Settings):
    """Data sets that become one.

    Args:
        data_sets: Folders that conversions have finished.
        class_names: File with the names of all classes in label order, one a line. Needed only where the data sets have
            different classes in an order of their own.
        workers: Reading processes per rank; 0 reads in the main process.
    """

    data_sets: Annotated[tuple[str, ...], Flag('DATA_SET')]
    class_names: str | None = None
    workers: Annotated[int | None, Ge(0)] = 0
    source: str = field(default='', init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        folders = [path.resolve() for path in self.folders]
        if len(set(folders)) < max(len(folders), 2):
            raise UserError(f'{", ".join(self.data_sets)}: give two data sets or more, each once')

    @property
    def folders(self) -> list[Path]:
        """Those of the data sets."""
        return [Path(name).expanduser() for name in self.data_sets]

    @property
    def places_read(self) -> tuple[str, ...]:
        """All data sets."""
        return self.data_sets
