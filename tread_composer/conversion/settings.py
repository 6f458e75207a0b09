"""What a conversion was asked to do: everything the command line of ``convert_imagenet.py`` says, checked once."""

from dataclasses import dataclass
from pathlib import Path

from tread_composer.core.errors import UserError
from tread_composer.data.columns import Kind
from tread_composer.io.device import available_cores

__all__ = ['PRECISIONS', 'STORES', 'Settings']

STORES = ('moments', 'mean', 'sample')
PRECISIONS = ('fp32', 'bf16')


@dataclass(frozen=True)
class Settings:
    """One conversion. Only some of it decides what is written (see ``Encoder.content``); the rest is how.

    Args:
        source: Folder or archive with the images.
        out: Folder of the data set, or a URL that streaming can upload to, e.g. ``s3://bucket/imagenet256``;
            ``file:///path`` for a mounted folder that is to be treated as one.
        resolution: Side of the square images.
        vae: Folder or hub id of an ``AutoencoderKL``, or a checkpoint file; None keeps the pixels.
        vae_subfolder: Where in ``vae`` the autoencoder lies.
        vae_revision: Commit of a hub id.
        vae_id: What the manifest calls the autoencoder; None: the hub id, or the name of the folder or file.
        store: ``'moments'`` (mean and log-variance), ``'mean'`` or ``'sample'`` (one draw).
        mirror: Whether the latents of the mirrored images are stored too.
        precision: ``'fp32'``, or ``'bf16'``: the encoder runs under autocast.
        splits: Which splits of the source; None: all.
        held_out: Images to take out of ``train`` for a ``val`` split, where the source has none.
        seed: Of the permutation (and of the draws of ``'sample'``).
        part_size: Images that are made, finished and, after an interruption, lost together.
        compression: As streaming writes it, e.g. ``'zstd:3'``; None: none.
        max_unreadable: Share of a split's images that may be unreadable; beyond it the conversion stops.
        batch_size: Images that go through the encoder together.
        workers: Decoding processes per rank; 0 decodes in the main process; None: see ``default_workers``.
        device: ``'cuda'`` or ``'cpu'``; None: a GPU if there is one.
        work: With a URL: the local folder (shared by all nodes) that holds the state of the conversion.
        ground_truth: Labels of the ILSVRC validation archive.
        class_names: File with the class names, where the source does not have them.

    Raises:
        UserError: A value is not allowed, or two contradict each other.
    """

    source: str
    out: str
    resolution: int = 256
    vae: str | None = None
    vae_subfolder: str | None = None
    vae_revision: str | None = None
    vae_id: str | None = None
    store: str = 'moments'
    mirror: bool = True
    precision: str = 'fp32'
    splits: tuple[str, ...] | None = None
    held_out: int = 0
    seed: int = 0
    part_size: int = 8192
    compression: str | None = None
    max_unreadable: float = 0.001
    batch_size: int = 32
    workers: int | None = None
    device: str | None = None
    work: str | None = None
    ground_truth: str | None = None
    class_names: str | None = None

    def __post_init__(self) -> None:
        for name, least in (('resolution', 1), ('part_size', 1), ('batch_size', 1), ('held_out', 0), ('seed', 0)):
            if getattr(self, name) < least:
                raise UserError(f'--{_option(name)} {getattr(self, name)}: must be {least} or more')
        for name, choices in (('store', STORES), ('precision', PRECISIONS), ('device', (None, 'cuda', 'cpu'))):
            if getattr(self, name) not in choices:
                raise UserError(f'--{name} {getattr(self, name)!r} is not known; choose one of {choices}')
        if self.workers is not None and self.workers < 0:
            raise UserError(f'--workers {self.workers}: must be 0 (decode in the main process) or more')
        if not 0 <= self.max_unreadable < 1:
            raise UserError(f'--max-unreadable {self.max_unreadable} is a share of the images: 0 or more, below 1')
        if self.compression is not None:
            self._check_compression()
        self._check_autoencoder()
        self._check_places()

    @property
    def kind(self) -> Kind:
        """What the manifest calls the stored numbers."""
        if self.vae is None:
            return 'pixels'
        return 'moments' if self.store == 'moments' else 'samples'

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

    @property
    def autoencoder_id(self) -> str | None:
        """What the manifest calls the autoencoder."""
        if self.vae is None or self.vae_id is not None:
            return self.vae_id
        path = Path(self.vae)
        if path.is_file():
            return path.resolve().stem
        return path.resolve().name if path.is_dir() else self.vae

    def default_workers(self, on_gpu: bool, ranks_here: int) -> int:
        """Decoding processes of a rank: its share of the cores, but one; on CPU the encoder needs most of them.

        Args:
            on_gpu: Whether the encoder runs on a GPU.
            ranks_here: Ranks that share this machine.
        """
        cores = max(1, available_cores() // ranks_here)
        return max(1, cores - 1 if on_gpu else cores // 8)

    def _check_compression(self) -> None:
        from streaming.base.compression import get_compressions, is_compression

        if not is_compression(self.compression):
            choices = ', '.join(sorted(name for name in get_compressions() if ':' not in name))
            raise UserError(f'--compression {self.compression!r} is not known to streaming; it knows {choices}, most '
                            f'of them also with a level, e.g. zstd:3')  # fmt: skip

    def _check_autoencoder(self) -> None:
        if self.vae is None:
            settings = [name for name in ('vae_subfolder', 'vae_revision', 'vae_id') if getattr(self, name) is not None]
            settings += ['store'] * (self.store != 'moments') + ['precision'] * (self.precision != 'fp32')
            if settings:
                raise UserError(
                    f'--{_option(settings[0])} says nothing without an autoencoder: give --vae, or leave it'
                )

    def _check_places(self) -> None:
        if self.is_remote and self.work is None:
            raise UserError(f'--out {self.out} is a URL: also give --work FOLDER, a local folder that remembers which '
                            f'parts are done (with several nodes, one that all of them see)')  # fmt: skip
        if not self.is_remote and self.work is not None:
            raise UserError(f'--work {self.work}: only for a URL as --out; a folder keeps its state in itself')
        if self.is_remote:
            self._check_scheme()
        source = Path(self.source).expanduser().resolve()
        places = [self.state, *([Path(self.remote)] if self.remote and '://' not in self.remote else [])]
        for place in places:
            if source.is_dir() and place.resolve().is_relative_to(source):
                raise UserError(f'{place} lies inside the source {self.source}, which is only ever read; choose a '
                                f'folder elsewhere')  # fmt: skip

    def _check_scheme(self) -> None:
        from streaming.base.storage.upload import UPLOADERS

        scheme = self.out.split(':')[0]
        if scheme not in (*UPLOADERS, 'file'):
            schemes = ', '.join(sorted({name.split(':')[0] for name in UPLOADERS if name} | {'file'}))
            raise UserError(f'--out {self.out}: no uploader for {scheme!r}; streaming knows {schemes}')


def _option(name: str) -> str:
    return name.replace('_', '-')
