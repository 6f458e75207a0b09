"""Following CONTRIBUTING.md to the letter adds a part; its table names what exists."""

import importlib
import re
import shutil
import subprocess
import sys

from tests.runs import ROOT, environment

PAGE = (ROOT / 'CONTRIBUTING.md').read_text()
SECTION = PAGE[PAGE.index('## Add a part') : PAGE.index('## A change')]


def test_folders_registries_and_tests_of_the_table_exist():
    rows = [re.findall(r'`([^`]+)`', row) for row in re.findall(r'^\| [a-z]+ \| `.*', SECTION, re.MULTILINE)]
    assert len(rows) == 6
    for folder, registry, file, *_ in rows:
        module = importlib.import_module(file.removesuffix('.py').removesuffix('/__init__').replace('/', '.'))
        assert (ROOT / folder).is_dir() and getattr(module, registry)
    paths = {path for row in rows for path in row if '/' in path}
    assert not {path for path in paths if not (ROOT / path).exists()}


def test_a_callback_is_added_as_the_page_says(tmp_path):
    shutil.copytree(ROOT / 'tread_composer', tmp_path / 'tread_composer')
    code, line = re.findall(r'^```python\n(.*?)^```', SECTION, re.DOTALL | re.MULTILINE)
    (tmp_path / 'tread_composer/callbacks/batch_counter.py').write_text(code)
    registry = tmp_path / 'tread_composer/config/registry.py'
    before = "    'callback': {\n"
    assert registry.read_text().count(before) == 1
    registry.write_text(registry.read_text().replace(before, before + line))
    words = ('callbacks.batch_counter={key: a/b}', 'callbacks.batch_counter={kye: a/b}')
    script = f"""
from tread_composer.config import load_config
from tread_composer.core.errors import UserError
config = load_config({str(ROOT / 'yamls/digits.yaml')!r}, [{words[0]!r}])
print(config.callbacks['batch_counter'].build().key)
try:
    load_config({str(ROOT / 'yamls/digits.yaml')!r}, [{words[1]!r}])
except UserError as error:
    print(error)
"""
    env = environment(PYTHONPATH=str(tmp_path))
    done = subprocess.run([sys.executable, '-c', script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('a/b\n') and "Did you mean 'key'?" in done.stdout
