"""How long a training step takes, dense and routed (forward, backward, optimizer), in alternating turns of one process.

    python benchmarks/step_time.py yamls/dit_b_tread.yaml [key=value ...] --batch-size 4 --dtype fp32
    python benchmarks/step_time.py yamls/dit_xl_tread.yaml --dtype bf16 --compile --peer my.module:make_dit

A CPU is timed by one thread's own seconds, a GPU by events. The network, objective, optimizer and route are the
recipe's, with a fresh route at every step; loaders, averages and callbacks are not in it. Ratios are taken turn by
turn, since a clock that drifts moves both of a pair. ``ideal`` is the ratio if routing cost nothing and each FLOP
took the same time: (forward and backward + optimizer) / (forward and backward / ratio of FLOPs + optimizer).
"""

import argparse
import copy
import itertools
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

from tread_composer.core.process import prepare_process

prepare_process()  # before torch is loaded, and MLflow

import torch
from contenders import Contender, Problem, Routed, compile_contender, make_contenders, read_problem
from measuring import DTYPES, EventClock, Rows, ThreadClock, Timeline, clock_of, environment, product_rate, spread
from routing_cost import probe_seconds, routing_seconds, watch_probes
from torch import Tensor, nn

from tread_composer.core.errors import UserError
from tread_composer.routing.callables import in_float32

Clock = ThreadClock | EventClock
GIB = 2**30
_ROUTING_PARTS = ('draw', 'gather_and_scatter', 'their_backward')
WARM_UP = 3  # steps: Tread tries the blocks of a route out in its first two


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('yaml')
    parser.add_argument('overrides', nargs='*', metavar='key=value')
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--dtype', choices=tuple(DTYPES), default='bf16' if torch.cuda.is_available() else 'fp32')
    parser.add_argument('--batch-size', type=int, help="samples of a step; default: the recipe's microbatch")
    parser.add_argument('--tokens', type=int, help="of a sample, by the latents' size; default: the recipe's")
    parser.add_argument('--pairs', '--steps', type=int, default=10, help='turns of each contender')
    parser.add_argument('--turn', type=int, help='steps that follow each other in a turn; default: 1 on a CPU, else 4')
    parser.add_argument('--compile', nargs='?', const='blocks', choices=('blocks', 'model'), help='default: eager')
    parser.add_argument('--dynamic', choices=('auto', 'true', 'false'), default='auto', help='shapes, of --compile')
    parser.add_argument(
        '--peer',
        action='append',
        default=[],
        help='package.module:callable that returns a network of (x, t, y); again for more',
    )
    parser.add_argument(
        '--one-network', action='store_true', help='dense and routed steps of the same weights: half of the memory'
    )
    parser.add_argument('--out', help='a file to which the rows are appended')
    parser.add_argument('--label', action='append', default=[], help='a word that every row carries')
    options = parser.parse_intermixed_args(arguments)
    for name in ('batch_size', 'tokens', 'pairs', 'turn'):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f'--{name.replace("_", "-")}: {getattr(options, name)} must be at least 1')
    if options.one_network and options.compile:
        parser.error('--one-network: one network would be compiled twice; leave --compile away')
    return options


