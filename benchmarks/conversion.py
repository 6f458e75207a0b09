"""How much of the encoder's own speed a conversion keeps: ``python benchmarks/conversion.py``.

In one run, in turns, with the same number of threads: (A) the encoder alone on batches that lie decoded in memory,
(B) the whole conversion of a folder of JPEGs (listing, decoding in worker processes, encoding, writing, merging). The
ratio B / A is the figure. The autoencoder has random weights; its widths set how expensive it is against a JPEG.
"""

import argparse
import functools
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tread_composer.core.process import prepare_process

prepare_process()  # before torch is loaded, and MLflow

import numpy as np
import torch
from PIL import Image

from tread_composer.conversion.conversion import Conversion
from tread_composer.conversion.encoding import Encoder, image_encoder
from tread_composer.conversion.settings import ImageSettings
from tread_composer.conversion.squares import read_image
from tread_composer.io.device import available_cores, choose_device, machine_for


def make_images(folder: Path, count: int) -> None:
    """JPEGs of ImageNet's typical size, 500 x 375 and about 110 kB, in ten class folders."""
    random = np.random.default_rng(0)
    for index in range(count):
        place = folder / f'class{index % 10}'
        place.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 255, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.float32)
        noisy = (smooth + random.normal(0, 12, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(place / f'{index:06d}.JPEG', quality=90)


def make_vae(folder: Path, widths: list[int]) -> None:
    from diffusers import AutoencoderKL  # type: ignore[attr-defined]

    levels = len(widths)
    torch.manual_seed(0)
    blocks: dict[str, Any] = {
        'block_out_channels': widths,
        'down_block_types': ['DownEncoderBlock2D'] * levels,
        'up_block_types': ['UpDecoderBlock2D'] * levels,
    }
    AutoencoderKL(**blocks, norm_num_groups=8, mid_block_add_attention=False).save_pretrained(folder)


def encoder_alone(encoder: Encoder, batches: list[torch.Tensor], rounds: int) -> float:
    """Images/s. Each result is waited for only when the next batch is under way, as in the conversion."""
    began, before = time.perf_counter(), None
    for _ in range(rounds):
        for images in batches:
            now = encoder(images, 'train', list(range(len(images))))
            if before is not None:
                before()
            before = now
    assert before is not None
    before()
    return rounds * sum(map(len, batches)) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=96)
    parser.add_argument('--resolution', type=int, default=256)
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--workers', type=int, default=1)
    parser.add_argument('--widths', type=int, nargs='+', default=[8, 16, 16], help='channels of the autoencoder')
    parser.add_argument('--autoencoder', '--vae', dest='vae', help='a real autoencoder instead')
    parser.add_argument('--source', help='a folder of class folders with JPEGs instead of images made here')
    parser.add_argument('--precision', choices=('fp32', 'bf16'), default='fp32')
    parser.add_argument('--repeats', type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = Path(options.source or folder / 'in')
        if options.source is None:
            make_images(source, options.images)
        files = sorted(source.glob('*/*'))
        if options.vae is None:
            make_vae(folder / 'vae', options.widths)
        vae = options.vae or str(folder / 'vae')
        size = {name: getattr(options, name) for name in ('resolution', 'batch_size', 'workers', 'precision')}
        device = choose_device(None, 0)
        paths = files[: 2 * options.batch_size]
        began = time.perf_counter()
        decoded = np.stack([read_image(path.read_bytes(), options.resolution).values for path in paths])
        decoding = len(paths) / (time.perf_counter() - began)
        batches = list(torch.from_numpy(decoded).split(options.batch_size))
        rows = []
        for repeat in range(options.repeats):
            settings = ImageSettings(source=str(source), out=str(folder / f'out{repeat}'), vae=vae, **size)
            with machine_for(device, options.workers, 1):
                threads, encoder = torch.get_num_threads(), image_encoder(settings, device)
                encoder_alone(encoder, batches, 1)  # warm
                alone = encoder_alone(encoder, batches, max(1, len(files) // len(paths)))
            began = time.perf_counter()
            Conversion(settings, functools.partial(image_encoder, settings), lambda line: None).run()
            rows.append((alone, len(files) / (time.perf_counter() - began)))
    print(
        f'{platform.processor() or platform.machine()}, {available_cores()} cores, torch {torch.__version__}, {device}'
    )
    print(f'{len(files)} images of {source.name} to {options.resolution} x {options.resolution}, both views, batches '
          f'of {options.batch_size}, {options.precision}; {threads} encoder threads, {options.workers} workers; '
          f'decoding alone {decoding:.0f} images/s per core')  # fmt: skip
    print('repeat | encoder alone | whole conversion | ratio')
    for repeat, (alone, whole) in enumerate(rows):
        print(f'{repeat:6d} | {alone:9.2f} i/s | {whole:12.2f} i/s | {whole / alone:.3f}')
    print(f'median of the ratios: {statistics.median(whole / alone for alone, whole in rows):.3f}')


if __name__ == '__main__':
    main()
