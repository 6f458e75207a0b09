"""The commands of ``python -m tread_composer`` (its ``--help`` lists them). ``composer train.py x.yaml`` is ``train``.

Each is a function; its arguments, and the fields of the request that it takes, are its flags (``cli.flags``). The
modules that do the work are imported once the words are right: they take seconds.
"""

import json
import os
import warnings
from collections.abc import Sequence
from typing import Annotated

from annotated_types import Ge, Gt, Lt

from tread_composer.cli.flags import Typed, run_program
from tread_composer.cli.sampling import evaluate, sample, sweep
from tread_composer.core.errors import UserError
from tread_composer.core.launch import world_size
from tread_composer.core.options import Device, Flag, Weights
from tread_composer.core.process import importing, prepare_process
from tread_composer.weights.foreign.request import ImportRequest

__all__ = ['main']

Overrides = Annotated[tuple[str, ...], Flag('key=value')]


def train(yaml: Annotated[str, Flag('YAML')], overrides: Overrides = ()) -> None:
    """Train what a YAML file describes; several ranks: composer -n 2 train.py x.yaml.

    Args:
        yaml: The file, for example yamls/digits_tread.yaml.
        overrides: Settings that replace the file's, for example optimizer.lr=2e-4.

    Example: yamls/digits_tread.yaml max_duration=200ba
    """
    with importing():
        from tread_composer.run import train as run

    run.train(yaml, overrides)


def plan(
    yaml: Annotated[str, Flag('YAML')],
    overrides: Overrides = (),
    json_: Annotated[bool, Flag('--json')] = False,  # the module has the name
    ranks: Annotated[int | None, Ge(1)] = None,
    nodes: Annotated[int, Ge(1)] = 1,
    without_data: bool = False,
) -> None:
    """Print what a YAML file would do, without writing anything.

    Args:
        yaml: The file, for example yamls/digits_tread.yaml.
        overrides: Settings that replace the file's, for example optimizer.lr=2e-4.
        json_: Print figures and resolved configuration as JSON.
        ranks: Number of processes to plan for, on all nodes together (default: as launched).
        nodes: Number of machines that they are on.
        without_data: Exit with 0 even if the data are missing.

    Example: yamls/dit_xl_tread.yaml --ranks 16 --nodes 2
    """
    with importing():
        from tread_composer.builders.model import check_fit
        from tread_composer.builders.run_data import with_planned_numbers
        from tread_composer.config import load_config
        from tread_composer.run.plan import data_state, format_plan, make_plan

    ranks = ranks or world_size()
    config = load_config(yaml, overrides, world_size=ranks)
    state, problem = data_state(config)
    figures = make_plan(config, ranks, nodes)
    config = with_planned_numbers(config)
    if json_:
        print(json.dumps({**figures, 'data': state, 'config': config.to_dict()}, indent=2))
    else:
        print(format_plan(config, figures, state))
    if without_data:
        return
    if problem is not None:  # the plan first: it says what was looked for
        raise problem
    check_fit(config)


def doctor(
    yaml: Annotated[str | None, Flag('YAML')] = None,
    overrides: Overrides = (),
    ranks: Annotated[int | None, Ge(1)] = None,
) -> None:
    """Say whether a run would fail on this machine, with the cure for each fault; write nothing.

    Args:
        yaml: The file to train (default: check the machine alone).
        overrides: Settings that replace the file's, as for train.
        ranks: Processes on this machine (default: as launched).

    Example: yamls/dit_xl_tread.yaml
    """
    with importing():
        from tread_composer.config import load_config
        from tread_composer.run.doctor import examine

    ranks = ranks or world_size()
    config = None if yaml is None else load_config(yaml, overrides, world_size=ranks)
    faults, newline, margin = 0, '\n', ' ' * 29
    for name, text, passes in examine(config, ranks):
        faults += not passes
        print(f'{"ok" if passes else "FAULT":<6} {name:<21} {text.replace(newline, newline + margin)}', flush=True)
    if faults:
        count = f'{faults} fault{"s" if faults > 1 else ""}'
        raise UserError(f'{yaml or "A run"} would fail here: {count}, each with its cure above')


