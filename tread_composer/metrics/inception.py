"""Inception as torch-fidelity has it, from a weights file whose hash is checked before anything in it is used.

The weights are TensorFlow's ``inception-2015-12-05``, which all published FIDs are made with, converted by
torch-fidelity (pytorch-fid publishes the same bytes under another name).
Legend: B images, R side of an image in pixels, D features (2,048), K logits (1,008), S spatial features (2,023).
"""

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tread_composer.core.errors import UserError
from tread_composer.core.inference import plain_float32

__all__ = [
    'INCEPTION_FILE', 'INCEPTION_SHA256', 'InceptionFeatures', 'check_weights', 'describe_weights', 'download_weights',
    'find_weights', 'hub_path',
]  # fmt: skip

INCEPTION_FILE = 'weights-inception-2015-12-05-6726825d.pth'
_SIZE = 95_628_359  # bytes
INCEPTION_SHA256 = '6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2'

_SPATIAL_CHANNELS = 7  # ADM, evaluations/evaluator.py: as many as make about 2,048 features of 17 x 17 places


def hub_path() -> Path:
    """Where torch-fidelity itself looks for the file, and puts it."""
    return Path(torch.hub.get_dir()) / 'checkpoints' / INCEPTION_FILE


def find_weights(path: str | Path | None = None, *, allow_download: bool = False) -> Path:
    """The file of weights: ``path``, else the published one in torch's hub folder.

    Raises:
        UserError: It is not there, and must not be fetched.
    """
    if path and not Path(path).is_file():
        raise UserError(f'inception: {str(path)!r} is no file; `python -m tread_composer prefetch` says what it is')
    if path or hub_path().is_file():
        return Path(path or hub_path())
    if allow_download:
        return download_weights()
    raise UserError(
        f'the weights of Inception are not here. Give their file (--inception {INCEPTION_FILE}, or `inception:` in a '
        f'YAML), put it at {hub_path()}, or allow the download (--allow-download). `python -m tread_composer prefetch` '
        f'says where to get it'
    )


def download_weights() -> Path:
    """Fetch the published file to ``hub_path()``, from where torch-fidelity publishes it, and check its hash.

    Raises:
        UserError: It cannot be reached, or has another hash.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    target = hub_path()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(target), hash_prefix=INCEPTION_SHA256, progress=False)
    except (OSError, RuntimeError) as error:
        raise UserError(f'{URL_INCEPTION_V3}: could not be fetched to {target}: {error}') from error
    return target


def describe_weights() -> str:
    """What to fetch, from where, and where to put it, as text."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    status = 'is there' if hub_path().is_file() else 'not there'
    rows = [
        ('file', INCEPTION_FILE),
        ('what', "Inception v3 of 2015-12-05, TensorFlow's weights as torch-fidelity converted them"),
        ('address', URL_INCEPTION_V3),
        ('size', f'{_SIZE:,} bytes'),
        ('sha256', INCEPTION_SHA256),
        ('torch looks here', f'{hub_path()} ({status})'),
        ('or say where', '--inception FILE, or `inception: FILE` in a YAML'),
        ('then check it', 'python -m tread_composer prefetch --check FILE'),
    ]
    return '\n'.join(f'{name:<18}{text}' for name, text in rows)


def check_weights(path: str | Path, sha256: str | None = None) -> bytes:
    """The content of a file of weights, if it has this hash; that of the published file if None.

    Raises:
        UserError: It cannot be read or has another hash.
    """
    expected = (sha256 or INCEPTION_SHA256).removeprefix('sha256:').lower()  # also in the form that protocols have
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f'{path}: cannot be read: {error}') from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != expected:
        published = f', the published file has {_SIZE:,}' if sha256 is None else ''
        raise UserError(
            f'{path}: has the hash {digest}, expected {expected} ({len(content):,} bytes{published}). Numbers from '
            'other weights compare with no published one. Fetch the file again, or state the hash of weights that are '
            'meant (--inception-sha256)'
        )
    return content


class InceptionFeatures:
    """torch-fidelity's Inception: the 2,048 pooled features and the unbiased logits.

    It resizes as TensorFlow 1 did, within the network, so images go in at their own resolution. `open` makes it of
    torch-fidelity's extractor with the layers ``'2048'`` and ``'logits_unbiased'``; ``sha256`` names the weights.
    With ``spatial`` the features of ADM's sFID too, from ``mixed_6/conv`` of TensorFlow's graph.
    """

    name = 'inception'
    resolution = None
    num_logits = 1008

    def __init__(
        self, network: nn.Module, sha256: str, device: str | torch.device = 'cpu', spatial: bool = False
    ) -> None:
        self._network, self._sha256, self._device = network.to(device), sha256, torch.device(device)
        self.spatial = spatial
        self._places: list[Tensor] = []  # what the hook has seen of one batch, [B, 192, 17, 17]
        if spatial:
            # TensorFlow counts 5b, 5c, 5d, 6a, ... as mixed, mixed_1, ...; `conv` is the branch of 1 x 1 with its ReLU.
            block: Any = network.Mixed_6d
            block.branch1x1.register_forward_hook(lambda module, args, out: self._places.append(out))

    @classmethod
    def open(
        cls,
        inception: str | Path | None = None,
        *,
        inception_sha256: str | None = None,
        allow_download: bool = False,
        device: str | torch.device = 'cpu',
        spatial: bool = False,
    ) -> 'InceptionFeatures':
        """Load the weights. Nothing in the file is run: it is read as tensors before torch-fidelity may open it.

        ``inception`` is the file, looked for as ``find_weights`` says if None; ``inception_sha256`` its hash, if it is
        not the published one.

        Raises:
            UserError: The file is missing, or is not what it must be.
        """
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        path = find_weights(inception, allow_download=allow_download)
        content = check_weights(path, inception_sha256)
        try:
            torch.load(io.BytesIO(content), map_location='cpu', weights_only=True)
            # Its layers draw initial weights, which the file replaces: training must not notice.
            with torch.random.fork_rng(devices=[]):
                network = FeatureExtractorInceptionV3(
                    'inception-v3-compat', ['2048', 'logits_unbiased'], io.BytesIO(content)
                )
        except (RuntimeError, pickle.UnpicklingError, EOFError, AttributeError, TypeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{path}: holds no weights of torch-fidelity's Inception: {reason}") from error
        return cls(network, hashlib.sha256(content).hexdigest(), device, spatial)

    def identity(self) -> dict[str, str]:
        """See ``features.Extractor``."""
        import torch_fidelity

        version = f'torch-fidelity {torch_fidelity.__version__}'
        return {'name': self.name, 'weights_hash': f'sha256:{self._sha256}', 'version': version}

    def __call__(self, images_B3RR: Tensor) -> tuple[Tensor, ...]:
        """Features ``[B, 2048]`` and logits ``[B, 1008]`` of uint8 images, where asked for ``[B, 2023]``; float32."""
        with torch.no_grad(), plain_float32(self._device):
            features_BD, logits_BK = self._network(images_B3RR.to(self._device))
        if not self.spatial:
            return features_BD, logits_BK
        # TensorFlow has channels last: the seven values of a place stand together, as in `mu_s`.
        places_BHWC = self._places.pop().permute(0, 2, 3, 1)
        return features_BD, logits_BK, places_BHWC[..., :_SPATIAL_CHANNELS].flatten(1)
