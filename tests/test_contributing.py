"""Following CONTRIBUTING.md to the letter adds a part of each kind; its table names what exists."""

import ast
import importlib
import json
import re
import shutil
import subprocess
import sys

import pytest

from tests.runs import ROOT, environment

PAGE = (ROOT / 'CONTRIBUTING.md').read_text()
SECTION = PAGE[PAGE.index('## Add a part') : PAGE.index('## A change')]
ROWS = {
    re.findall(r'\w+', row)[0]: re.findall(r'`([^`]+)`', row)
    for row in re.findall(r'^\| [a-z]+ \| `.*', SECTION, re.MULTILINE)
}
CODE, LINE = re.findall(r'^```python\n(.*?)^```', SECTION, re.DOTALL | re.MULTILINE)
# Kind of part -> what is added of `stranger/parts.py`, or of the page itself; a slip, and what its refusal names.
PARTS = {
    'backbone': ('Mixer', 'model.widht=8', "Did you mean 'width'?"),
    'objective': ('StraightLine', 'objective.powr=1', "Did you mean 'power'?"),
    'sampler': ('midpoint', 'callbacks.evaluation.sampler=midpiont', 'midpoint'),
    'metric': ('Spread', 'callbacks.evaluation.metrics=[spred]', 'spread'),
    'algorithm': ('Louder', 'algorithms.louder.rat=1', "Did you mean 'rate'?"),
    'callback': ('BatchCounter', 'callbacks.batch_counter.kye=x', "Did you mean 'key'?"),
}
SCRIPT = """
import contextlib, io, json, sys
from tread_composer.cli import main

def call(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(words))
    return code, out.getvalue(), err.getvalue()

calls = {slip: call('plan', 'run.yaml', slip) for slip in sys.argv[1:]}
calls['listed'] = call('schema', '--components')
calls['trained'] = call('train', 'run.yaml', 'max_duration=3ba')
print(json.dumps(calls))
"""


def snake_case(name):
    return re.sub('(?<!^)(?=[A-Z])', '_', name).lower()


def part_source(kind, name):
    """A part of the strangers' alone, with the imports that it may have where it is added."""
    tree = ast.parse((ROOT / 'tests' / 'stranger' / 'parts.py').read_text())
    ours = [node for node in tree.body if isinstance(node, ast.ImportFrom) and 'tread_composer' in str(node.module)]
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    imports = [node for node in imports if kind == 'metric' or node not in ours]
    parts = [node for node in tree.body if getattr(node, 'name', '') in (name, 'Layer')]
    return ast.unparse(ast.Module([*imports, *parts], []))


def add(kind, name, package):
    """A file and a line, as the table says: those of the page for a callback."""
    folder, registry, place, *_ = ROWS[kind]
    (package / folder / f'{snake_case(name)}.py').write_text(CODE if kind == 'callback' else part_source(kind, name))
    module = f'{folder}{snake_case(name)}'.replace('/', '.')
    table = getattr(importlib.import_module(re.sub(r'(/__init__)?\.py$', '', place).replace('/', '.')), registry)
    by_reference = all(isinstance(value, str) for value in table.get(kind, table).values())
    value = repr(f'{module}:{name}') if by_reference else name
    line = LINE if kind == 'callback' else f'{snake_case(name)!r}: {value},'
    imported = '' if by_reference else f'from {module} import {name}\n'
    before = rf"^    '{kind}': {{\n" if kind in table else rf'^{registry}\b.*= {{'
    text = (package / place).read_text()
    written, count = re.subn(before, lambda match: f'{imported}{match[0]}{line}', text, flags=re.MULTILINE)
    assert count == 1, (kind, place)
    (package / place).write_text(written)


@pytest.fixture(scope='module')
def calls(tmp_path_factory):
    """What the commands say in a copy of the package with one more part of each kind."""
    folder = tmp_path_factory.mktemp('contributed')
    shutil.copytree(ROOT / 'tread_composer', folder / 'tread_composer')
    recipe = (ROOT / 'tests' / 'stranger' / 'run.yaml').read_text()
    for kind, (name, *_) in PARTS.items():
        add(kind, name, folder)
        recipe = recipe.replace(f"'stranger.parts:{name}'", snake_case(name))
    # An algorithm and a callback of ours stand under their names.
    recipe = recipe.replace('name: louder, ', '').replace('callbacks:', 'callbacks:\n  batch_counter: {key: a/b}')
    (folder / 'run.yaml').write_text(recipe)
    (folder / 'script.py').write_text(SCRIPT)
    slips = [slip for _, slip, _ in PARTS.values()]
    path = f'{folder}:{ROOT / "tests"}'  # the package's copy, and what of stranger.parts the table does not have
    program = [sys.executable, 'script.py', *slips]
    done = subprocess.run(program, cwd=folder, env=environment(PYTHONPATH=path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_folders_registries_and_tests_of_the_table_exist():
    assert ROWS.keys() == PARTS.keys()
    paths = {path for row in ROWS.values() for path in row if '/' in path}
    assert not {path for path in paths if not (ROOT / path).exists()}


def test_parts_that_were_added_as_the_page_says_train_together(calls):
    code, out, err = calls['trained']
    assert code == 0 and 'batches 0 to 3' in out, err


@pytest.mark.parametrize('kind', PARTS)
def test_a_part_is_listed_and_its_slips_are_refused(calls, kind):
    name, slip, words = PARTS[kind]
    assert re.search(rf'^{kind} +{snake_case(name)} +ours', calls['listed'][1], re.MULTILINE)
    code, _, err = calls[slip]
    assert code == 2 and words in err
