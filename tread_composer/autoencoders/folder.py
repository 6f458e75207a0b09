"""Autoencoders in folders that diffusers wrote, or under the id of one on its hub.

Which network a folder holds its ``config.json`` says. Loaded is a network whose weights are all there and nothing else:
diffusers itself fills what is missing with random numbers.
"""

import shlex
from pathlib import Path
from typing import Any

import torch

from tread_composer.autoencoders.pretrained import NETWORKS, Pretrained
from tread_composer.core.errors import UserError

__all__ = ['KL', 'Folder', 'network_class']

_CONFIG, _WEIGHTS = 'config.json', 'diffusion_pytorch_model.safetensors'
_LISTED = 10  # tensors that a refusal names
_VIDEO = 'it is made for video'
_REASONS = {
    'VQModel': 'its latents are entries of a table, and nothing here learns such codes',
    'AutoencoderKLFlux2': 'its latents are folded two by two and normalised with statistics that lie in its weights',
    'ConsistencyDecoderVAE': 'its decoder is a diffusion model of its own',
    **dict.fromkeys(
        ('AutoencoderKLQwenImage', 'AutoencoderKLWan', 'AutoencoderKLCogVideoX', 'AutoencoderKLHunyuanVideo',
         'AutoencoderKLLTXVideo', 'AutoencoderKLMochi', 'AutoencoderKLAllegro', 'AutoencoderKLCosmos',
         'AutoencoderKLMagvit', 'AutoencoderKLTemporalDecoder'),
        _VIDEO,
    ),
}  # fmt: skip


class Folder(Pretrained):
    """A frozen autoencoder of diffusers: ``AutoencoderKL``, ``AutoencoderTiny`` or ``AutoencoderDC``.

    ``path`` is a folder that ``save_pretrained`` wrote, or a hub id; the others are those of ``open_autoencoder``.

    Raises:
        UserError: On first use: diffusers is missing, there is no autoencoder at ``path``, it is of another class, a
            tensor is missing or left over, or it has other weights than ``expected_hash``.
    """

    classes = tuple(name for name in NETWORKS if name.startswith('Autoencoder'))

    def __init__(self, path: str, *, subfolder: str | None = None, revision: str | None = None) -> None:
        super().__init__(path)
        self.subfolder, self.revision = subfolder, revision

    @property
    def _local(self) -> Path | None:
        """The folder itself; None of a hub id."""
        return Path(self.path, self.subfolder or '') if Path(self.path).is_dir() else None

    def weight_file(self) -> Path | None:
        """The safetensors file, if it is one and was loaded before or lies in a folder."""
        if self._local is not None:
            file = self._local / _WEIGHTS
        else:
            from huggingface_hub import try_to_load_from_cache  # diffusers brings it

            name = f'{self.subfolder}/{_WEIGHTS}' if self.subfolder else _WEIGHTS
            cached = try_to_load_from_cache(self.path, name, revision=self.revision)
            file = Path(cached) if isinstance(cached, str) else None
        return file if file is not None and file.is_file() else None

    def _load(self) -> Any:
        path, local = self.path, self._local
        # Hub ids are `owner/name`; anything else that is no folder is a mistyped path, not a reason to ask the network.
        if local is None and (path.startswith(('.', '/', '~')) or path.count('/') != 1):
            raise UserError(f'autoencoder {path!r}: no such folder, and not of the form owner/name of a hub id')
        network_class('AutoencoderKL', path)  # diffusers is there
        if local is not None:
            _check_folder(local, path)
        # Of a folder the place itself: diffusers takes the folder above where there is no such subfolder.
        place = path if local is None else str(local)
        hub: dict[str, Any] = {} if local else {'subfolder': self.subfolder, 'revision': self.revision}
        try:
            kind = network_class(self._class_name(place, hub), path)
            network, report = kind.from_pretrained(
                place,
                use_safetensors=True,  # the other format is a pickle, which can run code when it is loaded
                torch_dtype=torch.float32,
                low_cpu_mem_usage=False,  # else diffusers prints a hint to install accelerate at each load
                output_loading_info=True,
                **hub,
            )
        except OSError as error:
            raise UserError(
                f'autoencoder {path!r}: no autoencoder with safetensors weights could be loaded from there '
                f'({error}). Give a folder with {_CONFIG} and {_WEIGHTS}, or a hub id that is reachable'
            ) from error
        except (RuntimeError, TypeError, ValueError) as error:  # shapes, or settings that make no network
            if isinstance(error, UserError):
                raise
            text = ' '.join(str(error).split())
            raise UserError(f'autoencoder {path!r}: {_CONFIG} and {_WEIGHTS} do not belong together: {text}') from None
        wrong = [f'  {name}: missing' for name in report['missing_keys']]
        wrong += [f'  {name}: no such tensor in this network' for name in report['unexpected_keys']]
        if wrong:
            more = [f'  and {len(wrong) - _LISTED} more'] if len(wrong) > _LISTED else []
            raise UserError(
                f'autoencoder {path!r}: {_WEIGHTS} is not what {_CONFIG} describes; copy both again\n'
                + '\n'.join([*sorted(wrong)[:_LISTED], *more])
            )
        return network

    def _class_name(self, place: str, hub: dict[str, Any]) -> str:
        config: Any = network_class('AutoencoderKL', self.path).load_config(place, **hub)
        name = config.get('_class_name')
        if name in self.classes:
            return name
        reason = f': {_REASONS[name]}' if name in _REASONS else ''
        raise UserError(
            f'autoencoder {self.path!r}: {_CONFIG} says _class_name {name!r}, which cannot be used here{reason}. '
            f'Supported: {", ".join(self.classes)}, files of the latent-diffusion layout and of the taesd repository'
        )


