"""The command line still does what was recorded before: a part of ``record.py --check`` that takes under a minute."""

import pytest

from tests.frozen.commands import Commands
from tests.frozen.recipes import QUICK, QUICK_BATCHES, first_losses
from tests.frozen.record import PLANS, differences, load, record_plans
from tests.frozen.refusals import LINES, record_refusals

# Building the shapes of a large network takes a second: one of each family; `record.py --check` plans all.
LARGE = ('dit_b', 'dit_b_tread', 'dit_xl_ddpm', 'sit_b_tread', 'dit_xl_maskdit', 'mamba2_dit_b_tread')
PLANNED = [line for line in PLANS if 'digits' in line or line.endswith(tuple(f'/{name}.yaml' for name in LARGE))]


@pytest.fixture(scope='module')
def commands(tmp_path_factory):
    """In a folder with the recipes, and nothing else yet."""
    return Commands(tmp_path_factory.mktemp('frozen'))


def assert_as_recorded(part: str, now: dict) -> None:
    recorded = load(part)
    lines = differences(part, {name: recorded[name] for name in now}, now)
    assert not lines, '\n'.join([*lines, 'On purpose? See tests/frozen/README.md'])


def test_plans(commands):
    assert_as_recorded('plans', record_plans(commands, PLANNED))


def test_refusals(commands):
    now = record_refusals(commands)
    assert now.keys() == set(LINES)
    assert_as_recorded('refusals', now)


@pytest.mark.parametrize('name', QUICK)
def test_first_losses(commands, name):
    """To rounding: other processors and other versions of torch add in another order."""
    recorded = [float.fromhex(text) for text in load('losses')[f'{name} on 1 rank']['losses']]
    now = first_losses(commands, name)
    assert len(now) == QUICK_BATCHES
    assert now == pytest.approx(recorded[:QUICK_BATCHES], rel=1e-5)
