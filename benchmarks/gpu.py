"""Everything that is to be known of a machine with GPUs, in one command and a given time.

    python benchmarks/gpu.py --minutes 10 --out results

Prints the environment, runs the tests that need a GPU, then as many measurements as fit, the most important first.
Each is a process of its own with a limit; one that fails is a row too, and the next goes on. Rows are in
``results/rows.jsonl`` as soon as they are measured, and a row that is there is not measured again: the same command
goes on where the time of the last one ended. With several GPUs each takes rows; what shares a model among them (NCCL)
is in the tests. The table at the end is for benchmarks/README.md. Imports neither torch nor Composer itself.
"""

import argparse
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_rows import Row, rows_of
from gpu_table import table

ROOT = Path(__file__).parent.parent
PACKAGES = (
    'torch',
    'torchvision',
    'numpy',
    'mosaicml',
    'mosaicml-streaming',
    'transformers',
    'torchmetrics',
    'triton',
    'xformers',
)
FACTS = """
import json, torch
cuda = torch.cuda.is_available()
count = torch.cuda.device_count() if cuda else 0
print(json.dumps({
    'cards': [torch.cuda.get_device_name(i) for i in range(count)],
    'gib': min([torch.cuda.get_device_properties(i).total_memory / 2**30 for i in range(count)], default=0),
    'capability': list(torch.cuda.get_device_capability()) if cuda else None,
    'cuda': torch.version.cuda, 'cudnn': torch.backends.cudnn.version(),
    'nccl': list(torch.cuda.nccl.version()) if cuda else None,
}))
"""
STATUS = {0: 'measured', 2: 'refused'}
CUT_SHORT = 'cut short'
OUTPUT_KEPT = 2000  # characters of a row's output, where it did not end well


@dataclass
class Results:
    """What has been measured, in a folder; safe to use from several threads.

    Args:
        folder: Holds ``rows.jsonl``, ``environment.json``, ``log.txt`` and ``table.md``.
        retry: Measure rows again that were not measured well.
    """

    folder: Path
    retry: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        """Make the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def rows(self) -> list[dict[str, Any]]:
        """All rows, of this and earlier runs; the last of each name. A line cut short by a kill is no row."""
        path, rows = self.folder / 'rows.jsonl', {}
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            rows[row['name']] = row
        return list(rows.values())

    def done(self) -> set[str]:
        """Names that are not measured again. A row that only the end of the time has cut short is."""
        rows = [row for row in self.rows() if row['status'] != CUT_SHORT]
        return {row['name'] for row in rows if row['status'] == 'measured' or not self.retry}

    def add(self, row: dict[str, Any], output: str) -> None:
        """Keep a row at once, with what its process printed."""
        with self.lock:
            with (self.folder / 'rows.jsonl').open('a+') as file:
                file.seek(0)
                text = file.read()
                file.write(('\n' if text and not text.endswith('\n') else '') + json.dumps(row) + '\n')
                file.flush()
                os.fsync(file.fileno())
            with (self.folder / 'log.txt').open('a') as file:
                file.write(f'===== {row["name"]}: {row["command"]}\n{output[-100_000:]}\n')


def child_environment(gpu: int | None) -> dict[str, str]:
    """Of a row's process: the code beside this file, one GPU or all, and threads that do not spin while they wait."""
    paths = [str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]
    variables = {'PYTHONPATH': os.pathsep.join(paths), 'PYTHONUNBUFFERED': '1', 'PYTHONDONTWRITEBYTECODE': '1'}
    environment = {'GOMP_SPINCOUNT': '100000', **os.environ, **variables}
    if gpu is not None:
        shown = os.environ.get('CUDA_VISIBLE_DEVICES')
        environment['CUDA_VISIBLE_DEVICES'] = str(gpu) if shown is None else shown.split(',')[gpu]
    return environment


def run(words: Sequence[str], limit: float, gpu: int | None) -> tuple[int | None, str, str]:
    """Exit code (None: ended at its limit), standard output, and both outputs together."""
    with tempfile.TemporaryFile('w+') as out, tempfile.TemporaryFile('w+') as errors:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=child_environment(gpu),
            stdout=out,
            stderr=errors,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its workers with it
                process.wait()
        out.seek(0)
        errors.seek(0)
        text = out.read()
        return code, text, f'{text}\n{errors.read()}'