def measure(options: argparse.Namespace) -> Rows:
    """All measurements of one command."""
    device = torch.device(options.device)
    clock = clock_of(device)
    problem = read_problem(
        options.yaml, options.overrides,
        batch_size=options.batch_size, tokens=options.tokens, dtype=options.dtype, device=device,
    )  # fmt: skip
    settings = {
        'yaml': options.yaml, 'overrides': options.overrides, 'batch_size': problem.batch_size,
        'tokens': problem.plan['num_tokens'], 'dtype': options.dtype, 'compile': options.compile,
        'dynamic': options.dynamic if options.compile else None, 'label': options.label,
    }  # fmt: skip
    rows = Rows({**settings, **environment(device)}, options.out)
    # The routed one sets TF32, as a Trainer does.
    contenders = make_contenders(problem, options.peer, one_network=options.one_network)
    rate = product_rate(device, options.dtype)
    rows.add('product', tflops=rate / 1e12)
    blocks = block_calls(problem, contenders, options)
    probes = Timeline(clock)
    for contender in contenders:
        if options.compile:
            compile_contender(contender, options.compile, dynamic=_dynamic(options))
        with watch_probes(probes):
            warm_up(contender, clock, rows)
    turns = alternate(contenders, clock, options.pairs, options.turn or (4 if device.type == 'cuda' else 1))
    for contender in contenders:
        step_row(rows, contender, turns[contender.name], rate, contenders)
    seconds = {name: spread(times)['median'] for name, times in time_blocks(blocks, clock, problem).items()}
    for name, value in seconds.items():
        rows.add('block', block=name, seconds=value)
    ratio_rows(rows, contenders, turns, problem, seconds)
    routed = contenders[1]
    if options.compile != 'model' and isinstance(routed, Routed):  # else the calls are inside of its graph
        costs = routing_seconds(routed, blocks['N'][1][0], clock, probe_seconds(probes))
        step = statistics.median(turn[0] for turn in turns['routed'])
        rows.add('routing', **costs, share=costs['seconds'] / step)
    return rows


def _dynamic(options: argparse.Namespace) -> bool | None:
    return {'auto': None, 'true': True, 'false': False}[options.dynamic]


def warm_up(contender: Contender, clock: Clock, rows: Rows) -> None:
    """The first steps, which compile, choose algorithms and make the optimizer's moments."""
    began = time.perf_counter()
    for number in range(WARM_UP):
        contender.step(clock.mark)
        clock.settle()
        if number == 0:
            first = time.perf_counter() - began
    rows.add(
        'first_step', contender=contender.name, wall_seconds=first, wall_seconds_of_three=time.perf_counter() - began
    )


def alternate(contenders: Sequence[Contender], clock: Clock, pairs: int, steps: int) -> dict[str, list[tuple]]:
    """Turns by contender: seconds of a step, of its forward and backward pass, of its optimizer.

    Every second round goes backwards, so that no contender always follows the same one. Within a turn nobody waits for
    the device between two steps, as in training.
    """
    turns: dict[str, list[tuple]] = {contender.name: [] for contender in contenders}
    for number in range(pairs):
        for contender in contenders if number % 2 == 0 else reversed(contenders):
            clock.settle()
            marks = [contender.step(clock.mark) for _ in range(steps)]
            clock.settle()
            whole = clock.seconds(marks[0][0], marks[-1][2])
            optimizer = sum(clock.seconds(middle, end) for _, middle, end in marks)
            turns[contender.name].append(tuple(value / steps for value in (whole, whole - optimizer, optimizer)))
    return turns


def step_row(
    rows: Rows,
    contender: Contender,
    turns: list[tuple],
    rate: float,
    contenders: Sequence[Contender],
) -> None:
    """What one contender's steps took."""
    whole = spread([turn[0] for turn in turns])
    problem, flops = contender.problem, contender.step_flops
    rows.add(
        'step',
        contender=contender.name,
        seconds=whole,
        forward_backward_seconds=statistics.median(turn[1] for turn in turns),
        optimizer_seconds=statistics.median(turn[2] for turn in turns),
        tokens_per_second=problem.batch_size * problem.plan['num_tokens'] / whole['median'],
        flops=flops,
        mfu=None if flops is None else flops / whole['median'] / rate,
        peak_gib=peak(contender, contenders),
        turns=len(turns),
    )


def peak(contender: Contender, contenders: Sequence[Contender]) -> float:
    """GiB at the fullest moment of one more step, without what the other contenders hold.

    Counted by the allocator on a GPU; on a CPU from the allocations that torch's profiler sees.
    """
    if contender.problem.device.type == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        contender.step(lambda: None)
        others = sum(
            {id(one.model): one.held_bytes() for one in contenders if one.model is not contender.model}.values()
        )
        return (torch.cuda.max_memory_allocated() - others) / GIB
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        contender.step(lambda: None)
    results: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == '[memory]')
    return (contender.held_bytes() + max(itertools.accumulate(size for _, size in changes))) / GIB


