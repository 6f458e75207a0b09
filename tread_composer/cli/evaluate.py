"""The words of ``python -m tread_composer evaluate``; torch is imported only once they are right."""

import argparse
import functools
import shlex
from pathlib import Path
from typing import Any

from tread_composer.cli.sample import WEIGHTS, OrReference, add_sampling, add_weak, pairs_of, sampling_of
from tread_composer.core.errors import UserError
from tread_composer.core.process import importing
from tread_composer.metrics import FEATURES, METRICS

__all__ = ['add_arguments', 'add_measuring', 'evaluate_command', 'measuring_of']


def add_measuring(parser: argparse.ArgumentParser) -> None:
    """The options of what is measured, and with what."""
    add = parser.add_argument
    add('--reference', required=True, help='folder of images, npz of the ADM suite, MDS images, or digits')
    add('--metrics', nargs='+', choices=OrReference(METRICS), default=['fid'], help='prc: precision and recall (fid)')
    add('--features', choices=OrReference(FEATURES), default='inception', help='(%(default)s)')
    add('--inception', metavar='FILE', help="Inception's weights; prefetch says what that is")
    add('--inception-sha256', metavar='HASH', help='of other weights than the published ones')
    add('--allow-download', action='store_true', help="fetch Inception's weights if they are not here")
    add('--kid-subset-size', type=int, default=1000, metavar='N', help='(%(default)s)')
    add('--cache', metavar='FOLDER', help="of the reference's features (~/.cache/tread_composer)")
    add('--device', choices=('cuda', 'cpu'), help='(a GPU if there is one)')


def measuring_of(options: argparse.Namespace) -> dict[str, Any]:
    """What the words of ``add_measuring`` mean, by the names of a ``Measurement``.

    Raises:
        UserError: A number is out of range.
    """
    if options.batch_size < 1 or options.kid_subset_size < 2:
        raise UserError(
            f'--batch-size {options.batch_size}, --kid-subset-size {options.kid_subset_size}: at least 1 and 2'
        )
    names = ('reference', 'features', 'inception', 'inception_sha256', 'allow_download', 'kid_subset_size')
    settings = {name: getattr(options, name) for name in names}
    if options.cache:
        settings['cache'] = Path(options.cache)
    return {**settings, 'metrics': tuple(dict.fromkeys(options.metrics)), 'batch_size': options.batch_size}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All options of the command."""
    add = parser.add_argument
    add('path', help='images (folder, npz, MDS, folder of sample), or a run folder, a checkpoint, a .safetensors')
    add(
        'overrides',
        nargs='*',
        default=[],
        metavar='autoencoder.key=value',
        help='of a model, e.g. autoencoder.path=/data/vae',
    )
    add_measuring(parser)
    add('--describe', nargs='+', default=[], metavar='KEY=VALUE',
        help='how images were made that do not say it: weights=ema seed=0 sampling.sampler=heun ...')  # fmt: skip
    add('--out', metavar='FILE', help='of the numbers (results.json in the folder of the run or the samples)')
    add('--batch-size', type=int, default=64, help='images in one call of a network (%(default)s)')
    model = parser.add_argument_group('of a model, which is sampled first')
    model.add_argument('--count', type=int, metavar='N', help='images, classes in turn; published numbers are of 50000')
    model.add_argument('--weights', choices=WEIGHTS, help='(ema)')
    model.add_argument('--seed', type=int, help='of the first image; the next ones count on (0)')
    model.add_argument('--samples-folder', metavar='FOLDER', help='of the images (one in the folder of the run)')
    model.add_argument('--samples', dest='samples_folder', help=argparse.SUPPRESS)  # its earlier name
    add_weak(model)
    add_sampling(parser)


def evaluate_command(options: argparse.Namespace) -> int:
    """Measure, write, print.

    Raises:
        UserError: The words contradict each other, or what they name is at fault.
    """
    with importing():
        from tread_composer.evaluate.measuring import evaluate_model, evaluate_samples
        from tread_composer.evaluate.publish import format_entries, publish
        from tread_composer.evaluate.samples import folder_of, is_model
        from tread_composer.metrics.measurer import Measurement
        from tread_composer.sample.request import SamplesRequest
        from tread_composer.samplers import SamplingSettings

    log = functools.partial(print, flush=True)
    measurement = Measurement(**measuring_of(options))
    if is_model(options.path):
        if options.describe:
            raise UserError(f'--describe: {options.path} is a model, whose samples say so themselves; leave it out')
        request = SamplesRequest(
            path=options.path,
            out=Path(),
            weights=options.weights or 'ema',
            sampling=sampling_of(options),
            weak=options.weak,
            weak_weights=options.weak_weights,
            count=options.count,
            seed=options.seed or 0,
            batch_size=options.batch_size,
            device=options.device,
            overrides=pairs_of(options.overrides, 'settings'),
        )
        entries, place = evaluate_model(request, measurement, samples=options.samples_folder, log=log)
    else:
        foreign = [
            f'--{name.replace("_", "-")}'
            for name in ('count', 'weights', 'seed', 'samples_folder', 'weak')
            if getattr(options, name) is not None
        ]
        foreign += options.overrides
        foreign += ['the options of sampling'] if sampling_of(options) != SamplingSettings() else []
        if foreign:
            raise UserError(f'{", ".join(foreign)}: of a model that is sampled first, and {options.path} holds images')
        entries = evaluate_samples(
            options.path, measurement, describe=pairs_of(options.describe, '--describe'), device=options.device, log=log
        )
        place = folder_of(options.path)
    if entries:
        print(format_entries(entries))
        command = f'python -m tread_composer {shlex.join(options.words)}'
        publish(entries, options.path, command, grid=place / 'grid.png', out=options.out, log=log)
    return 0
