"""Small folders of JPEGs, small autoencoders, and reading back what a conversion wrote."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from streaming import LocalDataset, StreamingDataset

from tests.runs import ROOT
from tread_composer.conversion.squares import read_image
from tread_composer.data.registration import numbered_in_turn

SCRIPT = str(ROOT / 'streaming_data' / 'convert_imagenet.py')
CLASSES = ('n01440764', 'n01443537', 'n02099601')


def make_images(folder: Path, count: int, size: int = 40, classes: tuple[str, ...] = CLASSES, seed: int = 0) -> Path:
    """``count`` smooth random JPEGs, distributed over class folders; without classes in one folder."""
    random = np.random.default_rng(seed)
    for index in range(count):
        name = f'{classes[index % len(classes)]}_{index}.JPEG' if classes else f'{index:04d}.JPEG'
        place = folder / classes[index % len(classes)] if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        colours = Image.fromarray(random.integers(0, 255, (5, 5, 3), dtype=np.uint8))
        width, height = size + index % 7, size + index % 3
        colours.resize((width, height), Image.Resampling.BICUBIC).save(place / name, 'JPEG', quality=95)
    return folder


def make_vae(folder: Path, *, levels: int = 2, channels: int = 3, seed: int = 0, **save: Any) -> str:
    """A random ``AutoencoderKL`` on disk with downsampling ``2 ** (levels - 1)``."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    blocks = {'down_block_types': ['DownEncoderBlock2D'] * levels, 'up_block_types': ['UpDecoderBlock2D'] * levels}
    network = AutoencoderKL(block_out_channels=[4] * levels, norm_num_groups=2, latent_channels=channels, **blocks)
    network.save_pretrained(folder, **save)
    return str(folder)


def make_tiny(folder: Path, seed: int = 0) -> str:
    """A random ``AutoencoderTiny`` with 5 channels and downsampling 4."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(seed)
    widths = {f'{part}_block_out_channels': (8, 8, 8) for part in ('encoder', 'decoder')}
    blocks = {f'num_{part}_blocks': (1, 1, 1) for part in ('encoder', 'decoder')}
    AutoencoderTiny(latent_channels=5, **widths, **blocks).save_pretrained(folder)
    return str(folder)


def make_dc(folder: Path) -> str:
    """A random ``AutoencoderDC`` with 8 channels and downsampling 4."""
    from diffusers import AutoencoderDC

    torch.manual_seed(0)
    parts: dict[str, Any] = {}
    for part in ('encoder', 'decoder'):
        parts |= {f'{part}_block_out_channels': (8, 8, 16), f'{part}_layers_per_block': (1, 1, 1)}
        parts[f'{part}_block_types'] = 'ResBlock'
    AutoencoderDC(latent_channels=8, **parts).save_pretrained(folder)
    return str(folder)


def read(folder: Path) -> dict[str, Any]:
    """All samples of a split in their order: column -> array (names: list)."""
    if list(folder.rglob('*.zstd')):
        with numbered_in_turn():
            data = StreamingDataset(local=str(folder), batch_size=1)
        rows = [data[index] for index in range(data.size)]
    else:
        rows = list(LocalDataset(str(folder)))  # needs no shared memory, for which other suites on this machine compete
    columns = {key: np.stack([row[key] for row in rows]) for key in rows[0] if key not in ('name', 'label')}
    return {**columns, 'name': [row['name'] for row in rows], 'label': [int(row['label']) for row in rows]}


def pixels_of(source: Path, names: list[str], resolution: int = 16) -> torch.Tensor:
    """The squares of images in [-1, 1], float32 ``[B, 3, R, R]``."""
    squares = [read_image((source / name).read_bytes(), resolution).values for name in names]
    return torch.from_numpy(np.stack(squares)).float() / 127.5 - 1


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / 'manifest.json').read_text())


def digests(folder: Path) -> dict[str, str]:
    """Path -> hash of every file that is data or describes it."""
    files = [path for path in sorted(folder.rglob('*')) if path.is_file() and path.name != '.lock']
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def words(source: Path, out: Path | str, vae: str | None, **options: Any) -> list[str]:
    """Arguments of the command; ``name=value`` as ``--name value``, True as a flag."""
    given = ['--source', str(source), '--out', str(out), *(['--pixels'] if vae is None else ['--vae', vae])]
    for name, value in {'resolution': 16, 'batch_size': 4, 'part_size': 10, 'workers': 0, **options}.items():
        given += [f'--{name.replace("_", "-")}', *([] if value is True else [str(value)])]
    return given
