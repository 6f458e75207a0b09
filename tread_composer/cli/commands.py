"""The commands of ``python -m tread_composer`` (its ``--help`` lists them). ``composer train.py x.yaml`` is ``train``.

The parser needs the standard library alone. A command's modules are imported inside of it, once its words are right.

Exit codes: 0 done; 2 the input is at fault (one message on rank 0, no traceback); 1 a fault of ours (traceback).
"""

import argparse
import functools
import json
import os
import select
import shlex
import signal
import sys
import warnings
from collections.abc import Sequence

from tread_composer import __version__
from tread_composer.cli.evaluate import add_arguments as add_evaluate_arguments
from tread_composer.cli.evaluate import evaluate_command
from tread_composer.cli.inspect import add_arguments as add_inspect_arguments
from tread_composer.cli.inspect import inspect_command
from tread_composer.cli.inspect_model import add_arguments as add_inspect_model_arguments
from tread_composer.cli.inspect_model import inspect_model_command
from tread_composer.cli.parser import Parser
from tread_composer.cli.sample import WEIGHTS
from tread_composer.cli.sample import add_arguments as add_sample_arguments
from tread_composer.cli.sweep import add_arguments as add_sweep_arguments
from tread_composer.cli.sweep import sweep_command
from tread_composer.core.errors import UserError
from tread_composer.core.launch import prepare_rank, refused, world_size
from tread_composer.core.process import importing, prepare_process

