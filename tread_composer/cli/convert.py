"""The command lines of ``streaming_data/``: convert images, import latents, merge data sets, verify, draw samples.

Exit codes as in ``cli.flags``; besides, 1 of verify for faults, and 130 for Ctrl-C. Slow libraries are imported once
the words are right.
"""

import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from tread_composer.cli.flags import run_program
from tread_composer.conversion.settings import ImageSettings, ImportSettings, MergeSettings, is_remote
from tread_composer.core.errors import UserError
from tread_composer.core.launch import global_rank
from tread_composer.core.masking import printable
from tread_composer.core.options import Device, Flag
from tread_composer.data.manifest import MANIFEST_NAME

__all__ = ['convert_main', 'import_main', 'inspect_main', 'merge_main', 'verify_main']

_say = functools.partial(print, flush=True)


def convert_images(settings: ImageSettings, pixels: bool = False, dry_run: bool = False) -> None:
    """Convert images to a latents data set that training streams.

    The source may be class folders, a flat folder, the official ILSVRC tars, a zip, webdataset tars, Hugging Face
    parquet or arrow files, what img2dataset writes or the Python files of CIFAR; it is recognised and printed.
    After an interruption, run the same command again. Several GPUs: composer -n 8
    streaming_data/convert_imagenet.py ...

    Args:
        pixels: No autoencoder: keep the pixels.
        dry_run: Print sources, classes, expected size and whether it fits, and write nothing.

    Example: --source /data/imagenet --out data/imagenet256 --autoencoder stabilityai/sd-vae-ft-ema --resolution 256
    """
    if pixels == (settings.vae is not None):  # both, or neither
        raise UserError('give one of --autoencoder and --pixels')
    # Before an autoencoder is loaded: the hub is asked for half a minute if its name is mistyped as well.
    if not Path(settings.source).exists():
        raise UserError(f'--source {settings.source}: no such file or folder')
    from tread_composer.conversion.conversion import Conversion
    from tread_composer.conversion.encoding import image_encoder

    Conversion(settings, functools.partial(image_encoder, settings), _say).run(dry_run)


def import_stored(settings: ImportSettings, dry_run: bool = False) -> None:
    """Write latents that other projects have made as a data set of this one.

    Args:
        dry_run: Print the source, classes, expected size and whether it fits, and write nothing.

    Example: maskdit/train --layout maskdit-lmdb --channels 4 --mirrors second-half --resolution 256 --crop center
        --autoencoder stabilityai/sd-vae-ft-mse --autoencoder-id stabilityai/sd-vae-ft-mse --num-classes 1000
        --out data/imagenet256 --split train
    """
    from tread_composer.conversion.conversion import Conversion
    from tread_composer.conversion.importers.stored import StoredLatents

    Conversion(settings, functools.partial(StoredLatents, settings), _say).run(dry_run)


def merge_data_sets(settings: MergeSettings, dry_run: bool = False) -> None:
    """Join data sets that independent machines converted to one.

    Classes are joined by name and all samples are permuted anew; the result is the one of a conversion of everything.

    Args:
        dry_run: Print the data sets, classes, expected size and whether it fits, and write nothing.

    Example: data/first data/second --out data/all
    """
    from tread_composer.conversion.conversion import Conversion
    from tread_composer.conversion.importers.data_sets import DataSets

    Conversion(settings, functools.partial(DataSets, settings), _say).run(dry_run)


def verify_folder(folder: Annotated[str, Flag('FOLDER')]) -> int:
    """Check a data set of latents: every file, every sample.

    Args:
        folder: Folder or URL of the data set, or of one split.

    Example: data/imagenet256
    """
    from tread_composer.conversion.verify import verify

    faults = verify(os.path.expanduser(folder), say=_say)
    for fault in faults:
        print(printable(fault))
    print(f'{len(faults)} fault{"s" * (len(faults) != 1)} found' if faults else 'no fault found')
    return 1 if faults else 0


def draw_samples(
    folder: Annotated[str, Flag('FOLDER')],
    autoencoder: str | None = None,
    split: str = 'train',
    count: Annotated[int, Ge(1)] = 64,
    mirrored: bool = False,
    seed: Annotated[int, Ge(0)] = 0,
    out: Path = Path('samples.png'),
    device: Device | None = None,
) -> None:
    """Draw samples of a data set as a picture.

    Args:
        folder: Folder of the data set.
        autoencoder: Folder, hub id or file; pixels need none.
        split: Which split.
        count: How many samples.
        mirrored: Draw the mirrored latents beside each.
        seed: Seed of the choice of samples.
        out: The picture.
        device: Where to decode (a GPU if there is one).

    Example: data/imagenet256 --autoencoder stabilityai/sd-vae-ft-ema --split val
    """
    from tread_composer.autoencoders import open_autoencoder
    from tread_composer.conversion.draw import draw
    from tread_composer.io.device import choose_device

    place, out = Path(folder).expanduser(), out.expanduser()
    if is_remote(folder):
        raise UserError(f'{folder} is a URL; give the folder of a data set on this machine')
    if not (place / split).is_dir() and (place / MANIFEST_NAME).is_file():
        raise UserError(f'{place}: is one split; give the folder of the whole data set, {place.parent}, and --split')
    samples = draw(
        place / split,
        out,
        autoencoder=None if autoencoder is None else open_autoencoder(os.path.expanduser(autoencoder)),
        count=count,
        mirrored=mirrored,
        seed=seed,
        device=choose_device(device, 0),
    )
    print(f'{out}: {len(samples)} samples')


def _program(command: Callable[..., Any], name: str, words: Sequence[str] | None = None) -> int:
    try:
        return run_program(command, name, words)
    except KeyboardInterrupt:
        if global_rank() == 0:
            print('\ninterrupted; finished parts are kept, the same command goes on', file=sys.stderr, flush=True)
        return 130


# Each takes the words behind the program's name (those of this process by default) and returns the exit code.
convert_main = functools.partial(_program, convert_images, 'convert_imagenet.py')
import_main = functools.partial(_program, import_stored, 'import_latents.py')
merge_main = functools.partial(_program, merge_data_sets, 'merge.py')
verify_main = functools.partial(_program, verify_folder, 'verify.py')
inspect_main = functools.partial(_program, draw_samples, 'inspect_latents.py')