# One block alone: where routing gains less than its FLOPs say, these times tell whether the kernels lose it.


def block_calls(
    problem: Problem, contenders: Sequence[Contender], options: argparse.Namespace
) -> dict[str, tuple[Any, tuple, dict]]:
    """Blocks with the arguments that a training forward gave them, to be timed alone.

    ``N`` and ``K <route>``: the first block of each route with all tokens and with the kept ones. ``float32``: the
    block behind a route, where the recipe has it run in float32.
    """
    depth = problem.plan['depth']
    spans = [route.span(depth) for route in problem.config.routes()]
    dense, routed = contenders[:2]
    float32 = problem.dtype == 'bf16' and problem.config.algorithms['tread'].kwargs.get('float32_after')
    # One after the other: both may be the same network.
    seen = _arguments_of(dense, {'N': spans[0][0]})
    seen |= _arguments_of(routed, {f'K {number}': start for number, (start, _) in enumerate(spans)})
    calls: dict[str, tuple[Any, tuple, dict]] = {}
    block = copy.deepcopy([*dense.model.denoiser.blocks][spans[0][0]])  # type: ignore[misc]
    if options.compile:
        block.compile(dynamic=_dynamic(options))
    for name, (args, kwargs) in seen.items():
        calls[name] = (block, tuple(map(_apart, args)), {key: _apart(value) for key, value in kwargs.items()})
    if float32:
        calls['float32'] = (in_float32(block), *calls['N'][1:])
    return calls


def _arguments_of(contender: Contender, places: dict[str, int]) -> dict[str, tuple[tuple, dict]]:
    """What a training forward gives to some blocks: by name, for the numbers of the blocks by name."""
    seen: dict[str, tuple[tuple, dict]] = {}
    blocks = [*contender.model.denoiser.blocks]  # type: ignore[misc]
    hooks = [
        blocks[place].register_forward_pre_hook(
            lambda _, args, kwargs, name=name: seen.update({name: (args, kwargs)}), with_kwargs=True
        )
        for name, place in places.items()
    ]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # Tread would speak of the hooks
        contender.loss()
    contender.finished()
    for hook in hooks:
        hook.remove()
    return seen


def _apart(value: Any) -> Any:
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def time_blocks(calls: dict[str, tuple[Any, tuple, dict]], clock: Clock, problem: Problem) -> dict[str, list[float]]:
    """Seconds of a forward and backward pass of each, in turns."""
    repeats, inner = (10, 10) if problem.device.type == 'cuda' else (7, 1)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(repeats + 2):
        for name, (block, args, kwargs) in calls.items():
            clock.settle()
            begin = clock.mark()
            for _ in range(inner):
                _block_step(block, args, kwargs, problem)
            end = clock.mark()
            clock.settle()
            if number > 1:  # the first ones compile and choose algorithms
                times[name].append(clock.seconds(begin, end) / inner)  # type: ignore[arg-type]
    return times


def _block_step(block: Any, args: tuple, kwargs: dict, problem: Problem) -> None:
    with problem.precision():
        out = block(*args, **kwargs)
    out.backward(torch.ones_like(out))
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            value.grad = None
    if isinstance(block, nn.Module):
        block.zero_grad(set_to_none=True)


