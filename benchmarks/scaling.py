"""How the cost of a training step grows with tokens, depth, selection rate and ranks, dense and routed.

    python benchmarks/scaling.py --picture docs/scaling.png [--device cuda] [--short] [--out rows.jsonl]

One small DiT is the reference; every other size is measured in turns with its dense step and given as a multiple of
it, by image. The model beside each point knows the reference alone: forward and backward grow with the FLOPs, the
optimizer with the parameters, images/s with the ranks. A CPU is timed by one thread's own seconds; for ranks, by those
of all threads of the slowest rank: the exchange of gradients counts, waiting for a core does not. The rows have
images/s on the wall too, which say something where no other work is on the machine.
"""

import argparse
import functools
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tread_composer.core.process import prepare_process

prepare_process()  # before torch is loaded, and MLflow

import torch
import torch.distributed as dist
from contenders import Contender, Problem, make_contenders, read_problem
from measuring import Rows, clock_of, environment, spread
from step_time import WARM_UP, Clock, alternate
from torch.nn.parallel import DistributedDataParallel

YAML = 'yamls/dit_s_tread.yaml'
REFERENCE = {'tokens': 256, 'depth': 8, 'selection rate': 0.5}
# All but the first and the last block: a route that even 4 blocks have room for.
ROUTE = ('algorithms.tread.start=1', 'algorithms.tread.end=-2', 'algorithms.tread.float32_after=false')
HEAD = 64
# Width, and tokens of a step: on a CPU 4,096 tokens of one image still take seconds only.
SIZES = {'cpu': (192, 1024), 'cuda': (1152, 65536)}
LABELS = {'tokens': 'tokens', 'depth': 'blocks', 'selection rate': 'selection rate', 'ranks': 'ranks'}
COLOURS = {'dense': '#0b62a4', 'routed': '#c2540a'}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', choices=tuple(SIZES), default='cpu')
    parser.add_argument(
        '--short', action='store_true', help='fewer and smaller sizes: about a minute of one CPU thread'
    )
    parser.add_argument('--tokens', type=int, nargs='+', help='default: 64 256 1024 4096')
    parser.add_argument('--depths', type=int, nargs='+', help='default: 4 8 12 24')
    parser.add_argument('--rates', type=float, nargs='+', help='default: 0 0.25 0.5 0.75')
    parser.add_argument('--ranks', type=int, nargs='+', help='default: 1 2, on a GPU 1 to all in powers of 2')
    parser.add_argument('--turns', type=int, help='default: 6, in short 3')
    parser.add_argument('--width', type=int, help='a multiple of 64')
    parser.add_argument('--out', help='a file to which the rows are appended')
    parser.add_argument('--picture', help='a PNG to draw')
    options = parser.parse_args(arguments)
    short = options.short
    defaults = {
        'tokens': [64, 256, 1024] if short else [64, 256, 1024, 4096],
        'depths': [4, 12] if short else [4, 8, 12, 24],
        'rates': [0.0, 0.5] if short else [0.0, 0.25, 0.5, 0.75],
        'ranks': [1, 2] if options.device == 'cpu' else [2**n for n in range(torch.cuda.device_count().bit_length())],
        'turns': 3 if short else 6,
        'width': SIZES[options.device][0],
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


@dataclass(frozen=True)
class Size:
    """One point of a curve."""

    tokens: int
    depth: int
    rate: float

    def problem(self, options: argparse.Namespace, device: torch.device) -> Problem:
        """A DiT of this size, with as many images as make up the tokens of a step."""
        network = {
            'patch_size': 2,
            'hidden_size': options.width,
            'depth': self.depth,
            'num_heads': options.width // HEAD,
        }
        words = ['model.preset=null', *(f'model.{name}={value}' for name, value in network.items())]
        words += [*ROUTE, f'algorithms.tread.selection_rate={self.rate}']
        batch_size = max(1, SIZES[options.device][1] // self.tokens)
        dtype = 'bf16' if device.type == 'cuda' else 'fp32'
        return read_problem(YAML, words, batch_size=batch_size, tokens=self.tokens, dtype=dtype, device=device)


def measure(options: argparse.Namespace) -> Rows:
    """All curves of one command."""
    device = torch.device(options.device)
    clock = clock_of(device)
    dtype = 'bf16' if device.type == 'cuda' else 'fp32'
    rows = Rows({'width': options.width, 'dtype': dtype, **environment(device)}, options.out)
    reference = Size(*REFERENCE.values())
    base = make_contenders(reference.problem(options, device))[0]
    base.name = 'reference'
    warm_up(base, clock)
    sizes = {
        'tokens': [Size(tokens, reference.depth, reference.rate) for tokens in options.tokens],
        'depth': [Size(reference.tokens, depth, reference.rate) for depth in options.depths],
        'selection rate': [Size(reference.tokens, reference.depth, rate) for rate in options.rates],
    }
    measured = functools.cache(functools.partial(measure_size, options, base, clock))  # curves cross in the reference
    for curve, points in sizes.items():
        for size in points:
            x = dict(zip(REFERENCE, (size.tokens, size.depth, size.rate), strict=True))[curve]
            for name, values in measured(size).items():
                rows.add('scaling', curve=curve, x=x, contender=name, **values)
    if options.ranks:
        routed = measured(reference)['routed']['model']
        for values in measure_ranks(options, {'dense': 1.0, 'routed': 1 / routed}):
            rows.add('scaling', curve='ranks', **values)
    return rows


def warm_up(contender: Contender, clock: Clock) -> None:
    """The first steps choose kernels, try the blocks of a route out and make the optimizer's moments."""
    for _ in range(WARM_UP):
        contender.step(clock.mark)
    clock.settle()


def measure_size(options: argparse.Namespace, base: Contender, clock: Clock, size: Size) -> dict[str, dict[str, Any]]:
    """Cost of an image, dense and routed, over that of the reference: measured turn by turn, and by the model."""
    problem = size.problem(options, base.problem.device)
    contenders = make_contenders(problem, one_network=True)
    for contender in contenders:
        warm_up(contender, clock)
    turns = alternate([base, *contenders], clock, options.turns, 4 if problem.device.type == 'cuda' else 1)
    images = problem.batch_size / base.problem.batch_size
    whole, passes, optimizer = (statistics.median(turn[part] for turn in turns['reference']) for part in range(3))
    optimizer *= problem.plan['parameters'] / base.problem.plan['parameters']
    out = {}
    for contender in contenders:
        pairs = zip(turns[contender.name], turns['reference'], strict=True)
        assert contender.step_flops is not None and base.step_flops is not None
        model = passes * contender.step_flops / base.step_flops + optimizer
        out[contender.name] = {
            'measured': spread([step[0] / other[0] / images for step, other in pairs]),
            'model': model / whole / images,
            'seconds': statistics.median(turn[0] for turn in turns[contender.name]),
            'batch_size': problem.batch_size,
        }
    return out


def measure_ranks(options: argparse.Namespace, models: dict[str, float]) -> list[dict[str, Any]]:
    """Images/s of processes that train as one by DDP, over those of a dense step of one: measured, and by the model.

    ``models`` are the latter for one process.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run_rank, (options, folder), max(options.ranks))
        rates = {tuple(key): values for key, values in json.loads(Path(folder, 'rates.json').read_text())}
    rows = []
    base = [rate for rate, _ in rates[1, 'dense']]
    for (ranks, name), values in rates.items():
        relative = [rate / other for (rate, _), other in zip(values, base, strict=True)]
        rows.append(
            {
                'x': ranks,
                'contender': name,
                'measured': spread(relative),
                'model': ranks * models[name],
                'images_per_second': statistics.median(rate for rate, _ in values),
                'images_per_second_of_wall': spread([rate for _, rate in values]),
            }
        )
    return rows


def run_rank(rank: int, options: argparse.Namespace, folder: str) -> None:
    """One of the processes; the first one writes images/s turn by turn, by the device's own seconds and on the wall."""
    device, backend = torch.device(options.device), 'gloo'
    if device.type == 'cuda':
        torch.cuda.set_device(rank)
        device, backend = torch.device('cuda', rank), 'nccl'
    settle, counts = clock_of(device).settle, sorted({1, *options.ranks})
    store = dist.FileStore(f'{folder}/store', max(counts))
    dist.init_process_group(backend, store=store, rank=rank, world_size=max(counts))
    groups = [dist.new_group(list(range(count))) for count in counts]
    problem = Size(*REFERENCE.values()).problem(options, device)
    rates: dict[tuple[int, str], list[list[float]]] = {}
    # Networks of its own for each number of ranks, dense and routed: DDP binds them to a group.
    trained = {count: make_contenders(problem) for count in counts if rank < count}
    for count, group in zip(counts, groups, strict=True):
        for contender in trained[count] if count > 1 and rank < count else ():
            contender.network = DistributedDataParallel(contender.model, process_group=group)
    for turn, count, position in itertools.product(range(-WARM_UP, options.turns), counts, range(2)):
        settle()
        dist.barrier()
        if rank >= count:
            continue
        contender = trained[count][position]
        marks = [(time.process_time(), time.perf_counter())]
        contender.step(lambda: None)
        settle()
        marks.append((time.process_time(), time.perf_counter()))
        busy, wall = (end - begin for begin, end in zip(*marks, strict=True))
        seconds = torch.tensor([wall if device.type == 'cuda' else busy, wall], device=device)
        if count > 1:
            dist.all_reduce(seconds, dist.ReduceOp.MAX, groups[counts.index(count)])
        if turn >= 0:
            rates.setdefault((count, contender.name), []).append((count * problem.batch_size / seconds).tolist())
    if rank == 0:
        Path(folder, 'rates.json').write_text(json.dumps([*rates.items()]))
    dist.barrier()
    dist.destroy_process_group()


def draw(rows: Sequence[dict[str, Any]], path: str) -> None:
    """One panel for each curve: points with quartiles measured, lines from the model."""
    from matplotlib.figure import Figure  # takes a second: not before there is something to draw

    curves = {row['curve']: [each for each in rows if each.get('curve') == row['curve']] for row in rows}
    figure = Figure(figsize=(4 * len(curves), 4), layout='constrained')
    for axes, (curve, points) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for name, colour in COLOURS.items():
            draw_curve(axes, [row for row in points if row['contender'] == name], name, colour)
        quantity = 'cost of an image'
        if curve == 'ranks':
            quantity = 'images/s of CPU time' if 'CPU' in points[0]['device'] else 'images/s'
        axes.set(xlabel=LABELS[curve], ylabel=f'{quantity}, dense reference = 1')
        if curve == 'tokens':
            axes.set(xscale='log', yscale='log')
            axes.set_xticks(ticks := sorted({row['x'] for row in points}), map(str, ticks))
            axes.minorticks_off()
        else:
            axes.set_ylim(bottom=0)
            axes.set_xticks(sorted({row['x'] for row in points}))
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc='outside lower center', ncols=4)
    first = rows[0]
    figure.suptitle(
        f'DiT of width {first["width"]}, {first["dtype"]}; reference: '
        + ', '.join(f'{value:g} {LABELS[name]}' for name, value in REFERENCE.items() if name != 'selection rate')
        + f'; {first["device"]}, torch {first["torch"]}, {first["commit"]}'
    )
    figure.savefig(path, dpi=110)


def draw_curve(axes: Any, points: Sequence[dict[str, Any]], name: str, colour: str) -> None:
    x, middles = [row['x'] for row in points], [row['measured']['median'] for row in points]
    below = [row['measured']['median'] - row['measured']['low'] for row in points]
    above = [row['measured']['high'] - row['measured']['median'] for row in points]
    axes.errorbar(x, middles, (below, above), fmt='o', color=colour, capsize=3, label=f'{name}, measured')
    axes.plot(x, [row['model'] for row in points], color=colour, linewidth=1, label=f'{name}, by FLOPs')


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for a reader, in Markdown."""
    lines = [
        '',
        '| curve | at | step | measured (quartiles) | by FLOPs | measured / by FLOPs |',
        '|---|---|---|---|---|---|',
    ]
    for row in rows:
        low, middle, high = (row['measured'][name] for name in ('low', 'median', 'high'))
        lines.append(
            f'| {row["curve"]} | {row["x"]:g} | {row["contender"]} | {middle:.3f} ({low:.3f} to {high:.3f}) '
            f'| {row["model"]:.3f} | {middle / row["model"]:.2f} |'
        )
    return '\n'.join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    rows = measure(options).rows
    print(table(rows))
    if options.picture is not None:
        draw(rows, options.picture)
    return 0


if __name__ == '__main__':
    sys.exit(main())
