"""The words of ``python -m tread_composer sweep``; torch is imported only once they are right."""

import argparse
import shlex
from typing import Any

from tread_composer.cli.evaluate import add_measuring, measuring_of
from tread_composer.cli.sample import WEIGHTS, pairs_of
from tread_composer.core.errors import UserError
from tread_composer.core.process import importing

__all__ = ['add_arguments', 'sweep_command']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All options of the command."""
    add = parser.add_argument
    add('path', help='a run folder, a checkpoint in one, or an exported .safetensors')
    add('overrides', nargs='*', metavar='autoencoder.key=value', help='e.g. autoencoder.path=/data/vae')
    add_measuring(parser)
    add('--out', required=True, help='folder of the rows; the same command goes on where it was interrupted')
    add('--guidance-scale', nargs='+', type=float, default=[1.0], metavar='SCALE', help='(1: none)')
    add('--interval', nargs='+', type=_interval, default=[None], metavar='LOW:HIGH', help='or the word none (none)')
    add('--rates', nargs='+', type=_rates, default=[None], metavar='STRONG:WEAK',
        help='of sparse guidance; the word none is classifier-free guidance (none)')  # fmt: skip
    add('--weights', nargs='+', choices=WEIGHTS, default=['ema'], help='(ema)')
    add('--sampler', default='heun', help='(%(default)s)')
    add('--steps', type=int, default=50, help='of the sampler (%(default)s)')
    add('--samples', type=int, default=10_000, metavar='N', help='images of each row (%(default)s)')
    add('--seed', type=int, default=0, help='image i has the seed SEED + i, as in sample (%(default)s)')
    add('--batch-size', type=int, default=64, help='images drawn together (%(default)s)')


def _pair(text: str) -> tuple[float, float] | None:
    if text == 'none':
        return None
    low, colon, high = text.partition(':')
    if not colon:
        raise ValueError(text)
    return float(low), float(high)


def _interval(text: str) -> tuple[float, float] | None:
    try:
        return _pair(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} is no interval; write LOW:HIGH, or none') from None


def _rates(text: str) -> tuple[float, float] | None:
    try:
        return _pair(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} are no rates; write STRONG:WEAK, or none') from None


def _guidance(rates: tuple[float, float] | None) -> dict[str, Any]:
    """The kind of guidance that ``--rates`` stands for, and its settings."""
    if rates is None:
        return {'guidance': 'classifier_free'}
    return {'guidance': 'sparse', 'strong_rate': rates[0], 'weak_rate': rates[1]}


def sweep_command(options: argparse.Namespace) -> int:
    """Measure, write, print."""
    with importing():
        from tread_composer.evaluate.sweep.drawn import SweepRequest, sweep
        from tread_composer.evaluate.sweep.rows import format_sweep, write_sweep
        from tread_composer.io.ranks import Ranks
        from tread_composer.metrics.measurer import Measurement

    if options.samples < 2 or options.seed < 0:
        raise UserError(
            f'--samples {options.samples}, --seed {options.seed}: there must be at least 2 samples, and the seed must '
            'not be negative'
        )
    request = SweepRequest(
        path=options.path,
        out=options.out,
        guidance_scales=tuple(options.guidance_scale),
        intervals=tuple(options.interval),
        guidances=tuple(_guidance(pair) for pair in options.rates),
        weights=tuple(options.weights),
        sampler=options.sampler,
        num_steps=options.steps,
        num_samples=options.samples,
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
    names = {'reference', 'out', 'guidance_scale', 'interval', 'rates', 'weights', 'sampler', 'steps', 'samples',
             'seed', 'metrics', 'features', 'inception', 'inception_sha256', 'allow_download', 'kid_subset_size',
             'cache', 'batch_size', 'device'}  # fmt: skip
    for name, value in vars(options).items():
        if name not in names or value is None or value is False:
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [f'--{name.replace("_", "-")}', *(_word(one) for one in values)]
    return words


def _word(value: object) -> str:
    if isinstance(value, tuple):
        return ':'.join(f'{one:g}' for one in value)
    return 'none' if value is None else f'{value:g}' if isinstance(value, float) else str(value)
