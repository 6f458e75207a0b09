"""The command lines of ``streaming_data/``: convert images, import latents, verify a data set, draw its samples.

Exit codes: 0 done; 1 verify: faults; 2 the input is at fault (one message, no traceback); 130 Ctrl-C. A traceback and
1 are a fault of ours. Slow libraries are imported once the words are right.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from tread_composer.cli.parser import Parser
from tread_composer.conversion.settings import ImageSettings, Settings, option_name
from tread_composer.core.errors import UserError
from tread_composer.core.launch import global_rank, prepare_rank, refused

__all__ = ['convert_main', 'import_main', 'inspect_main', 'verify_main']

Words = Sequence[str] | None
_say = functools.partial(print, flush=True)

_CONVERT = """\
Convert images to a latents data set that training streams. The source may be class folders, a flat folder, the
official ILSVRC tars, a zip, webdataset tars or Hugging Face parquet files; which one it is is found out and printed.
Interrupt it whenever you like and run the same command again.
Several GPUs: composer -n 8 streaming_data/convert_imagenet.py ...
"""


def convert_main(arguments: Words = None) -> int:
    """Run ``convert_imagenet.py`` with the words behind its name (of this process if None); returns the exit code."""
    parser = Parser(prog='convert_imagenet.py', description=_CONVERT)
    _add_options(parser, ImageSettings)
    vae = parser.add_mutually_exclusive_group(required=True)
    text = 'autoencoder: folder or hub id of diffusers, or a latent-diffusion checkpoint file'
    vae.add_argument('--autoencoder', '--vae', dest='vae', help=text)
    vae.add_argument('--pixels', action='store_true', help='no autoencoder: keep the pixels')

    def command(options: dict[str, Any]) -> int:
        dry_run = options.pop('dry_run')
        del options['pixels']  # argparse lets exactly one of it and the autoencoder through
        settings = ImageSettings(**options)
        # Before an autoencoder is loaded: the hub is asked for half a minute if its name is mistyped as well.
        if not Path(settings.source).expanduser().exists():
            raise UserError(f'--source {settings.source}: no such file or folder')
        from tread_composer.conversion.convert import convert

        convert(settings, dry_run=dry_run, log=_say)
        return 0

    return _run(parser, arguments, command)


def import_main(arguments: Words = None) -> int:
    """Run ``import_latents.py``; see ``convert_main``."""
    from tread_composer.conversion.importers import ImportSettings, import_latents

    parser = Parser(
        prog='import_latents.py', description='Write latents that other projects have made as a data set of this one.'
    )
    _add_options(parser, ImportSettings)

    def command(options: dict[str, Any]) -> int:
        dry_run = options.pop('dry_run')
        import_latents(ImportSettings(**options), dry_run=dry_run, log=_say)
        return 0

    return _run(parser, arguments, command)


def verify_main(arguments: Words = None) -> int:
    """Run ``verify.py``; see ``convert_main``."""
    parser = Parser(prog='verify.py', description='Check a data set of latents: every file, every sample.')
    parser.add_argument('folder', help='of the data set, or of one split')
    text = 'decode only every K-th sample; all files are still read and hashed (default: 1, every sample)'
    parser.add_argument('--sample-every', type=int, default=1, metavar='K', help=text)

    def command(options: dict[str, Any]) -> int:
        from tread_composer.conversion.verify import verify

        faults = verify(options['folder'], sample_every=options['sample_every'], say=_say)
        for fault in faults:
            print(fault)
        print(f'{len(faults)} fault{"s" * (len(faults) != 1)} found' if faults else 'no fault found')
        return 1 if faults else 0

    return _run(parser, arguments, command)


def inspect_main(arguments: Words = None) -> int:
    """Run ``inspect_latents.py``; see ``convert_main``."""
    parser = Parser(prog='inspect_latents.py', description='Draw samples of a data set as a picture.')
    add = parser.add_argument
    add('folder', type=Path, help='of the data set')
    add('--autoencoder', metavar='PATH', help='folder, hub id or file; pixels need none')
    add('--split', default='train', help='(default: train)')
    add('--count', type=int, default=64, help='of samples (default: 64)')
    add('--mirrored', action='store_true', help='draw the mirrored latents beside each')
    add('--seed', type=int, default=0, help='of the choice of samples (default: 0)')
    add('--out', type=Path, default=Path('samples.png'), help='the picture (default: samples.png)')
    add('--other-weights', action='store_true', help='decode with weights that are not those of the data')
    add('--device', choices=('cuda', 'cpu'), help='(a GPU if there is one)')

    def command(options: dict[str, Any]) -> int:
        from tread_composer.autoencoders import open_autoencoder
        from tread_composer.conversion.draw import draw
        from tread_composer.io.device import choose_device

        split, out, path = options.pop('folder') / options.pop('split'), options.pop('out'), options.pop('autoencoder')
        autoencoder = None if path is None else open_autoencoder(path)
        device = choose_device(options.pop('device'), 0)
        drawn = draw(split, out, autoencoder=autoencoder, device=device, **options)
        print(f'{out}: {len(drawn)} samples')
        return 0

    return _run(parser, arguments, command)


def _add_options(parser: Parser, settings: type[Settings]) -> None:
    """An option for each field of the settings that has a help."""
    for item in fields(settings):
        facts: dict[str, Any] = dict(item.metadata)
        if not facts:
            continue
        facts.pop('least', None)
        flags = facts.pop('names', (option_name(item.name),))
        if flags[0].startswith('-'):
            facts['dest'] = item.name
            facts.setdefault('required', item.default is MISSING)
        if item.default is not MISSING:
            facts['default'] = item.default
            if not {'type', 'action'} & facts.keys() and item.default is not None:
                facts['type'] = type(item.default)
        parser.add_argument(*flags, **facts)
    text = 'print sources, classes, expected size and whether it fits, and write nothing'
    parser.add_argument('--dry-run', action='store_true', help=text)


def _run(parser: Parser, arguments: Words, command: Callable[[dict[str, Any]], int]) -> int:
    try:
        prepare_rank()
        return command(vars(parser.parse_args(arguments)))
    except UserError as error:
        return refused(error)
    except KeyboardInterrupt:
        if global_rank() == 0:
            print('\ninterrupted; finished parts are kept, the same command goes on', file=sys.stderr, flush=True)
        return 130
