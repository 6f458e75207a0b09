"""Parts by ``package.module:Class`` that cannot be used: a message at the key, whatever their module does."""

import re

import pytest

from tests.runs import YAMLS

MODULES = {
    'named_unfinished': 'class Part:\n    def\n',
    'named_broken': 'x = 1\nclass Part(Nobody):\n    pass\n',
    'named_script': 'import sys\nsys.exit(3)\n',
    'named_needy': 'import nobody_has_this\n',
    'named_parts': """
import functools
import torch

SEVEN = 7
PARTIAL = functools.partial(dict, a=1)

class Rateless(torch.optim.SGD):
    def __init__(self, params, momentum: float = 0.9):
        super().__init__(params, lr=0.1, momentum=momentum)
""",
}
YAML = YAMLS / 'digits.yaml'
WRONG_FORM = 'is not of the form package.module:Class'
CASES = [
    ('named_unfinished:Part', r'named_unfinished fails while it is imported: SyntaxError: .*unfinished\.py, line 2\)'),
    ('named_broken:Part', r"named_broken fails while it is imported: NameError: .*'Nobody'.*broken\.py, line 2\)"),
    ('named_script:Part', r'named_script fails while it is imported: SystemExit: 3 .*script\.py, line 2\)'),
    ('named_needy:Part', "No module named 'nobody_has_this'"),
    ('.named_parts:Part', r'\.named_parts fails while it is imported: TypeError'),
    (':Part', f"':Part' {WRONG_FORM}"),
    ('named_parts:', f"'named_parts:' {WRONG_FORM}"),
    ('named_parts:SEVEN', 'named_parts:SEVEN is of type int, not a class or function'),
    ('named_parts:PARTIAL', "'named_parts:PARTIAL' is no"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    for name, text in MODULES.items():
        (tmp_path / f'{name}.py').write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize('section', ['objective', 'optimizer'])
@pytest.mark.parametrize(('reference', 'message'), CASES)
def test_a_faulty_reference_is_refused_at_its_key(cli, section, reference, message):
    printed = cli.refusal('plan', YAML, f'{section}={{name: "{reference}"}}')
    (line,) = [line for line in printed.splitlines() if f'{section}.name' in line]
    assert re.search(message, printed.replace('\n', ' ')) and 'Traceback' not in printed, line


def test_an_optimizer_without_a_learning_rate_is_named_without(cli):
    section = 'optimizer={name: "named_parts:Rateless", momentum: 0.5'
    cli('plan', YAML, f'{section}}}', 'scheduler={name: constant}')
    assert 'optimizer.lr: unknown setting' in cli.refusal('plan', YAML, f'{section}, lr: 1.0}}')
