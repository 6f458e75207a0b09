"""The example of docs/your_model.md runs as it is written, and the page says what is true."""

import re
import sys

import pytest

from tests.routing.foreign import CASES
from tests.runs import ROOT, launch

PAGE = (ROOT / 'docs' / 'your_model.md').read_text()


def test_the_example_runs(tmp_path):
    done = launch(tmp_path, [sys.executable, str(ROOT / 'docs' / 'your_model.py')])
    assert done.returncode == 0, done.stdout + done.stderr
    shown = re.search(r'```text\n(.*?)```', PAGE, re.DOTALL)
    assert shown is not None
    assert done.stdout.split() == shown.group(1).split()


@pytest.mark.parametrize('name', CASES)
def test_the_table_has_the_settings_that_the_tests_use(name):
    (row,) = [line for line in PAGE.splitlines() if line.startswith('|') and f'`{name}`' in line]
    assert eval(f'dict({row.split("|")[3].strip().strip("`")})') == CASES[name].settings
