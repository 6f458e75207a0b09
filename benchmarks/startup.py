"""CPU seconds of commands that train nothing: ``python benchmarks/startup.py [CHECKOUT [CHECKOUT]] [--rounds 5]``.

Of one checkout (this one by default), or of two in turns, so that whatever else the machine does falls on both alike;
which of them comes first changes from round to round. Seconds are user and system time of the process and its
children, which a busy machine stretches far less than the clock. A first round, which fills the caches, is not counted.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

COMMANDS = {
    '--help': ['--help'],
    'sample --help': ['sample', '--help'],
    'plan': ['plan', 'yamls/digits_tread.yaml'],
    'a refused typo': ['train', 'yamls/digits_tread.yaml', 'optimzer.lr=1'],
}


def cpu_seconds(checkout: Path, words: list[str]) -> float:
    """Of one process, started in the checkout, whose code it imports."""
    environment = {**os.environ, 'PYTHONPATH': str(checkout)}
    process = subprocess.Popen(
        [sys.executable, '-m', 'tread_composer', *words],
        cwd=checkout,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != (2 if words[0] == 'train' else 0):
        sys.exit(f'{checkout}: {" ".join(words)} ended with {process.returncode}')
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parent.parent
    parser.add_argument('checkouts', nargs='*', type=Path, default=[here], help='folders of one or two checkouts')
    parser.add_argument('--rounds', type=int, default=5, help='(%(default)s)')
    options = parser.parse_args()
    checkouts = [path.resolve() for path in options.checkouts]
    if len(checkouts) > 2:
        parser.error('give one checkout or two')

    print('| command | ' + ' | '.join(f'{path.name}, CPU s' for path in checkouts) + ' | ratio |')
    print('|---' * (len(checkouts) + 2) + '|')
    for name, words in COMMANDS.items():
        seconds: dict[Path, list[float]] = {path: [] for path in checkouts}
        for number in range(options.rounds + 1):
            for path in checkouts if number % 2 else checkouts[::-1]:
                spent = cpu_seconds(path, words)
                if number:
                    seconds[path].append(spent)
        medians = [statistics.median(seconds[path]) for path in checkouts]
        cells = [
            f'{median:.2f} ({min(seconds[path]):.2f} to {max(seconds[path]):.2f})'
            for path, median in zip(checkouts, medians, strict=True)
        ]
        print(f'| {name} | {" | ".join(cells)} | {medians[0] / medians[-1]:.2f} |', flush=True)


if __name__ == '__main__':
    main()