class KL(Folder):
    """An ``AutoencoderKL``, the variational autoencoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752)."""

    classes = ('AutoencoderKL',)


def network_class(name: str, path: str) -> Any:
    """A class of diffusers, imported when first needed (it takes seconds); a ``UserError`` without diffusers."""
    try:
        import diffusers

        return getattr(diffusers, name)
    except ImportError as error:
        raise UserError(
            f"autoencoder {path!r} needs diffusers, which is not installed: pip install 'tread_composer[diffusers]'"
        ) from error


def _check_folder(folder: Path, path: str) -> None:
    """Refuse a folder without configuration or safetensors weights, with what to do about it."""
    if not folder.is_dir():
        parts = ', '.join(sorted(file.parent.name for file in Path(path).glob(f'*/{_CONFIG}'))) or 'none'
        raise UserError(f'autoencoder {path!r}: no subfolder {folder.name!r}; folders in it with a {_CONFIG}: {parts}')
    if not (folder / _CONFIG).is_file():
        nested = sorted(file.parent.name for file in folder.glob(f'*/{_CONFIG}'))
        remedy = f'Give it with {_CONFIG}'
        if 'vae' in nested:
            remedy = 'It is a part of this pipeline: --autoencoder-subfolder vae (in a YAML autoencoder.subfolder: vae)'
        raise UserError(f'autoencoder {path!r}: no {_CONFIG}, without which its architecture is unknown. {remedy}')
    if (folder / _WEIGHTS).is_file() or (folder / f'{_WEIGHTS}.index.json').is_file():
        return
    fault = f'autoencoder {path!r}: no autoencoder with safetensors weights: {_WEIGHTS} is missing'
    target, pickled = folder / _WEIGHTS, folder / 'diffusion_pytorch_model.bin'
    files = sorted(folder.glob('*.safetensors'))
    if pickled.is_file() and not files:
        program = (
            'import sys, torch; from safetensors.torch import save_file; '
            'save_file(torch.load(sys.argv[1], map_location="cpu", weights_only=True), sys.argv[2])'
        )
        remedy = f'{pickled.name} is a pickle, which is not read. Write it anew, without running what it may hold:\n'
        raise UserError(f'{fault}; {remedy}  python -c {shlex.quote(program)} {_quoted(pickled, target)}')
    if len(files) == 1:
        half = ' (rounded to half precision; the manifest will hold its own hash)' if '.fp16.' in files[0].name else ''
        remedy = f'If {files[0].name} is it{half}, give it that name:\n  cp {_quoted(files[0], target)}'
        raise UserError(f'{fault}. {remedy}')
    names = ', '.join(file.name for file in sorted(folder.iterdir())[:_LISTED])
    raise UserError(f'{fault}; the folder holds {names}')


def _quoted(*paths: Path) -> str:
    return ' '.join(shlex.quote(str(path)) for path in paths)
