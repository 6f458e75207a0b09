"""``benchmarks/gpu.py``: rows as real processes, of which some fail, and the same command again."""

import json
import re
import time
from pathlib import Path

import gpu
import pytest

ROOT = Path(__file__).parents[2]
MEASURED = 'print(\'{"measurement": "trainer", "added": 0.5}\')'
COMMON = {'rehearsal': True, 'card': 'CPU', 'commit': 'abc'}
FACTS = {'cards': [], 'driver': None, 'cuda': None, 'versions': {'torch': '2.7'}, 'commit': 'abc'}


def row(name: str, code: str, seconds: float = 1, limit: int = 20, alone: bool = False) -> gpu.Row:
    return gpu.Row(name, ('-c', code), seconds, limit, alone)


ROWS = [
    row('good', MEASURED),
    row('broken', 'raise SystemError("the reason")'),
    row('refused', 'import sys; print("model.attention: unknown setting", file=sys.stderr); sys.exit(2)'),
    row('slow', 'import time; time.sleep(60)', limit=1),
    row('long', MEASURED, seconds=10_000),
    row('first', MEASURED, alone=True),
]


@pytest.fixture
def results(tmp_path):
    return gpu.Results(tmp_path / 'out')


@pytest.mark.parametrize('gpus', [0, 3])
def test_each_row_ends_in_its_own_way_and_nothing_starts_that_cannot_end(results, gpus):
    skipped = gpu.work(ROWS, results, time.monotonic() + 60, gpus, COMMON)
    rows = {row['name']: row for row in results.rows()}
    assert {name: row['status'] for name, row in rows.items()} == {
        'good': 'measured', 'broken': 'failed', 'refused': 'refused', 'slow': 'timed out', 'first': 'measured',
    }  # fmt: skip
    assert next(iter(rows)) == 'first'
    assert [row.name for row in skipped] == ['long']
    assert rows['good']['measurements'] == [{'measurement': 'trainer', 'added': 0.5}]
    assert 'the reason' in rows['broken']['output']
    text = gpu.table(results.rows(), FACTS)
    assert 'added 0.5' in text and 'model.attention: unknown setting' in text and 'the reason' in text


def test_a_row_that_the_end_of_the_time_cut_short_is_measured_again(results):
    slow = row('slow', 'import time; time.sleep(60)', seconds=0, limit=50)
    gpu.work([slow], results, time.monotonic() + 1, 0, COMMON)
    assert [row['status'] for row in results.rows()] == ['cut short'] and results.done() == set()


def test_what_is_measured_is_not_measured_again_but_for_a_line_that_a_kill_cut_short(results):
    gpu.work(ROWS[:2], results, time.monotonic() + 60, 0, COMMON)
    assert results.done() == {'good', 'broken'}
    assert gpu.Results(results.folder, retry=True).done() == {'good'}
    path = results.folder / 'rows.jsonl'
    path.write_text(path.read_text()[:-20])
    assert results.done() == {'good'}
    gpu.work(ROWS[1:2], results, time.monotonic() + 60, 0, COMMON)
    assert results.done() == {'good', 'broken'}


def test_the_rows_of_a_gpu_begin_with_the_tests_and_the_largest_network():
    options = gpu.parse(['--minutes', '10', '--out', 'x'])
    options.share = 1.0
    rows = gpu.rows_of(options)
    assert [row.name for row in rows][:3] == ['tests', 'xl/2 eager', 'xl/2 compiled']
    assert 'tests/gpu/test_gpu.py' in rows[0].words and 'tests/models/test_mamba2_dit.py' in rows[0].words
    assert len({row.name for row in rows}) == len(rows)
    for one in rows:
        named = [word for word in one.words if word.endswith(('.py', '.yaml'))]
        assert all((ROOT / word).exists() for word in named), one


def test_a_cpu_is_refused_without_rehearsal(capsys):
    with pytest.raises(SystemExit):
        gpu.parse(['--minutes', '1', '--out', 'x', '--device', 'cpu'])
    assert '--rehearse' in capsys.readouterr().err


def test_the_command_says_where_it_runs_and_ends_in_its_time(tmp_path, capsys):
    words = ['--minutes', '0.5', '--out', str(tmp_path), '--device', 'cpu', '--rehearse', '--only', 'no such row']
    assert gpu.main(words) == 0
    assert json.loads((tmp_path / 'environment.json').read_text())['versions']['torch']
    assert 'no GPU' in (tmp_path / 'table.md').read_text()
    assert capsys.readouterr().out.startswith('{')


def test_the_wheels_are_the_versions_of_the_lock():
    locked = (ROOT / 'constraints' / 'torch27.txt').read_text()
    wheels = re.findall(r'^[\w-]+==[\w.]+$', (ROOT / 'benchmarks' / 'wheels.txt').read_text(), re.MULTILINE)
    assert len(wheels) > 25
    for wheel in wheels:
        assert wheel.startswith('xformers') or re.search(rf'^{re.escape(wheel)}( |$)', locked, re.MULTILINE), wheel