def measure(row: Row, results: Results, left: float, gpu: int | None, common: dict[str, Any]) -> None:
    """Run a row's process and keep what it says."""
    began = time.monotonic()
    code, text, output = run(row.words, min(row.limit, left), gpu)
    ended = 'timed out' if row.limit < left else CUT_SHORT
    status = ended if code is None else STATUS.get(code, 'failed')
    entry = {
        'name': row.name,
        'status': status,
        'seconds': round(time.monotonic() - began, 1),
        'command': ' '.join(['python', *(f"'{word}'" if ' ' in word else word for word in row.words)]),
        'measurements': [json.loads(line) for line in text.splitlines() if line.startswith('{"measurement"')],
        **common,
    }
    if status != 'measured' or not entry['measurements']:
        entry['output'] = output.strip()[-OUTPUT_KEPT:]
    results.add(entry, output)
    print(f'{row.name}: {status} in {entry["seconds"]} s', flush=True)
    if status != 'measured':
        print('  ' + '\n  '.join(entry['output'].splitlines()[-3:]), flush=True)


def work(rows: Sequence[Row], results: Results, end: float, gpus: int, common: dict[str, Any]) -> list[Row]:
    """Measure rows until the time is up; returns those that did not fit. What needs all GPUs runs alone, first."""
    waiting, skipped, lock = list(rows), [], threading.Lock()

    def fits(row: Row) -> bool:
        if row.seconds <= end - time.monotonic():
            return True
        skipped.append(row)
        return False

    for row in [row for row in waiting if row.alone]:
        waiting.remove(row)
        if fits(row):
            measure(row, results, end - time.monotonic(), None, common)

    def of_gpu(gpu: int | None) -> None:
        while True:
            with lock:
                row = next((row for row in waiting if fits(row)), None)
                waiting[:] = [one for one in waiting if one is not row and one not in skipped]
            if row is None:
                return
            measure(row, results, end - time.monotonic(), gpu, common)

    threads = [threading.Thread(target=of_gpu, args=(gpu if gpus else None,)) for gpu in range(max(gpus, 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return skipped


def facts_of(options: argparse.Namespace) -> dict[str, Any]:
    """The environment: cards, driver and versions."""
    code, text, output = run(['-c', FACTS], 120, None)
    if code != 0:
        sys.exit(f'torch cannot be imported here:\n{output[-OUTPUT_KEPT:]}')
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    try:
        words = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
        driver = subprocess.run(words, capture_output=True, text=True, timeout=60).stdout.split('\n')[0].strip() or None
    except (OSError, subprocess.TimeoutExpired):
        driver = None
    facts = json.loads(text.splitlines()[-1])
    python = sys.version.split()[0]
    return {
        **facts,
        'driver': driver,
        'python': python,
        'cpu_cores': os.cpu_count(),
        'versions': versions,
        'commit': _commit(options),
    }


def _commit(options: argparse.Namespace) -> str | None:
    if options.commit is not None:
        return options.commit
    try:
        words = ['git', '-C', str(ROOT), 'describe', '--always', '--dirty']
        return subprocess.run(words, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=float, required=True, help='of wall time, for all of it')
    parser.add_argument('--out', type=Path, required=True, help='a folder; the rows in it are not measured again')
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda')
    parser.add_argument(
        '--rehearse', action='store_true', help='tiny networks, to see that all starts: no figure counts'
    )
    parser.add_argument(
        '--retry', action='store_true', help='measure rows again that failed, were refused or timed out'
    )
    parser.add_argument('--only', help='rows whose name holds this text')
    parser.add_argument('--commit', help='of the code, where there is no checkout to ask')
    options = parser.parse_args(arguments)
    if options.device == 'cpu' and not options.rehearse:
        parser.error('--device cpu: these networks are too large for a CPU; add --rehearse, or use step_time.py')
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    options = parse(arguments)
    results = Results(options.out, options.retry)
    facts = facts_of(options)
    print(json.dumps(facts, indent=2), flush=True)
    (options.out / 'environment.json').write_text(json.dumps(facts, indent=2) + '\n')
    gpus = len(facts['cards']) if options.device == 'cuda' else 0
    if options.device == 'cuda' and not gpus:
        print(
            'no GPU that torch can use here; --device cpu --rehearse tries this command out on a CPU', file=sys.stderr
        )
        return 2
    # Batches are for 80 GB; a smaller card takes its share.
    options.share = min(1.0, facts['gib'] / 75) if gpus else 1.0
    done = results.done()
    rows = [row for row in rows_of(options) if row.name not in done and (options.only or '') in row.name]
    common = {
        'rehearsal': options.rehearse,
        'card': ', '.join(sorted(set(facts['cards']))) or 'CPU',
        'commit': facts['commit'],
    }
    skipped = work(rows, results, began + 60 * options.minutes - 3, gpus, common)
    text = table(results.rows(), facts)
    (options.out / 'table.md').write_text(text)
    print(text)
    for row in skipped:
        print(f'not started, {row.seconds} s would not have fitted: {row.name}')
    if skipped:
        print('the same command goes on with them')
    return 0


if __name__ == '__main__':
    sys.exit(main())
