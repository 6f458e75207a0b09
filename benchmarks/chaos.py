"""Kills training at exact places and at random, starts it again by the same command, and holds it against a whole run.

    python benchmarks/chaos.py --kills 100 --out chaos.jsonl

The run is digits_tread with a tiny network: 12 batches in two microbatches, an evaluation, a sample grid and
checkpoints, on one and on two ranks. A first run counts its file operations in the run's folder and in that of the data
(opening to write, renaming, linking, removing: Python reports each to an audit hook). A kill is SIGKILL before the n-th
of them, or after a random time; of all ranks at once, of one rank alone, or of the launcher. Then the same command runs
to the end. Equal to the bit must be: losses, samples and kept tokens of every batch, weights, optimizer, average. Each
kill is a line of the file; what is in it already is not done again. Settings may follow: save_in_background=true.
"""

import argparse
import collections
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from tread_composer.core.process import prepare_process

prepare_process()  # before torch is loaded, and MLflow

import torch
from composer.core import Callback, State
from composer.loggers import Logger

from tread_composer.cli import main
from tread_composer.core.batch import KEPT_TOKENS, SAMPLE_IDS
from tread_composer.io.progress import Progress
from tread_composer.io.table import text_table

ROOT = Path(__file__).resolve().parents[1]
BATCHES = 12
WORDS = [  # and those of the command line
    'train',
    str(ROOT / 'yamls' / 'digits_tread.yaml'),
    'model={name: dit, patch_size: 2, hidden_size: 16, depth: 6, num_heads: 2}',
    'callbacks={order: {name: "benchmarks.chaos:Order"}, sample_grid: {interval: 6ba, num_steps: 2}}',
    'loggers.mlflow=null',
    'device=cpu',
    'device_train_microbatch_size=32',
    'eval_interval=4ba',
    'save_interval=3ba',
    f'max_duration={BATCHES}ba',
]
_LONGEST = 300.0  # seconds of one process
_OPERATIONS = ('open', 'os.rename', 'os.symlink', 'os.link', 'os.remove', 'os.rmdir', 'os.mkdir')


class Order(Callback):
    """Appends what each batch consisted of to ``order-RANK.jsonl``, before a kill can take it back."""

    def batch_end(self, state: State, logger: Logger) -> None:
        """One line: batch, loss, and digests of samples and kept tokens."""
        tensors = [state.batch[name] for name in (SAMPLE_IDS, KEPT_TOKENS) if name in state.batch]
        parts = [hashlib.sha256(tensor.cpu().numpy().tobytes()).hexdigest()[:12] for tensor in tensors]
        loss = float(state.total_loss_dict['loss/train/total']).hex()
        with open(f'order-{os.environ.get("RANK", "0")}.jsonl', 'a') as file:
            file.write(json.dumps([int(state.timestamp.batch), loss, *parts]) + '\n')
            file.flush()
            os.fsync(file.fileno())


def operation(event: str, arguments: tuple[Any, ...], folder: str) -> bool:
    """Whether an audit event changes a file of the run or of its data."""
    if event not in _OPERATIONS or (
        event == 'open' and not (isinstance(arguments[1], str) and arguments[1][0] in 'wax')
    ):
        return False
    paths = [os.fspath(path) for path in arguments[:2] if isinstance(path, str | os.PathLike)]
    return any(os.path.abspath(path).startswith((f'{folder}/runs', f'{folder}/data')) for path in paths)


def run_rank(folder: Path, variables: dict[str, str], kill_at: int | None, counter: Path | None) -> None:
    """The command in this process: kills itself before file operation ``kill_at``, or counts them all."""
    os.environ.update(variables)
    os.chdir(folder)
    count = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if operation(event, arguments, str(folder)):
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    if kill_at is not None or counter is not None:
        sys.addaudithook(watch)
    sys.stdout = sys.stderr = open('output.txt', 'a', buffering=1)  # noqa: SIM115
    code = main([*WORDS])
    if counter is not None:
        counter.write_text(str(count))
    os._exit(code)


