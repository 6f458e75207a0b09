"""Record what the command line does, or show what it does otherwise than recorded.

    python tests/frozen/record.py --check                   # everything, to the bit; exit code 1 if something differs
    python tests/frozen/record.py --check --only plans      # a part: losses, plans, refusals, files
    python tests/frozen/record.py --only refusals           # record it anew: a difference on purpose

See README.md beside this file.
"""

import argparse
import difflib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if str(HERE.parents[1]) not in sys.path:  # as a script, Python has put this folder there instead
    sys.path[0:0] = [str(HERE.parents[1])]

import torch  # noqa: E402

from tests.frozen.commands import Commands  # noqa: E402
from tests.frozen.old_files import measure, unpack  # noqa: E402
from tests.frozen.recipes import record_runs  # noqa: E402
from tests.frozen.refusals import record_refusals  # noqa: E402
from tests.runs import ROOT  # noqa: E402

PLANS = (
    *(f'plan yamls/{path.name}' for path in sorted((ROOT / 'yamls').glob('*.yaml'))),
    'plan yamls/dit_xl_tread.yaml --ranks 8',
    'plan yamls/digits_tread.yaml algorithms.tread=null run_name=dense',
    'plan yamls/digits_tread.yaml algorithms.power_ema.interval=100ba algorithms.tread.end_time=0.92dur',
    'plan yamls/digits_tread.yaml --json',
)
"""Planned where no data are, so that what is said of those is frozen too."""


def record_plans(commands: Commands, lines: Sequence[str] = PLANS) -> dict[str, Any]:
    """Text and exit code of each plan; ``lines`` are some of ``PLANS``."""
    plans = {}
    for line in lines:
        done = commands(*line.split())
        texts = {'out': commands.normalised(done.stdout), 'err': commands.normalised(done.stderr)}
        plans[line] = {'code': done.returncode, **texts}
    return plans


def record_files(commands: Commands) -> dict[str, Any]:
    """What the commands make of the files of an earlier version."""
    unpack(commands.folder)
    return measure(commands)


PARTS: dict[str, Callable[[Commands], dict[str, Any]]] = {
    'plans': record_plans,
    'refusals': record_refusals,
    'files': record_files,
    'losses': record_runs,
}


def load(part: str) -> dict[str, Any]:
    """What was recorded of a part."""
    return json.loads((HERE / f'{part}.json').read_text())['recorded']


def differences(part: str, recorded: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A unified diff of two recordings, each entry under its own heading; empty if they are equal."""
    lines: list[str] = []
    for name in sorted(recorded.keys() | now.keys()):
        before, after = (_text(side[name]) if name in side else [] for side in (recorded, now))
        titles = (f'recorded: {part}: {name}', f'now: {part}: {name}')
        lines += difflib.unified_diff(before, after, *titles, lineterm='', n=2)
    return lines


def _text(value: object) -> list[str]:
    return json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True).splitlines()


def _surroundings() -> dict[str, str]:
    """What an equality to the bit depends on besides the code, and which code that was."""
    words = ['git', 'log', '-1', '--format=%h', '--', 'tread_composer', 'yamls']
    commit = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    capability = torch.backends.cpu.get_cpu_capability()
    return {'commit': commit, 'torch': torch.__version__.partition('+')[0], 'vector instructions': capability}


def main() -> int:
    """Record or check the parts that are asked for; returns the exit code."""
    parser = argparse.ArgumentParser(description='Record the behaviour of the command line, or compare it with that.')
    parser.add_argument('--check', action='store_true', help='write nothing; print what differs, exit 1 if anything')
    parser.add_argument('--only', nargs='+', choices=PARTS, default=list(PARTS), help='(all)')
    options = parser.parse_args()
    os.environ['OMP_NUM_THREADS'] = '1'
    different = False
    for part in options.only:
        start, path = time.monotonic(), HERE / f'{part}.json'
        with tempfile.TemporaryDirectory() as folder:
            now = json.loads(json.dumps(PARTS[part](Commands(Path(folder)))))
        if options.check:
            before = json.loads(path.read_text())
            lines = differences(part, before['recorded'], now)
            different |= bool(lines)
            print('\n'.join([*lines, f'{part}: {"DIFFERENT" if lines else "equal"}, {time.monotonic() - start:.0f} s']))
            if lines and before['with'] | {'commit': ''} != _surroundings() | {'commit': ''}:
                print(f'{part}: recorded with {before["with"]}, this is {_surroundings()}: sums are rounded otherwise')
        else:
            content = {'with': _surroundings(), 'recorded': now}
            path.write_text(json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + '\n')
            print(f'written: {path.relative_to(ROOT)}, {time.monotonic() - start:.0f} s')
        sys.stdout.flush()
    return int(different)


if __name__ == '__main__':
    sys.exit(main())
