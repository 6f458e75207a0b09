"""The words of ``python -m tread_composer sweep``; torch is imported only once they are right."""

import argparse
import shlex
from typing import Any

from tread_composer.cli.evaluate import add_measuring, measuring_of
from tread_composer.cli.sample import WEIGHTS, interval, pair, pairs_of
from tread_composer.core.errors import UserError
from tread_composer.core.process import importing

__all__ = ['add_arguments', 'sweep_command']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All options of the command."""
    add = parser.add_argument
    add('path', help='a run folder, a checkpoint in one, or an exported .safetensors')
    add('overrides', nargs='*', default=[], metavar='autoencoder.key=value', help='e.g. autoencoder.path=/data/vae')
    add_measuring(parser)
    add('--out', required=True, help='folder of the rows; the same command goes on where it was interrupted')
    add('--guidance-scale', nargs='+', type=float, default=[1.0], metavar='SCALE', help='(1: none)')
    add('--guidance', nargs='+', metavar='KIND', help='e.g. classifier_free sparse (classifier_free)')
    add('--guidance-interval', nargs='+', type=interval, default=[None], metavar='LOW:HIGH',
        help='or the word none (none)')  # fmt: skip
    add('--interval', nargs='+', type=interval, dest='guidance_interval', help=argparse.SUPPRESS)  # its earlier name
    add('--guidance-settings', nargs='+', default=[], metavar='KEY=VALUE', help='of these kinds, e.g. weak_rate=0.8')
    add('--rates', nargs='+', type=_rates, metavar='STRONG:WEAK',
        help='--strong-rate and --weak-rate of sparse guidance; the word none is classifier-free guidance')  # fmt: skip
    add('--weights', nargs='+', choices=WEIGHTS, default=['ema'], help='(ema)')
    add('--sampler', default='heun', help='(%(default)s)')
    add('--steps', type=int, default=50, help='of the sampler (%(default)s)')
    add('--count', type=int, default=10_000, metavar='N', help='images of each row (%(default)s)')
    add('--samples', type=int, dest='count', help=argparse.SUPPRESS)  # its earlier name
    add('--seed', type=int, default=0, help='image i has the seed SEED + i, as in sample (%(default)s)')
    add('--batch-size', type=int, default=64, help='images drawn together (%(default)s)')


def _rates(text: str) -> tuple[float, float] | None:
    try:
        return pair(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} are no rates; write STRONG:WEAK, or none') from None


def _guidances(options: argparse.Namespace) -> tuple[dict[str, Any], ...]:
    """The kinds of guidance, each with its settings beside it.

    Raises:
        UserError: A kind is unknown, or a setting belongs to none of the kinds.
    """
    from tread_composer.samplers import guidance_defaults

    settings = pairs_of(options.guidance_settings, '--guidance-settings')
    kinds = options.guidance or ([] if options.rates else ['classifier_free'])
    try:
        guidances = [
            {'guidance': kind, **{key: settings[key] for key in guidance_defaults(kind) if key in settings}}
            for kind in kinds
        ]
    except ValueError as error:
        raise UserError(f'--{error}') from None
    unused = sorted(set(settings).difference(*guidances))
    if unused:
        raise UserError(f'--guidance-settings: {", ".join(unused)}: no setting of {", ".join(kinds) or "--rates"}')
    for rates in options.rates or ():
        if rates is None:
            guidances.append({'guidance': 'classifier_free'})
        else:
            guidances.append({'guidance': 'sparse', 'strong_rate': rates[0], 'weak_rate': rates[1]})
    return tuple(guidances)


def sweep_command(options: argparse.Namespace) -> int:
    """Measure, write, print."""
    with importing():
        from tread_composer.evaluate.sweep.drawn import SweepRequest, sweep
        from tread_composer.evaluate.sweep.rows import format_sweep, write_sweep
        from tread_composer.io.ranks import Ranks
        from tread_composer.metrics.measurer import Measurement

    if options.count < 2 or options.seed < 0:
        raise UserError(
            f'--count {options.count}, --seed {options.seed}: there must be at least 2 samples, and the seed must '
            'not be negative'
        )
    request = SweepRequest(
        path=options.path,
        out=options.out,
        guidance_scales=tuple(options.guidance_scale),
        intervals=tuple(options.guidance_interval),
        guidances=_guidances(options),
        weights=tuple(options.weights),
        sampler=options.sampler,
        num_steps=options.steps,
        num_samples=options.count,
        seed=options.seed,
        overrides=pairs_of(options.overrides, 'settings'),
        device=options.device,
        measurement=Measurement(**measuring_of(options)),
    )
    ranks = Ranks.start()
    rows, contract = sweep(request, ranks)
    if ranks.is_first:
        files = write_sweep(rows, options.out, contract, f'python -m tread_composer {shlex.join(_words(options))}')
        print(format_sweep(rows))
        print('\n'.join(f'written: {file}' for file in files))
    return 0


def _words(options: argparse.Namespace) -> list[str]:
    """The command in full, defaults written out."""
    words = ['sweep', options.path, *options.overrides]
    names = {'reference', 'out', 'guidance', 'guidance_scale', 'guidance_interval',
             'guidance_settings', 'rates', 'weights', 'sampler', 'steps', 'count',
             'seed', 'metrics', 'features', 'inception', 'inception_sha256', 'allow_download', 'kid_subset_size',
             'cache', 'batch_size', 'device'}  # fmt: skip
    for name, value in vars(options).items():
        if name not in names or value is None or value is False or value == []:
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [f'--{name.replace("_", "-")}', *(_word(item) for item in values)]
    return words


def _word(value: object) -> str:
    if isinstance(value, tuple):
        return ':'.join(f'{item:g}' for item in value)
    return 'none' if value is None else f'{value:g}' if isinstance(value, float) else str(value)