def ratio_rows(
    rows: Rows,
    contenders: Sequence[Contender],
    turns: dict[str, list[tuple]],
    problem: Problem,
    blocks: dict[str, float],
) -> None:
    """Dense over routed, held against the ideal and against what the blocks' own times allow; dense over a peer."""
    both = zip(turns['dense'], turns['routed'], strict=True)
    ratio = spread([dense[0] / routed[0] for dense, routed in both])
    passes, optimizer = (statistics.median(turn[index] for turn in turns['dense']) for index in (1, 2))
    flop_ratio = problem.plan['ideal_step_ratio']
    ideal = (passes + optimizer) / (passes / flop_ratio + optimizer)
    spans = [route.span(problem.plan['depth']) for route in problem.config.routes()]
    saved = sum(
        (end - start + 1) * (blocks['N'] - blocks[f'K {number}']) for number, (start, end) in enumerate(spans)
    )  # fmt: skip
    saved -= sum(blocks['float32'] - blocks['N'] for _ in spans) if 'float32' in blocks else 0
    allowed = (passes + optimizer) / (passes + optimizer - saved)
    rows.add(
        'ratio', of='dense / routed', ratio=ratio, flop_ratio=flop_ratio, ideal=ideal, quotient=ratio['median'] / ideal,
        blocks_allow=allowed, quotient_of_blocks=ratio['median'] / allowed,
    )  # fmt: skip
    for peer, ours in itertools.product(contenders[2:], ('dense', 'routed')):
        pairs = zip(turns[peer.name], turns[ours], strict=True)
        rows.add('ratio', of=f'{peer.name} / {ours}', ratio=spread([theirs[0] / own[0] for theirs, own in pairs]))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for a reader, in Markdown."""
    first = rows[0]
    how = f'compiled {first["compile"]}, dynamic shapes {first["dynamic"]}' if first['compile'] else 'eager'
    product = next(row['tflops'] for row in rows if row['measurement'] == 'product')
    lines = [
        '',
        f'{" ".join([first["yaml"], *first["overrides"]])}: batch {first["batch_size"]}, {first["tokens"]} tokens, '
        f'{first["dtype"]}, {how}; {first["device"]}, torch {first["torch"]}, commit {first["commit"]}; '
        f'matrix products at {product:.4g} TFLOP/s',
        '',
        '| step | ms (quartiles) | forward and backward | optimizer | tokens/s | MFU | peak GiB |',
        '|---|---|---|---|---|---|---|',
    ]
    for row in (row for row in rows if row['measurement'] == 'step'):
        low, middle, high = (1000 * row['seconds'][name] for name in ('low', 'median', 'high'))
        passes, optimizer = 1000 * row['forward_backward_seconds'], 1000 * row['optimizer_seconds']
        mfu = '' if row['mfu'] is None else f'{row["mfu"]:.1%}'
        memory = '' if row['peak_gib'] is None else f'{row["peak_gib"]:.2f}'
        lines.append(
            f'| {row["contender"]} | {middle:.2f} ({low:.2f} to {high:.2f}) | {passes:.2f} | {optimizer:.2f} '
            f'| {row["tokens_per_second"]:,.0f} | {mfu} | {memory} |'
        )
    lines += [
        '',
        '| ratio | measured (quartiles) | ideal | of the ideal | the blocks allow | of that |',
        '|---|---|---|---|---|---|',
    ]
    for row in (row for row in rows if row['measurement'] == 'ratio'):
        value = (
            f'| {row["of"]} | {row["ratio"]["median"]:.3f} ({row["ratio"]["low"]:.3f} to {row["ratio"]["high"]:.3f}) '
        )
        if 'ideal' in row:
            value += f'| {row["ideal"]:.3f} | {row["quotient"]:.1%} '
            value += f'| {row["blocks_allow"]:.3f} | {row["quotient_of_blocks"]:.1%} |'
        else:
            value += '| | | | |'
        lines.append(value)
    times = [f'{row["block"]}: {1000 * row["seconds"]:.3f} ms' for row in rows if row['measurement'] == 'block']
    lines += ['', f'one block alone, forward and backward: {", ".join(times)}']
    return '\n'.join([*lines, *(_routing_line(row) for row in rows if row['measurement'] == 'routing')])


def _routing_line(row: dict[str, Any]) -> str:
    parts = [f'{name.replace("_", " ")} {1000 * row[name]:.2f} ms' for name in _ROUTING_PARTS]
    text = f'routing itself: {row["share"]:.2%} of a routed step: {", ".join(parts)}'
    if row['probe'] is None:
        return text
    return f'{text}; a probe {1000 * row["probe"]:.0f} ms, in {row["probes"]} of {row["batches"]:,} steps'


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        print(table(measure(parse(arguments)).rows))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