def snr(
    yamls: Annotated[tuple[str, ...], Flag('YAML')],
    overrides: Overrides = (),
    out: str = 'snr.png',
    std: Annotated[float | None, Gt(0)] = None,
) -> None:
    """Draw which signal-to-noise ratios YAML files train on, and print their figures.

    Args:
        yamls: Files.
        overrides: Settings for all of them.
        out: The picture to write, .png, .jpg, .webp, .svg or .pdf.
        std: Standard deviation of the latents as the network sees them, where the data are absent.

    Example: yamls/digits.yaml yamls/digits_fasterdit.yaml --out snr.png
    """
    # Both are positional, so argparse gives all words to the first.
    files = [word for word in yamls if '=' not in word or os.path.isfile(word)]  # a run may be called lr=0.1
    if not files:
        raise UserError('snr: give a YAML file before the settings, for example yamls/digits.yaml')
    with importing():
        from tread_composer.config import load_config
        from tread_composer.run.snr import draw_snr, format_snr, make_snr

    overrides = (*(word for word in yamls if word not in files), *overrides)
    curves = [make_snr(load_config(file, overrides), std) for file in files]
    draw_snr(curves, out)
    print(format_snr(curves, out))


def compare(
    typed: Typed,
    runs: Annotated[tuple[str, ...], Flag('RUN')],
    metrics: Annotated[tuple[str, ...], Flag('--metrics', '--metric')] = (),
    out: str = 'comparison',
) -> None:
    """Compare runs with the first one: at equal steps, FLOPs, time and quality.

    Args:
        runs: Folder, or results.json[#RUN]; the reference first.
        metrics: Names of metrics (default: all that the runs have in common).
        out: Folder for table, PNG and page.

    Example: runs/digits runs/digits_tread --out comparison
    """
    if len(runs) < 2:
        raise UserError(f'compare: only {", ".join(runs)!r} is given; give two or more runs, the reference first')
    with importing():
        from tread_composer.compare import comparison as room
        from tread_composer.compare.presentation import format_comparison, write_comparison
        from tread_composer.compare.runs import open_run

    comparison = room.compare([open_run(run) for run in runs], metrics)
    files = write_comparison(comparison, out, str(typed))
    print(format_comparison(comparison))
    _print_files(files)


def inspect(
    typed: Typed,
    path: Annotated[str, Flag('RUN')],
    data: str | None = None,
    times: tuple[Annotated[float, Gt(0), Lt(1)], ...] = (0.2, 0.5, 0.8),
    count: Annotated[int, Flag('--count', '--samples')] = 64,
    weights: Weights = 'ema',
    batch_size: Annotated[int, Ge(1)] = 16,
    device: Device | None = None,
    out: str = 'inspection',
) -> None:
    """Draw how similar tokens are from block to block, and suggest a route.

    Args:
        path: A run's folder (its latest checkpoint), a checkpoint in one, or an exported .safetensors.
        data: Folder of other latents than those of the run's evaluation split.
        times: From 0, data, to 1, noise.
        count: Latents to look at.
        weights: Which weights.
        batch_size: Latents in one call of the network; changes memory and nothing else.
        device: Where to compute (a GPU if there is one).
        out: Folder for the picture and the numbers.

    Example: runs/digits_tread --times 0.2 0.5 0.8 --count 64
    """
    twice = [time for time in times if times.count(time) > 1]
    if twice:
        raise UserError(f'--times: {twice[0]} is given twice')
    with importing():
        from tread_composer.advisor.findings import format_inspection, write_inspection
        from tread_composer.advisor.inspection import inspect_run

    inspection = inspect_run(
        path, times=times, count=count, weights=weights, batch_size=batch_size, data=data, device=device
    )
    files = write_inspection(inspection, out, str(typed))
    print(format_inspection(inspection))
    _print_files(files)


