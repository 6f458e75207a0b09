"""The command line of the importers: asks for every fact that the files do not carry, and says why."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from tread_composer.autoencoders import open_autoencoder
from tread_composer.conversion.importers.layouts import LAYOUTS, open_layout
from tread_composer.conversion.importers.writing import Facts, import_latents
from tread_composer.conversion.sources.base import read_class_names
from tread_composer.core.errors import UserError

__all__ = ['main']

_REASONS = {
    '--autoencoder-id': 'which autoencoder made the latents; the YAML of a run must name the same',
    '--autoencoder PATH or --autoencoder-hash': 'its weights, so that no other decoder (a fine-tuned one, say) is used',
    '--resolution': 'side of the images in pixels',
    '--crop': "how the images were cropped; 'center' is ADM's, which all these projects use",
    '--num-classes or --class-names': 'how many classes there are: a class may have no sample here; 0 for no labels',
    '--channels or --autoencoder PATH': 'an LMDB holds bytes without a shape (the channels of a latent: 4 for SD-VAE)',
    '--mirrors': "'second-half' if it was extracted with --xflip, 'none' if not: the files look alike",
    '--kind': "'samples' if the values were drawn from the posterior (as CompVis/tread reads them), else 'moments'",
    '--stored-scale': 'what raw latents were multiplied by (CompVis/tread decodes with 1 / 0.18215: give 0.18215)',
    '--stored-shift': 'what was subtracted before that (0 for SD-VAE)',
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 0 done, 2 the input is at fault.

    Args:
        arguments: What stands behind the program's name; that of this process if None.
    """
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='import_latents.py',
        description='Write latents that other projects have made as a data set of this one.',
        allow_abbrev=False,
    )
    parser.add_argument('source', type=Path, help='folder with the files of one split')
    parser.add_argument('--layout', required=True, choices=LAYOUTS)
    parser.add_argument('--out', required=True, type=Path, help='folder of the data set')
    parser.add_argument('--split', required=True, help='train or val')
    parser.add_argument(
        '--files', metavar='PATTERN', help="of tars or safetensors, e.g. '*-train-*.tar' (default: all)"
    )
    parser.add_argument('--autoencoder-id', help='as the manifest is to name it, e.g. stabilityai/sd-vae-ft-ema')
    parser.add_argument('--autoencoder', metavar='PATH', help='folder, hub id or file of it: its hash is computed')
    parser.add_argument('--autoencoder-hash', help='or its hash, as KL(...).weight_hash() prints it')
    parser.add_argument('--resolution', type=int)
    parser.add_argument('--crop', choices=('none', 'center'))
    parser.add_argument('--num-classes', type=int, help='names are then numbers')
    parser.add_argument('--class-names', type=Path, metavar='FILE', help='one name a line, in label order')
    parser.add_argument('--channels', type=int, help='of a latent')
    parser.add_argument('--mirrors', choices=('none', 'second-half'), help='MaskDiT layouts only')
    parser.add_argument('--kind', choices=('moments', 'samples'))
    parser.add_argument('--stored-scale', type=_numbers, metavar='S[,S...]', help='one, or one for each channel')
    parser.add_argument('--stored-shift', type=_numbers, metavar='S[,S...]', help='one, or one for each channel')
    parser.add_argument('--seed', type=int, default=0, help='of the permutation (default: 0)')
    parser.add_argument('--compression', help='of the shards, e.g. zstd:1 (default: none)')
    return parser


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(','))


def _run(options: argparse.Namespace) -> None:
    if not options.source.exists():
        raise UserError(f'{options.source}: no such file or folder')
    _ask(options)
    if options.autoencoder_hash and not re.fullmatch(r'sha256:[0-9a-f]{64}', options.autoencoder_hash):
        raise UserError(
            f'--autoencoder-hash {options.autoencoder_hash}: not of the form sha256:<64 hexadecimal digits>'
        )
    for name in ('resolution', 'channels'):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f'--{name} {getattr(options, name)}: must be at least 1')
    kind = options.kind or ('moments' if options.layout.startswith('maskdit') else 'samples')
    channels, downsampling, weight_hash = options.channels, None, options.autoencoder_hash
    if options.autoencoder:
        autoencoder = open_autoencoder(options.autoencoder)
        channels, downsampling = autoencoder.channels, autoencoder.downsampling
        weight_hash = autoencoder.weight_hash()
        if options.channels not in (None, channels):
            raise UserError(f'--channels {options.channels}: the autoencoder has {channels}')
    facts = Facts(
        kind=kind,
        autoencoder=options.autoencoder_id,
        autoencoder_hash=weight_hash,
        resolution=options.resolution,
        crop=options.crop,
        class_names=_class_names(options),
        channels=channels,
        downsampling=downsampling,
        # MaskDiT and LightningDiT store what the encoder gives; both scale when they read.
        scale=options.stored_scale or (1.0,),
        shift=options.stored_shift or (0.0,),
    )
    layout = open_layout(
        options.layout,
        options.source,
        files=options.files,
        stored_channels=None if channels is None else channels * (2 if kind == 'moments' else 1),
        mirrors=options.mirrors == 'second-half',
    )
    manifest = import_latents(
        layout,
        options.out,
        options.split,
        facts,
        seed=options.seed,
        compression=options.compression,
        say=lambda line: print(line, flush=True),
    )
    print(
        f'{options.out / options.split}: {manifest.num_samples:,} samples of kind {manifest.kind}, latents of shape '
        f'{manifest.latent_shape}{", with mirror images" if manifest.mirrored else ""}; now verify it'
    )


def _ask(options: argparse.Namespace) -> None:
    """Refuse with everything that is missing, and why it is needed; and what has no place here."""
    maskdit = options.layout.startswith('maskdit')
    answers = {
        '--autoencoder-id': options.autoencoder_id is not None,
        '--autoencoder PATH or --autoencoder-hash': bool(options.autoencoder or options.autoencoder_hash),
        '--resolution': options.resolution is not None,
        '--crop': options.crop is not None,
        '--num-classes or --class-names': options.num_classes is not None or options.class_names is not None,
    }
    if options.layout == 'maskdit-lmdb':
        answers['--channels or --autoencoder PATH'] = options.channels is not None or bool(options.autoencoder)
    if maskdit:
        answers['--mirrors'] = options.mirrors is not None
    if options.layout == 'tread-webdataset':
        answers['--kind'] = options.kind is not None
        answers['--stored-scale'] = options.stored_scale is not None
        answers['--stored-shift'] = options.stored_shift is not None
    lines = [f'  {name}: {_REASONS[name]}' for name, is_answered in answers.items() if not is_answered]
    if lines:
        raise UserError('\n'.join([f'the files of layout {options.layout} do not say everything; missing:', *lines]))
    if options.mirrors and not maskdit:
        raise UserError(f'--mirrors belongs to the MaskDiT layouts; {options.layout} says itself what it holds')
    if options.autoencoder and options.autoencoder_hash:
        raise UserError('give --autoencoder or --autoencoder-hash, not both')


def _class_names(options: argparse.Namespace) -> tuple[str, ...]:
    if options.class_names is None:
        if options.num_classes < 0:
            raise UserError(f'--num-classes {options.num_classes}: 0 for data without labels, else the number of them')
        return tuple(str(label) for label in range(options.num_classes))
    names = read_class_names(options.class_names)
    if options.num_classes not in (None, len(names)):
        raise UserError(f'--num-classes {options.num_classes}: {options.class_names} has {len(names)} names')
    return names
