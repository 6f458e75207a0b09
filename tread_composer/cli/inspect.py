"""The words of ``python -m tread_composer inspect``; Composer and matplotlib are imported only once they are right."""

import argparse
import shlex

from tread_composer.cli.sample import WEIGHTS
from tread_composer.core.process import importing

__all__ = ['add_arguments', 'inspect_command']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All options of the command."""
    add = parser.add_argument
    add('path', help="a run's folder (its latest checkpoint), a checkpoint in one, or an exported .safetensors")
    add('--data', metavar='FOLDER', help="latents to look at the network with (the run's own, evaluation split)")
    add('--times', nargs='+', type=float, default=[0.2, 0.5, 0.8], help='from 0, data, to 1, noise (0.2 0.5 0.8)')
    add('--count', type=int, default=64, metavar='N', help='latents to look at (%(default)s)')
    add('--samples', type=int, dest='count', help=argparse.SUPPRESS)  # its earlier name
    add('--weights', choices=WEIGHTS, default='ema', help='(%(default)s)')
    add('--out', default='inspection', metavar='FOLDER', help='for the picture and the numbers (%(default)s)')
    add('--batch-size', type=int, default=16, metavar='N', help='samples in one network call (%(default)s)')
    add('--device', choices=('cuda', 'cpu'), help='(a GPU if there is one)')


def inspect_command(options: argparse.Namespace) -> int:
    """Look, write, print.

    Raises:
        UserError: The words contradict each other, or what they name is at fault.
    """
    with importing():
        from tread_composer.advisor.inspection import Request, inspect_run
        from tread_composer.advisor.output import format_inspection, write_inspection

    request = Request(
        path=options.path,
        data=options.data,
        times=tuple(options.times),
        samples=options.count,
        weights=options.weights,
        batch_size=options.batch_size,
        device=options.device,
    )
    inspection = inspect_run(request)
    files = write_inspection(inspection, options.out, f'python -m tread_composer {shlex.join(options.words)}')
    print(format_inspection(inspection))
    print('\n'.join(['', *(f'written: {file}' for file in files)]))
    return 0