def inspect_model(function: Annotated[str, Flag('package.module:function')], blocks: str | None = None) -> None:
    """Run a model of yours to work out how to route it.

    Args:
        function: Called without arguments. It returns a small model on the CPU and run(model), which makes one forward
            pass and returns its output.
        blocks: The block list, where the model has several (default: the only one).

    Example: my_package.models:small_model
    """
    with importing():
        from tread_composer.advisor.placement import inspect_model

    print(inspect_model(function, blocks))


def prefetch(
    check: Annotated[str | None, Flag('--check', metavar='FILE')] = None, allow_download: bool = False
) -> None:
    """List, fetch or check the weights that Inception's metrics need.

    Args:
        check: Check whether FILE is the published one.
        allow_download: Fetch the file to where torch looks for it.

    Example: --allow-download
    """
    with importing():
        from tread_composer.metrics.inception import check_weights, describe_weights, download_weights

    if check:
        check_weights(check)
        print(f'{check}: is the published file')
    elif allow_download:
        print(f'{download_weights()}: is there, and its hash is right')
    else:
        print(describe_weights())


def schema(components: bool = False) -> None:
    """Print the JSON schema of a YAML file, for editors.

    Args:
        components: List the parts that a YAML file can name instead.

    Example: --components
    """
    with importing():
        from tread_composer.config import json_schema, list_parts
        from tread_composer.io.table import text_table

    if components:
        print(text_table((), list_parts(), 'llll'))
        print("a part of another package is named 'package.module:Class'; its constructor says its arguments")
        return
    with warnings.catch_warnings():
        # Pydantic warns of defaults that JSON cannot hold, such as sys.stderr; editors do not need them.
        warnings.simplefilter('ignore')
        print(json.dumps(json_schema(), indent=2))


def export(
    path: Annotated[str, Flag('RUN')],
    out: str = 'model.safetensors',
    weights: Weights = 'ema',
    overwrite: bool = False,
    allow_inexact: bool = False,
) -> None:
    """Write the weights of a run as one safetensors file that says what they are.

    Args:
        path: A run's folder (its latest checkpoint), or a checkpoint in one.
        out: The file to write.
        weights: Which weights to write; posthoc:0.13 is the average of this width (power_ema).
        overwrite: Replace a file that is there.
        allow_inexact: Accept a post-hoc average that the snapshots do not approximate well.

    Example: runs/digits_tread --weights ema --out model.safetensors
    """
    if allow_inexact and weights in ('ema', 'raw'):
        raise UserError(f'--allow-inexact is about post-hoc averages, and --weights is {weights}; leave it out')
    with importing():
        from tread_composer.weights import trained as room

    exported = room.read_trained(path, weights=weights, allow_inexact=allow_inexact)
    print(room.export_in_words(room.write_with_cost(exported, path, out, overwrite)))


def import_(request: ImportRequest) -> None:
    """Convert published weights of DiT, SiT, CompVis/tread, MaskDiT or LightningDiT to a safetensors file.

    Example: DiT-XL-2-256x256.pt --layout dit --out model.safetensors
    """
    with importing():
        from tread_composer.weights.foreign.command import import_weights
        from tread_composer.weights.trained import export_in_words

    result = import_weights(request)
    print(f'{export_in_words(result)}\nlayout    {result["layout"]}')


def _print_files(files: Sequence[str | os.PathLike[str]]) -> None:
    print('\n'.join(['', *(f'written: {file}' for file in files)]))


COMMANDS = (train, plan, doctor, snr, compare, sample, sweep, evaluate, inspect, inspect_model, prefetch, schema,
            export, import_)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, as this process was called if no arguments are given; returns the exit code."""
    prepare_process()
    # `import_` and `inspect_model` are what Python can spell of them.
    commands = {command.__name__.strip('_').replace('_', '-'): command for command in COMMANDS}
    text = 'Train diffusion transformers with token routing.'
    return run_program(commands, 'python -m tread_composer', arguments, text)
