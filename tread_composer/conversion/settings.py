"""What a conversion, an import or a merge is asked to do, checked once. Each field is a flag of the command line."""

import functools
import itertools
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Lt
from PIL import ImageColor

from tread_composer.conversion.squares import Colour
from tread_composer.core.errors import UserError
from tread_composer.core.options import Device, Flag, argument_docs, check_request
from tread_composer.data.manifest import read_class_names
from tread_composer.io.device import available_cores

__all__ = ['ImageSettings', 'ImportSettings', 'MergeSettings', 'Settings', 'is_remote']

Layout = Literal['maskdit-lmdb', 'maskdit-webdataset', 'tread-webdataset', 'lightningdit', 'repa', 'fast-dit']

# What may begin with ~; a name of the hub and a URL stay as they are.
_PATHS = {'source', 'out', 'work', 'class_names', 'ground_truth', 'vae', 'autoencoder'}

# The fields of which one must be given, for each fact that the files of a layout do not carry.
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


def is_remote(place: str) -> bool:
    """Whether a place is none of the file system, but one that streaming brings files to or fetches them from."""
    return '://' in place or place.startswith('dbfs:')


@dataclass(frozen=True)
class Settings:
    """What every conversion has to know. Only some of it decides what is written (see ``content``).

    Args:
        source: Folder or archive with the images.
        out: Folder of the data set, or a URL that streaming uploads to (s3://...).
        seed: Seed of the one permutation before writing.
        part_size: Samples that are finished together, or made again together after an interruption.
        work: With a URL as --out: local folder that remembers what is done.
        engine: Who makes the parts: the ranks that a launcher has started, or workers of Ray.
        ray_workers: How many (one for each GPU of the cluster; without any, one for each machine).

    Raises:
        UserError: A value is not allowed, or two contradict each other.
    """

    source: str
    out: str
    seed: Annotated[int, Ge(0)] = 0
    part_size: Annotated[int, Ge(1)] = 8192
    work: str | None = None
    engine: Literal['ranks', 'ray'] = 'ranks'
    ray_workers: Annotated[int | None, Ge(1)] = None
    # What else a conversion of images can be told; of stored latents it is always the same.
    splits, held_out, max_unreadable, batch_size, workers, device = None, 0, 0.0, 32, 0, 'cpu'
    # What helps where memory or a disk is too small, in flags of this command.
    memory_remedy, disk_remedy = 'lower --workers', 'make room, or choose another place'
    can_hold_out = False  # an evaluation split, by --held-out

    def __post_init__(self) -> None:
        check_request(self)
        for name in _PATHS & vars(self).keys():
            # A shell expands the ~ of a word, and not that of --flag=~/x
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, os.path.expanduser(value))
        self._check_places()
        if self.ray_workers and self.engine != 'ray':
            raise UserError('--ray-workers: only with --engine ray')

    @property
    def content(self) -> dict[str, Any]:
        """What decides about the stored bytes, besides samples and encoder: compared when a conversion is continued."""
        return {'seed': self.seed, 'held_out': self.held_out, 'part_size': self.part_size}

    @property
    def is_remote(self) -> bool:
        """Whether finished parts are uploaded."""
        return is_remote(self.out)

    @property
    def remote(self) -> str | None:
        """Where streaming's uploader brings things; None for a local folder."""
        return self.out.removeprefix('file://').rstrip('/') if self.is_remote else None

    @property
    def state(self) -> Path:
        """The local folder with everything but uploaded shards: ``out``, or ``work`` for a URL."""
        return Path(self.work if self.is_remote and self.work else self.out).absolute()

    @property
    def places_read(self) -> tuple[str, ...]:
        """Files and folders that are only ever read."""
        return (self.source,)

    def workers_of_rank(self, on_gpu: bool, ranks_here: int) -> int:
        """Decoding processes: as given, or the share of one of ``ranks_here`` of the cores but one.

        Where the encoder runs on the CPU, it needs most of them.
        """
        if self.workers is not None:
            return self.workers
        cores = max(1, available_cores() // ranks_here)
        return max(1, cores - 1 if on_gpu else cores // 8)

    def _check_places(self) -> None:
        if self.is_remote and self.work is None:
            raise UserError(
                f'--out {self.out} is a URL: also give --work FOLDER, a local folder that remembers which parts are '
                f'done (with several nodes, one that all of them see)'
            )
        if not self.is_remote and self.work is not None:
            raise UserError(f'--work {self.work}: only for a URL as --out; a folder keeps its state in itself')
        if self.is_remote:
            from streaming.base.storage.upload import UPLOADERS

            schemes = {name.split(':')[0] for name in UPLOADERS if name} | {'file'}
            scheme = self.out.split(':')[0]
            if scheme not in schemes:
                raise UserError(f'--out {self.out}: no uploader for {scheme!r}; streaming knows {sorted(schemes)}')
        places = [self.state, *([Path(self.remote)] if self.remote and '://' not in self.remote else [])]
        for place, name in itertools.product(places, self.places_read):
            source = Path(name).resolve()
            if source.is_dir() and place.resolve().is_relative_to(source):
                raise UserError(f'{place} lies inside the source {name}, which is only ever read; choose another')


@dataclass(frozen=True)
class ImageSettings(Settings):
    """A conversion of images. Without ``vae`` the pixels are kept; the command line says ``--pixels``.

    Args:
        vae: Autoencoder: folder or hub id of diffusers, a latent-diffusion checkpoint file, or the encoder of the taesd
            repository.
        resolution: Side of the square images.
        vae_subfolder: Subfolder of the autoencoder within it, e.g. vae.
        vae_revision: Commit of a hub id; name one for repeatable results.
        vae_id: What the manifest calls it (the hub id, or the name of the folder or file).
        store: moments are mean and log-variance, sampled whenever they are read; sample is one draw (moments, where the
            autoencoder has a variance).
        mirror: Do not store the mirrored images.
        precision: What the encoder computes in: fp32 without TF32, or autocast to bf16.
        background: Colour behind transparent images; ``stored`` keeps the colours below the transparency.
        batch_size: Images per encoder call.
        workers: Decoding processes per rank; 0 decodes in the main process (its cores but one; without a GPU an
            eighth of them).
        device: Where to encode (a GPU if there is one).
        splits: Which splits, e.g. train val (all that the source has).
        held_out: Images to take out of train for val, where there is none.
        max_unreadable: Stop if more images of a split than this share are unreadable.
        ground_truth: File with the labels of validation images that lie in no class folders.
        class_names: File with class names in label order, one a line, where the source has none.
        image_column: Which column of parquet or arrow files holds the images, where several do.
        label_column: Which of their columns holds the labels, e.g. fine_label of CIFAR-100.
    """

    memory_remedy = 'lower --workers or --batch-size'
    disk_remedy = 'make room, choose another place, or store less (--no-mirror halves it)'
    can_hold_out = True

    vae: Annotated[str | None, Flag('--autoencoder', '--vae')] = None
    resolution: Annotated[int, Ge(1)] = 256
    vae_subfolder: Annotated[str | None, Flag('--autoencoder-subfolder', '--vae-subfolder')] = None
    vae_revision: Annotated[str | None, Flag('--autoencoder-revision', '--vae-revision')] = None
    vae_id: Annotated[str | None, Flag('--autoencoder-id', '--vae-id')] = None
    store: Literal['moments', 'mean', 'sample'] | None = None
    mirror: Annotated[bool, Flag('--no-mirror')] = True
    precision: Literal['fp32', 'bf16'] = 'fp32'
    background: Annotated[str, Flag(metavar='COLOUR')] = 'white'
    batch_size: Annotated[int, Ge(1)] = 32
    workers: Annotated[int | None, Ge(0)] = None
    device: Device | None = None
    splits: tuple[str, ...] | None = None
    held_out: Annotated[int, Ge(0)] = 0
    max_unreadable: Annotated[float, Ge(0), Lt(1)] = 0.001
    ground_truth: str | None = None
    class_names: str | None = None
    image_column: str | None = None
    label_column: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ('vae_subfolder', 'vae_revision', 'vae_id', 'store', 'precision') if self.vae is None else ():
            if getattr(self, name) != getattr(ImageSettings, name):  # a dataclass keeps defaults as class attributes
                flag = f'--{name.replace("vae", "autoencoder").replace("_", "-")}'
                raise UserError(f'{flag} has no effect without an autoencoder: give --autoencoder, or leave it out')
        _ = self.background_colour

    @functools.cached_property
    def given_names(self) -> tuple[str, ...]:
        """Those of the file with class names, in label order; empty without it."""
        return () if self.class_names is None else read_class_names(Path(self.class_names))

    @property
    def use_test(self) -> bool:
        """Whether a test split is the evaluation split where there is no other; else it is left out."""
        return not self.held_out and 'val' in (self.splits or ('val',))

    @property
    def background_colour(self) -> Colour | None:
        """Red, green, blue; None for the colours that are stored below the transparency."""
        if self.background == 'stored':
            return None
        try:
            colour = ImageColor.getrgb(self.background)
        except ValueError:
            colour = ()
        if len(colour) != 3:  # with an alpha of its own, or none
            raise UserError(f"--background {self.background}: no colour; give a name like white, '#rrggbb', or stored")
        return colour


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
            raise UserError(f'--autoencoder-hash {self.autoencoder_hash}: not of the form sha256:<64 hex digits>')
        object.__setattr__(self, 'splits', (self.split,))

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
        object.__setattr__(self, 'data_sets', tuple(map(os.path.expanduser, self.data_sets)))
        super().__post_init__()
        remote = [name for name in self.data_sets if is_remote(name)]
        if remote:
            raise UserError(f'{remote[0]} is a URL; copy that data set to this machine, and give its folder')
        folders = [path.resolve() for path in self.folders]
        if len(set(folders)) < max(len(folders), 2):
            raise UserError(f'{", ".join(self.data_sets)}: give two data sets or more, each once')

    @property
    def folders(self) -> list[Path]:
        """Those of the data sets."""
        return [Path(name) for name in self.data_sets]

    @property
    def places_read(self) -> tuple[str, ...]:
        """All data sets."""
        return self.data_sets