def variables_of(ranks: int) -> list[dict[str, str]]:
    """What a launcher sets for each rank."""
    if ranks == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    shared = {'WORLD_SIZE': str(ranks), 'LOCAL_WORLD_SIZE': str(ranks), 'NODE_RANK': '0'}
    shared |= {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}
    return [{**shared, 'RANK': str(rank), 'LOCAL_RANK': str(rank)} for rank in range(ranks)]


def run(
    folder: Path, ranks: int, kill_at: int | None = None, after: float | None = None, alone: int | None = None,
    counter: Path | None = None,
) -> list[int | None]:  # fmt: skip
    """The command on so many ranks; the exit codes.

    Args:
        folder: Where it runs.
        ranks: How many.
        kill_at: Rank 0 (or ``alone``) kills itself before this file operation.
        after: All (or ``alone``) are killed after so many seconds.
        alone: The only rank to be killed; the others must then end by themselves, or as the launcher ends them.
        counter: Gets the number of file operations of rank 0.
    """
    fork = multiprocessing.get_context('fork')  # this process has imported everything and started no thread
    processes = []
    for rank, variables in enumerate(variables_of(ranks)):
        own_kill = kill_at if rank == (alone or 0) else None
        own_counter = counter if rank == 0 else None
        processes.append(fork.Process(target=run_rank, args=(folder, variables, own_kill, own_counter)))
        processes[-1].start()
    end = time.monotonic() + (_LONGEST if after is None else after)
    while any(process.is_alive() for process in processes) and time.monotonic() < end:
        if any(process.exitcode for process in processes):  # as the launcher does
            end = min(end, time.monotonic() + (0 if alone is None else 10))
        time.sleep(0.01)
    for rank, process in enumerate(processes):
        if after is not None and alone is not None and rank != alone:
            process.join(10)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def run_under_launcher(folder: Path, after: float) -> None:
    """Two ranks under Composer's launcher, which alone is killed: its ranks must end by themselves."""
    words = [str(Path(sys.executable).parent / 'composer'), '-n', '2', str(ROOT / 'train.py'), *WORDS[1:]]
    variables = {**os.environ, 'PYTHONPATH': str(ROOT)}
    with open(folder / 'output.txt', 'a') as output:
        launcher = subprocess.Popen(words, cwd=folder, env=variables, stdout=output, stderr=output)
        time.sleep(after)
        ranks = psutil.Process(launcher.pid).children()
        launcher.kill()
        launcher.wait()
    if psutil.wait_procs(ranks, timeout=60)[1]:
        raise RuntimeError('the ranks outlived their launcher by a minute')


