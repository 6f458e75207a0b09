"""What a conversion is asked to do, checked once. Each field is a flag of the command line."""

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt
from PIL import ImageColor

from tread_composer.conversion.images import Colour
from tread_composer.core.errors import UserError
from tread_composer.core.options import Device, Flag, check_request
from tread_composer.io.device import available_cores

__all__ = ['ImageSettings', 'Settings', 'is_remote']


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
    splits: tuple[str, ...] | None = field(default=None, init=False)
    held_out: int = field(default=0, init=False)
    max_unreadable: float = field(default=0.0, init=False)
    batch_size: int = field(default=32, init=False)
    workers: int | None = field(default=0, init=False)
    device: str | None = field(default='cpu', init=False)

    def __post_init__(self) -> None:
        check_request(self)
        self._check_places()
        if self.ray_workers and self.engine != 'ray':
            raise UserError('--ray-workers: only with --engine ray')

    @property
    def content(self) -> dict[str, Any]:
        """What decides about the stored bytes, besides samples and encoder: compared when a conversion is continued."""
        # Shards were compressed on demand once: conversions that were begun then can still be continued without.
        return {'seed': self.seed, 'held_out': self.held_out, 'part_size': self.part_size, 'compression': None}

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
        return Path(self.work if self.is_remote and self.work else self.out).expanduser().absolute()

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
            source = Path(name).expanduser().resolve()
            if source.is_dir() and place.resolve().is_relative_to(source):
                raise UserError(
                    f'{place} lies inside the source {name}, which is only ever read; choose a folder elsewhere'
                )


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
            raise UserError(
                f"--background {self.background}: no colour; give a name such as white, '#rrggbb', or stored"
            )
        return colour
