"""The command line of ``streaming_data/convert_imagenet.py``.

Exit codes: 0 done; 2 the input is at fault (one message, no traceback); 1 a fault of ours (traceback); 130 Ctrl-C.
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tread_composer.conversion.settings import PRECISIONS, STORES, Settings
from tread_composer.core.errors import UserError
from tread_composer.core.launch import global_rank, prepare_rank, refused

__all__ = ['main']

_DESCRIPTION = """\
Convert images to a latents data set that training streams. The source may be class folders, a flat folder, the
official ILSVRC tars, a zip, webdataset tars or Hugging Face parquet files; which one it is is found out and printed.
Interrupt it whenever you like and run the same command again.
Several GPUs: composer -n 8 streaming_data/convert_imagenet.py ...
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the conversion; returns the exit code.

    Args:
        arguments: What stands behind the program's name; that of this process if None.
    """
    try:
        prepare_rank()
        options = vars(_parser().parse_args(arguments))
        dry_run, pixels = options.pop('dry_run'), options.pop('pixels')
        assert pixels == (options['vae'] is None)  # argparse lets exactly one of them through
        options['splits'] = None if options['splits'] is None else tuple(options['splits'])
        settings = Settings(**options)
        # Before an autoencoder is loaded: the hub is asked for half a minute if its name is mistyped as well.
        if not Path(settings.source).expanduser().exists():
            raise UserError(f'--source {settings.source}: no such file or folder')
        from tread_composer.conversion.convert import convert  # takes seconds: not before the arguments are right

        convert(settings, dry_run=dry_run, log=functools.partial(print, flush=True))
        return 0
    except UserError as error:
        return refused(error)
    except KeyboardInterrupt:
        if global_rank() == 0:
            print('\ninterrupted; finished parts are kept, the same command goes on', file=sys.stderr, flush=True)
        return 130


class _Parser(argparse.ArgumentParser):
    """Wrong words are refused as everything else is: with several ranks, by one message."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f'{self.format_usage().rstrip()}\n{message}')


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog='convert_imagenet.py', description=_DESCRIPTION)
    defaults = Settings  # a dataclass keeps its defaults as attributes of the class
    add = parser.add_argument
    add('--source', required=True, help='folder or archive with the images')
    add('--out', required=True, help='folder of the data set, or a URL that streaming uploads to (s3://...)')
    vae = parser.add_mutually_exclusive_group(required=True)
    vae.add_argument(
        '--autoencoder',
        '--vae',
        dest='vae',
        help='autoencoder: folder or hub id of diffusers, or a latent-diffusion checkpoint file',
    )
    vae.add_argument('--pixels', action='store_true', help='no autoencoder: keep the pixels')
    add('--resolution', type=int, default=defaults.resolution, help='side of the square images (%(default)s)')
    add('--vae-subfolder', help='where in --vae the autoencoder lies, e.g. vae')
    add('--vae-revision', help='commit of a hub id; name one for results that can be repeated')
    add('--vae-id', help='what the manifest calls it (the hub id, or the name of the folder or file)')
    add('--store', choices=STORES, default=defaults.store,
        help='moments: mean and log-variance, sampled anew each time training reads them (default)')  # fmt: skip
    add('--no-mirror', dest='mirror', action='store_false', help='do not store the mirrored images')
    add('--precision', choices=PRECISIONS, default=defaults.precision,
        help='of the encoder: fp32 without TF32 (default), or autocast to bf16')  # fmt: skip
    add('--batch-size', type=int, default=defaults.batch_size, help='images per encoder call (%(default)s)')
    add('--workers', type=int,
        help='decoding processes per rank (its cores but one; without a GPU an eighth of them)')  # fmt: skip
    add('--device', choices=('cuda', 'cpu'), help='where to encode (a GPU if there is one)')
    add('--seed', type=int, default=defaults.seed, help='of the one permutation before writing (%(default)s)')
    add('--splits', nargs='+', type=str, metavar='SPLIT', help='e.g. train val (all that the source has)')
    add('--held-out', type=int, default=defaults.held_out, metavar='N',
        help='take N images out of train for val, where there is none (0: no evaluation split)')  # fmt: skip
    add('--part-size', type=int, default=defaults.part_size,
        help='images that are finished, or after an interruption made anew, together (%(default)s)')  # fmt: skip
    add('--compression', help='e.g. zstd:3; saves at most 7%% of latents, so none by default')
    add('--max-unreadable', type=float, default=defaults.max_unreadable, metavar='SHARE',
        help='stop if more images of a split than this share are unreadable (%(default)s)')  # fmt: skip
    add('--work', metavar='FOLDER', help='with a URL as --out: local folder that remembers what is done')
    add('--ground-truth', metavar='FILE', help='labels of the validation images, where the source does not say')
    add('--class-names', metavar='FILE', help='class names in label order, one a line, where the source has none')
    add('--dry-run', action='store_true',
        help='print sources, classes, expected size and whether it fits, and write nothing')  # fmt: skip
    return parser


if __name__ == '__main__':
    sys.exit(main())
