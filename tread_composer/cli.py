"""The commands: ``python -m tread_composer train|plan|snr|schema``. ``composer train.py x.yaml`` is ``train``.

Exit codes: 0 done; 2 the input is at fault (one message on rank 0, no traceback); 1 a fault of ours (traceback).
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from tread_composer.errors import UserError

__all__ = ['main']

_PATIENCE = 20.0  # seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code.

    Args:
        arguments: What stands behind the program's name; that of this process if None.
    """
    try:
        return _run(arguments)
    except UserError as error:
        return _refused(error)


def _run(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    # argparse stops collecting `key=value` at the first option; what stands behind one is picked up here.
    options, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith('-') or '=' not in word]
    if unknown or (rest and not hasattr(options, 'overrides')):
        hint = '; a setting is written key=value, without dashes' if any('=' in word for word in unknown) else ''
        parser.error(f'unrecognized arguments: {" ".join(unknown or rest)}{hint}')
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options.command(options)


class _Parser(argparse.ArgumentParser):
    """Wrong words are refused as everything else is: with several ranks, by one message."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f'{self.format_usage().rstrip()}\n{message}')


def _ranks(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is no number of processes; give 1 or more')
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog='tread_composer', description='Train diffusion transformers with token routing.')
    commands = parser.add_subparsers(required=True, metavar='command')

    def add(name: str, function: object, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=function)
        return command

    for name, function, text in (
        ('train', _train, 'train what a YAML file describes; several ranks: composer -n 2 train.py x.yaml'),
        ('plan', _plan, 'print what a YAML file would do, and write nothing'),
    ):
        command = add(name, function, text)
        command.add_argument('yaml', help='the file, for example yamls/digits_tread.yaml')
        command.add_argument('overrides', nargs='*', metavar='key=value', help='for example optimizer.lr=2e-4')
        if name == 'plan':
            command.add_argument('--json', action='store_true', help='figures and resolved configuration as JSON')
            command.add_argument('--ranks', type=_ranks, help='plan for this many processes (default: as launched)')
    command = add('snr', _snr, 'draw what signal-to-noise ratios YAML files train on, and print their figures')
    command.add_argument('yamls', nargs='+', metavar='yaml', help='files, then key=value settings for all of them')
    command.add_argument('--out', default='snr.png', help='the PNG to write (default: snr.png)')
    command.add_argument('--std', type=float, help='of the latents as the network sees them, where the data are absent')
    command.set_defaults(overrides=[])
    add('schema', _schema, 'print the JSON schema of a YAML file, for editors')
    return parser


def _train(options: argparse.Namespace) -> int:
    from tread_composer.train import train  # Composer's import takes seconds: not before the arguments are right

    train(options.yaml, options.overrides)
    return 0


def _plan(options: argparse.Namespace) -> int:
    from tread_composer.config import load_config
    from tread_composer.plan import format_plan, make_plan
    from tread_composer.run_data import with_planned_numbers
    from tread_composer.train import data_state, world_size

    ranks = world_size() if options.ranks is None else options.ranks
    config = load_config(options.yaml, options.overrides, world_size=ranks)
    state, problem = data_state(config)
    plan = make_plan(config, ranks)
    config = with_planned_numbers(config)
    if options.json:
        print(json.dumps({**plan, 'data': state, 'config': config.to_dict()}, indent=2))
    else:
        print(format_plan(config, plan, state))
    if problem is not None:
        raise problem
    return 0


def _snr(options: argparse.Namespace) -> int:
    from tread_composer.config import load_config
    from tread_composer.snr import draw_snr, format_snr, make_snr

    files = [word for word in options.yamls if '=' not in word]
    overrides = [*(word for word in options.yamls if '=' in word), *options.overrides]
    if not files:
        raise UserError('snr: give a YAML file before the settings, for example yamls/digits.yaml')
    curves = [make_snr(load_config(file, overrides), options.std) for file in files]
    draw_snr(curves, options.out)
    print(format_snr(curves, options.out))
    return 0


def _schema(options: argparse.Namespace) -> int:
    from tread_composer.config import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0


def _refused(error: UserError) -> int:
    from composer.utils import dist

    if dist.get_global_rank() == 0:
        sys.stdout.flush()
        print(error, file=sys.stderr, flush=True)
    else:
        # The launcher stops all ranks as soon as one of them ends, and rank 0 must have printed before. It is stopped
        # within this wait; if not, rank 0 was not refused, and this rank ends the run.
        time.sleep(_PATIENCE)
        print(f'rank {dist.get_global_rank()}: {error}', file=sys.stderr, flush=True)
    return 2


if __name__ == '__main__':
    sys.exit(main())