__all__ = ['main']


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code.

    Args:
        arguments: What stands behind the program's name; that of this process if None.
    """
    prepare_process()
    try:
        prepare_rank()
        code = _run(arguments)
        sys.stdout.flush()  # here, where a reader that is gone can still be handled
        return code
    except UserError as error:
        return refused(error)
    except BrokenPipeError:
        if arguments is not None or not _is_unread(sys.stdout.fileno()):
            raise
        # The reader has enough: `plan x.yaml | head`.
        # The interpreter flushes at its exit once more, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _is_unread(descriptor: int) -> bool:
    """Whether nobody reads this pipe any more: the error may come from a pipe of another library."""
    poll = select.poll()
    poll.register(descriptor, 0)  # errors and hang-ups are reported unasked
    return bool(poll.poll(0))


def _run(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    # argparse stops collecting `key=value` at the first option; what stands behind one is picked up here.
    options, leftover = parser.parse_known_args(arguments)
    options.words = sys.argv[1:] if arguments is None else list(arguments)
    unknown = [word for word in leftover if word.startswith('-') or '=' not in word]
    if unknown or (leftover and not hasattr(options, 'overrides')):
        hint = '; a setting is written key=value, without dashes' if any('=' in word for word in unknown) else ''
        options.parser.error(f'unrecognized arguments: {" ".join(unknown or leftover)}{hint}')
    if leftover:
        options.overrides = [*options.overrides, *leftover]
    return options.command(options)


# What follows the command's name in its short usage, and an example of it.
_USAGES = {
    'train': ('YAML [key=value ...]', 'yamls/digits_tread.yaml max_duration=200ba'),
    'plan': ('YAML [key=value ...] [options]', 'yamls/dit_xl_tread.yaml --ranks 8'),
    'doctor': ('[YAML [key=value ...]]', 'yamls/dit_xl_tread.yaml'),
    'snr': ('YAML ... [key=value ...] [options]', 'yamls/digits.yaml yamls/digits_fasterdit.yaml --out snr.png'),
    'compare': ('RUN RUN ... [options]', 'runs/digits runs/digits_tread --out comparison'),
    'sample': ('RUN --out FOLDER [options]', 'runs/digits_tread --count 100 --guidance-scale 1.5 --out samples'),
    'sweep': (
        'RUN --reference IMAGES --out FOLDER [options]',
        'runs/digits_tread --reference data/digits/train --features digits --count 500 --guidance-scale 1 1.5 2 '
        '--guidance-interval none 0.1:0.9 --out sweep',
    ),
    'evaluate': (
        'PATH --reference IMAGES [options]',
        'runs/digits_tread --reference data/digits/train --features digits --count 500',
    ),
    'inspect': ('RUN [options]', 'runs/digits_tread --times 0.2 0.5 0.8 --count 64'),
    'inspect-model': ('package.module:function [options]', 'my_package.models:small_model'),
    'prefetch': ('[options]', '--allow-download'),
    'schema': ('[options]', '--components'),
    'export': ('RUN [options]', 'runs/digits_tread --weights ema --out model.safetensors'),
    'import': ('FILE [options]', 'DiT-XL-2-256x256.pt --layout dit --out model.safetensors'),
}


def _ranks(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is no number of processes; give 1 or more')
    return int(text)


def _parser() -> argparse.ArgumentParser:
    program = 'python -m tread_composer'
    parser = Parser(
        prog=program,
        usage=f'{program} COMMAND ... [options]',
        description='Train diffusion transformers with token routing.',
    )
    parser.add_argument('--version', action='version', version=f'tread_composer {__version__}')
    commands = parser.add_subparsers(required=True, metavar='command')

    def add(name: str, function: object, text: str) -> argparse.ArgumentParser:
        usage, example = _USAGES[name]
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            usage=f'{program} {name} {usage}',
            epilog=f'example: {program} {name} {example}',
        )
        command.set_defaults(command=function, parser=command)
        return command

    for name, function, text in (
        ('train', _train, 'train what a YAML file describes; several ranks: composer -n 2 train.py x.yaml'),
        ('plan', _plan, 'print what a YAML file would do, and write nothing'),
    ):
        command = add(name, function, text)
        command.add_argument('yaml', help='the file, for example yamls/digits_tread.yaml')
        command.add_argument(
            'overrides', nargs='*', default=[], metavar='key=value', help='for example optimizer.lr=2e-4'
        )
        if name == 'plan':
            command.add_argument('--json', action='store_true', help='figures and resolved configuration as JSON')
            command.add_argument('--ranks', type=_ranks, help='plan for this many processes (default: as launched)')
    command = add('doctor', _doctor, 'say whether a run would fail on this machine, and the cure; writes nothing')
    command.add_argument('yaml', nargs='?', help='what is to be trained (default: the machine alone is looked at)')
    command.add_argument('overrides', nargs='*', default=[], metavar='key=value', help='as for train')
    command.add_argument('--ranks', type=_ranks, help='processes on this machine (default: as launched)')
    command = add('snr', _snr, 'draw what signal-to-noise ratios YAML files train on, and print their figures')
    command.add_argument('yamls', nargs='+', metavar='yaml', help='files, then key=value settings for all of them')
    command.add_argument('--out', default='snr.png', help='the PNG to write (default: snr.png)')
    command.add_argument('--std', type=float, help='of the latents as the network sees them, where the data are absent')
    command.set_defaults(overrides=[])
    command = add(
        'compare', _compare, 'hold runs against the first one: at equal steps, FLOPs, time, and equal quality'
    )
    command.add_argument(
        'runs', nargs='+', metavar='run', help='folder, results.json[#RUN] or mlflow:RUN[@tracking uri]'
    )
    command.add_argument(
        '--metrics', nargs='+', default=[], metavar='METRIC', help='(default: all that the runs have in common)'
    )
    command.add_argument('--metric', nargs='+', dest='metrics', help=argparse.SUPPRESS)  # its earlier name
    command.add_argument('--out', default='comparison', help='folder for table, PNG and page (default: comparison)')
    add_sample_arguments(add('sample', _sample, 'draw images from a trained model; the same command again goes on'))
    command = add(
        'sweep', sweep_command, 'measure a model for each combination of sampling settings, and mark the best'
    )
    add_sweep_arguments(command)
    command = add('evaluate', evaluate_command, 'measure samples, or a model: FID, KID, precision, ...')
    add_evaluate_arguments(command)
    command = add('inspect', inspect_command, 'draw how alike tokens are from block to block, and propose a route')
    add_inspect_arguments(command)
    command = add('inspect-model', inspect_model_command, 'find out how to route a model of yours, by running it')
    add_inspect_model_arguments(command)
    command = add('prefetch', _prefetch, "say which weights Inception's metrics need, fetch them, check them")
    command.add_argument('--check', metavar='FILE', help='whether FILE is the published one')
    command.add_argument('--allow-download', action='store_true', help='fetch it to where torch looks')
    command = add('schema', _schema, 'print the JSON schema of a YAML file, for editors')
    command.add_argument('--components', action='store_true', help='list the parts that a YAML file can name instead')
    command = add('export', _export, 'write the weights of a run as one safetensors file that says what they are')
    command.add_argument('path', help="a run's folder (its latest checkpoint), or a checkpoint in one")
    _file_options(command, 'which weights to write; posthoc:0.13 is the average of this width (power_ema)', WEIGHTS)
    command.add_argument(
        '--allow-inexact', action='store_true', help='a post-hoc average that the snapshots do not come close to'
    )
    command = add('import', _import, 'convert weights of DiT, SiT, CompVis/tread or MaskDiT to such a file')
    command.add_argument('path', help='.pt or .safetensors, as published or as their training saves it')
    _file_options(command, 'which weights to take; of a file with one set, what it holds (published ones: ema)')
    _import_options(command)
    return parser


def _file_options(command: argparse.ArgumentParser, weights: str, choices: Sequence[str] = ('ema', 'raw')) -> None:
    command.add_argument('--out', default='model.safetensors', help='the file to write (default: model.safetensors)')
    command.add_argument('--weights', choices=choices, default='ema', help=f'{weights} (default: ema)')
    command.add_argument('--overwrite', action='store_true', help='replace a file that is there')


def _import_options(command: argparse.ArgumentParser) -> None:
    layouts = ('auto', 'dit', 'sit', 'tread', 'maskdit')
    command.add_argument('--layout', choices=layouts, default='auto', help='whose file it is (dit or sit must be said)')
    command.add_argument('--autoencoder', help="what made the latents: hub id, folder, file, or 'pixels'")
    command.add_argument('--autoencoder-hash', help='sha256:... of its weights, if others are to be refused')
    command.add_argument('--latent-scale', type=float, help='factor on raw latents in training (0.18215 in all four)')
    command.add_argument('--latent-shift', type=float, default=0.0, help='subtracted before (default: 0)')
    command.add_argument('--class-names', help="file with one name a line or a JSON list, or 'numbers'")
    command.add_argument('--objective', choices=('edm', 'flow_matching'), help='of a file of CompVis/tread')
    command.add_argument('--num-heads', type=int, help='attention heads, for other than published sizes')
    command.add_argument('--route', type=_route, help='START,END,RATE that the weights were trained with: 2,-4,0.5')
    command.add_argument('--batch', type=int, default=0, help='batches that the weights were trained on, if known')


def _route(text: str) -> tuple[int, int, float]:
    try:
        start, end, rate = text.split(',')
        return int(start), int(end), float(rate)
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} is not START,END,RATE, such as 2,-4,0.5') from None


def _train(options: argparse.Namespace) -> int:
    with importing():
        from tread_composer.run.train import train

    train(options.yaml, options.overrides)
    return 0


def _plan(options: argparse.Namespace) -> int:
    with importing():
        from tread_composer.builders.run_data import with_planned_numbers
        from tread_composer.config import load_config
        from tread_composer.run.plan import data_state, format_plan, make_plan

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


def _doctor(options: argparse.Namespace) -> int:
    with importing():
        from tread_composer.config import load_config
        from tread_composer.run.doctor import examine

    ranks = world_size() if options.ranks is None else options.ranks
    config = None if options.yaml is None else load_config(options.yaml, options.overrides, world_size=ranks)
    faults, newline, margin = 0, '\n', ' ' * 29
    for name, text, passes in examine(config, ranks):
        faults += not passes
        print(f'{"ok" if passes else "FAULT":<6} {name:<21} {text.replace(newline, newline + margin)}', flush=True)
    if faults:
        subject = 'A run' if options.yaml is None else options.yaml
        raise UserError(
            f'{subject} would fail here: {faults} fault{"s" if faults > 1 else ""}, each with its cure above'
        )
    return 0


def _snr(options: argparse.Namespace) -> int:
    files = [word for word in options.yamls if '=' not in word]
    overrides = [*(word for word in options.yamls if '=' in word), *options.overrides]
    if not files:
        raise UserError('snr: give a YAML file before the settings, for example yamls/digits.yaml')
    with importing():
        from tread_composer.config import load_config
        from tread_composer.run.snr import draw_snr, format_snr, make_snr

    curves = [make_snr(load_config(file, overrides), options.std) for file in files]
    draw_snr(curves, options.out)
    print(format_snr(curves, options.out))
    return 0


def _compare(options: argparse.Namespace) -> int:
    if len(options.runs) < 2:
        raise UserError(f'compare: only {options.runs[0]!r} is given; give two or more runs, the reference first')
    with importing():
        from tread_composer.compare.comparison import compare, format_comparison
        from tread_composer.compare.output import write_comparison
        from tread_composer.compare.runs import open_run

    comparison = compare([open_run(run) for run in options.runs], options.metrics)
    metrics = ['--metrics', *options.metrics] if options.metrics else []
    words = ['compare', *options.runs, *metrics, '--out', options.out]
    files = write_comparison(comparison, options.out, f'python -m tread_composer {shlex.join(words)}')
    print(format_comparison(comparison))
    print('\n'.join(['', *(f'written: {file}' for file in files)]))
    return 0


def _export(options: argparse.Namespace) -> int:
    if options.allow_inexact and options.weights in ('ema', 'raw'):
        raise UserError(f'--allow-inexact is about post-hoc averages, and --weights is {options.weights}; leave it out')
    with importing():
        from tread_composer.weights.export import export, export_in_words

    choices = {'weights': options.weights, 'overwrite': options.overwrite, 'allow_inexact': options.allow_inexact}
    result = export(options.path, options.out, **choices)
    print(export_in_words(result))
    return 0


def _import(options: argparse.Namespace) -> int:
    with importing():
        from tread_composer.weights.export import export_in_words
        from tread_composer.weights.foreign import Hints, import_weights

    names = (
        'autoencoder', 'autoencoder_hash', 'latent_scale', 'latent_shift', 'class_names', 'objective', 'num_heads',
        'route', 'batch',
    )  # fmt: skip
    facts = Hints(**{name: getattr(options, name) for name in names})
    choices = {'layout': options.layout, 'weights': options.weights, 'overwrite': options.overwrite}
    result = import_weights(options.path, options.out, facts, **choices)
    print(export_in_words(result))
    print(f'layout    {result["layout"]}')
    return 0


def _sample(options: argparse.Namespace) -> int:
    with importing():
        from tread_composer.cli.sample import request_of

    request = request_of(options)
    with importing():
        from tread_composer.sample.generate import generate

    generate(request, log=functools.partial(print, flush=True))
    return 0


def _prefetch(options: argparse.Namespace) -> int:
    with importing():
        from tread_composer.metrics.inception import check_weights, describe_weights, download_weights

    if options.check:
        check_weights(options.check)
        print(f'{options.check}: is the published file')
    elif options.allow_download:
        print(f'{download_weights()}: is there, and its hash is right')
    else:
        print(describe_weights())
    return 0


def _schema(options: argparse.Namespace) -> int:
    with importing():
        from tread_composer.config import json_schema, list_parts
        from tread_composer.io.table import text_table

    if not options.components:
        with warnings.catch_warnings():
            # Pydantic warns of defaults that JSON cannot hold, such as sys.stderr; editors do not need them.
            warnings.simplefilter('ignore')
            schema = json_schema()
        print(json.dumps(schema, indent=2))
        return 0
    rows = list_parts()
    print(text_table((), rows, 'llll'))
    print("a part of another package is named 'package.module:Class'; its constructor says its arguments")
    return 0


if __name__ == '__main__':
    sys.exit(main())