def outcome(folder: Path, ranks: int) -> dict[str, str]:
    """What must be equal, in digests."""
    state = torch.load(folder / 'runs' / 'digits_tread' / 'latest-rank0.pt', weights_only=False)['state']
    sums: dict[str, str] = {'batches': str(state['timestamp']['Timestamp']['batch'])}
    trees = {'weights': state['model'], 'optimizer': state['optimizers'], 'average': dict(state['algorithms'])['EMA']}
    for name, tree in trees.items():
        digest = hashlib.sha256()
        for key, tensor in sorted(tensors_of(tree)):
            digest.update(key.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        sums[name] = digest.hexdigest()[:16]
    for rank in range(ranks):
        lines = collections.defaultdict(set)
        for line in (folder / f'order-{rank}.jsonl').read_text().splitlines():
            batch, *rest = json.loads(line)
            lines[batch].add(tuple(rest))
        twice = [batch for batch, seen in lines.items() if len(seen) > 1]
        text = f'batches {twice} differ between two passes' if twice else json.dumps(sorted(map(str, lines.items())))
        sums[f'order of rank {rank}'] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return sums


def tensors_of(tree: Any, prefix: str = '') -> list[tuple[str, torch.Tensor]]:
    """All tensors within mappings, by their path."""
    if isinstance(tree, torch.Tensor):
        return [(prefix, tree)]
    if not isinstance(tree, dict):
        return []
    return [pair for key, value in tree.items() for pair in tensors_of(value, f'{prefix}/{key}')]


def attempt(trial: dict[str, Any], whole: dict[str, str], folder: Path) -> dict[str, Any]:
    """One kill and what came of it."""
    ranks = trial['ranks']
    if trial['who'] == 'launcher':
        run_under_launcher(folder, trial['after'])
    else:
        alone = trial['alone'] if trial['who'] == 'alone' else None
        run(folder, ranks, trial.get('operation'), trial.get('after'), alone)
    codes = run(folder, ranks)
    if codes != [0] * ranks:
        text = (folder / 'output.txt').read_text()[-2000:]
        return {**trial, 'result': 'does not go on', 'codes': codes, 'output': text}
    results = outcome(folder, ranks)
    different = [name for name in whole if results.get(name) != whole[name]]
    return {**trial, 'result': f'differs: {", ".join(different)}' if different else 'equal'}


def trials(kills: int, operations: dict[int, int], seconds: dict[int, float], seed: int) -> list[dict[str, Any]]:
    """Half at file operations, evenly spread, half at random times; a third of those of two ranks kill one alone."""
    draw, plan = random.Random(seed), []
    for number in range(kills):
        ranks = 1 if number % 5 < 3 else 2
        trial: dict[str, Any] = {'number': number, 'ranks': ranks, 'who': 'all'}
        if number % 25 == 24:
            trial |= {'who': 'launcher', 'after': round(draw.uniform(5, 5 + 2 * seconds[2]), 3)}
        elif number % 2:
            trial['after'] = round(draw.uniform(0, seconds[ranks]), 3)
        else:
            trial['operation'] = number * operations[ranks] // kills
        if ranks == 2 and trial['who'] == 'all' and number % 3 == 0:
            trial |= {'who': 'alone', 'alone': draw.randrange(2)}
        plan.append(trial)
    return plan


def measure(out: Path, kills: int, seed: int) -> list[dict[str, Any]]:
    """All kills that the file lacks; the rows of all."""
    done = {row['number']: row for row in map(json.loads, out.read_text().splitlines())} if out.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        whole, operations, seconds = {}, {}, {}
        for ranks in (1, 2):
            folder = root / f'whole{ranks}'
            folder.mkdir()
            began = time.monotonic()
            codes = run(folder, ranks, counter=root / f'count{ranks}')
            if codes != [0] * ranks:
                sys.exit(f'the run itself fails on {ranks} ranks:\n{(folder / "output.txt").read_text()[-3000:]}')
            seconds[ranks] = time.monotonic() - began
            operations[ranks], whole[ranks] = int((root / f'count{ranks}').read_text()), outcome(folder, ranks)
        print(f'{operations[1]} file operations on 1 rank, {operations[2]} on the first of 2', flush=True)
        progress = Progress('chaos', kills, 'kills')
        for trial in trials(kills, operations, seconds, seed):
            if trial['number'] not in done:
                folder = root / f'kill{trial["number"]}'
                folder.mkdir()
                row = attempt(trial, whole[trial['ranks']], folder)
                done[trial['number']] = row
                with out.open('a') as file:
                    file.write(json.dumps(row) + '\n')
                shutil.rmtree(folder)
            progress.add(1)
    return list(done.values())


def print_table(rows: list[dict[str, Any]]) -> None:
    """Kills by kind, and every one that did not end equal."""
    counts: dict[tuple[str, ...], list[int]] = collections.defaultdict(lambda: [0, 0])
    for row in rows:
        place = 'file operation' if 'operation' in row else 'random time'
        counts[(str(row['ranks']), row['who'], place)][row['result'] == 'equal'] += 1
    table = [(*kind, sum(numbers), numbers[1]) for kind, numbers in sorted(counts.items())]
    print(text_table(('ranks', 'killed', 'at', 'kills', 'ended equal'), table, 'lllrr'))
    for row in rows:
        if row['result'] != 'equal':
            print(json.dumps({key: value for key, value in row.items() if key != 'output'}))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=100)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', type=Path, default=Path('chaos.jsonl'), help='one line a kill (default: chaos.jsonl)')
    parser.add_argument('settings', nargs='*', metavar='key=value', help='of the run')
    options = parser.parse_args()
    WORDS.extend(options.settings)
    results = measure(options.out.resolve(), options.kills, options.seed)
    print_table(results)
    sys.exit(any(row['result'] != 'equal' for row in results))
