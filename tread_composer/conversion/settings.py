"""What a conversion is asked to do, checked once. Each field is an option of the command line and carries its help."""

from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from tread_composer.core.errors import UserError
from tread_composer.data.columns import Kind
from tread_composer.io.device import available_cores

__all__ = ['ImageSettings', 'Settings', 'option', 'option_name']

_STORES = ('moments', 'mean', 'sample')


def option(default: Any, text: str, **facts: Any) -> Any:
    """A field of settings and its option.

    Args:
        default: Its value where nobody says otherwise; ``MISSING``: it must be given.
        text: The help.
        **facts: Arguments of argparse's ``add_argument``, which also knows the type of a default that is not None;
            ``names`` in place of ``--<field>``; ``least``, the smallest value that is allowed.
    """
    return field(default=default, metadata={'help': text, **facts})


def option_name(name: str) -> str:
    """How the command line spells a field."""
    return f'--{name.replace("_", "-")}'


@dataclass(frozen=True)
class Settings:
    """What every conversion has to know. Only some of it decides what is written (see ``content``).

    Raises:
        UserError: A value is not allowed, or two contradict each other.
    """

    source: str = option(MISSING, 'folder or archive with the images')
    out: str = option(MISSING, 'folder of the data set, or a URL that streaming uploads to (s3://...)')
    seed: int = option(0, 'of the one permutation before writing (%(default)s)', least=0)
    part_size: int = option(8192, 'samples finished, or after an interruption made anew, together (8192)', least=1)
    compression: str | None = option(None, 'e.g. zstd:3; saves at most 7%% of latents, so none by default')
    work: str | None = option(None, 'with a URL as --out: local folder that remembers what is done', metavar='FOLDER')
    # What else a conversion of images can be told; of stored latents it is always the same.
    splits: tuple[str, ...] | None = None
    held_out: int = 0
    max_unreadable: float = 0.0
    batch_size: int = 32
    workers: int | None = 0
    device: str | None = 'cpu'

    def __post_init__(self) -> None:
        for item in fields(self):
            value, least, choices = getattr(self, item.name), item.metadata.get('least'), item.metadata.get('choices')
            if value is not None and least is not None and value < least:
                raise UserError(f'{option_name(item.name)} {value}: must be {least} or more')
            if value is not None and choices is not None and value not in choices:
                raise UserError(f'{option_name(item.name)} {value!r} is not known; choose one of {", ".join(choices)}')
        if not 0 <= self.max_unreadable < 1:
            raise UserError(f'--max-unreadable {self.max_unreadable} is a share of the images: 0 or more, below 1')
        if self.compression is not None:
            self._check_compression()
        self._check_places()

    @property
    def content(self) -> dict[str, Any]:
        """What decides about the stored bytes, besides samples and encoder: compared when a conversion is continued."""
        return {name: getattr(self, name) for name in ('seed', 'held_out', 'part_size', 'compression')}

    @property
    def is_remote(self) -> bool:
        """Whether finished parts are uploaded."""
        return '://' in self.out or self.out.startswith('dbfs:')

    @property
    def remote(self) -> str | None:
        """Where streaming's uploader brings things; None for a local folder."""
        return self.out.removeprefix('file://').rstrip('/') if self.is_remote else None

    @property
    def state(self) -> Path:
        """The local folder with everything but uploaded shards: ``out``, or ``work`` for a URL."""
        return Path(self.work if self.is_remote and self.work else self.out).expanduser().absolute()

    def workers_of_rank(self, on_gpu: bool, ranks_here: int) -> int:
        """Decoding processes: as given, or this rank's share of the cores but one; on CPU the encoder needs most.

        Args:
            on_gpu: Whether the encoder runs on a GPU.
            ranks_here: Ranks that share this machine.
        """
        if self.workers is not None:
            return self.workers
        cores = max(1, available_cores() // ranks_here)
        return max(1, cores - 1 if on_gpu else cores // 8)

    def _check_compression(self) -> None:
        from streaming.base.compression import get_compressions, is_compression

        if not is_compression(self.compression):
            choices = ', '.join(sorted(name for name in get_compressions() if ':' not in name))
            raise UserError(
                f'--compression {self.compression!r} is not known to streaming; it knows {choices}, most of them also '
                f'with a level, e.g. zstd:3'
            )

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
        source = Path(self.source).expanduser().resolve()
        places = [self.state, *([Path(self.remote)] if self.remote and '://' not in self.remote else [])]
        for place in places:
            if source.is_dir() and place.resolve().is_relative_to(source):
                raise UserError(
                    f'{place} lies inside the source {self.source}, which is only ever read; choose a folder elsewhere'
                )


@dataclass(frozen=True)
class ImageSettings(Settings):
    """A conversion of images. ``vae`` None keeps the pixels; the command line says ``--pixels``."""

    vae: str | None = None
    resolution: int = option(256, 'side of the square images (%(default)s)', least=1)
    vae_subfolder: str | None = option(None, 'where in --vae the autoencoder lies, e.g. vae')
    vae_revision: str | None = option(None, 'commit of a hub id; name one for results that can be repeated')
    vae_id: str | None = option(None, 'what the manifest calls it (the hub id, or the name of the folder or file)')
    store: str = option('moments', 'moments (default): mean and log-variance, sampled whenever read', choices=_STORES)
    mirror: bool = option(True, 'do not store the mirrored images', names=('--no-mirror',), action='store_false')
    precision: str = option('fp32', 'fp32 without TF32 (default), or autocast to bf16', choices=('fp32', 'bf16'))
    batch_size: int = option(32, 'images per encoder call (%(default)s)', least=1)
    workers: int | None = option(
        None, 'decoding processes per rank (its cores - 1; no GPU: an eighth)', least=0, type=int
    )
    device: str | None = option(None, 'where to encode (a GPU if there is one)', choices=('cuda', 'cpu'))
    splits: tuple[str, ...] | None = option(None, 'e.g. train val (all of the source)', nargs='+', metavar='SPLIT')
    held_out: int = option(0, 'take N images out of train for val, where there is none', least=0, metavar='N')
    max_unreadable: float = option(0.001, 'stop if more of a split are unreadable (%(default)s)', metavar='SHARE')
    ground_truth: str | None = option(None, 'labels of validation images in no class folders', metavar='FILE')
    class_names: str | None = option(None, 'one a line, in label order, where the source has none', metavar='FILE')

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ('vae_subfolder', 'vae_revision', 'vae_id', 'store', 'precision') if self.vae is None else ():
            if getattr(self, name) != getattr(ImageSettings, name):  # a dataclass keeps defaults as class attributes
                raise UserError(f'{option_name(name)} says nothing without an autoencoder: give --vae, or leave it')

    @property
    def kind(self) -> Kind:
        """What the manifest calls the stored numbers."""
        if self.vae is None:
            return 'pixels'
        return 'moments' if self.store == 'moments' else 'samples'

    @property
    def autoencoder_id(self) -> str | None:
        """What the manifest calls the autoencoder."""
        if self.vae is None or self.vae_id is not None:
            return self.vae_id
        path = Path(self.vae)
        if path.is_file():
            return path.resolve().stem
        return path.resolve().name if path.is_dir() else self.vae
