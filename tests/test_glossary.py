"""The glossary of metrics and the reference of the configuration hold: against real runs, and against the code."""

import re
import runpy

import pytest
from composer.loggers import InMemoryLogger

from tests.runs import ROOT, SMALL_HERE, YAMLS
from tread_composer.builders.trainer import build_trainer
from tread_composer.config import load_config

LEFT_OUT = ('eval_interval', 'digits_quality', 'speed_monitor', 'lr_monitor')  # of what makes a run small
SAMPLED = 'callbacks.digits_quality={num_samples: 10, num_steps: 1, sampler: euler}'
RUNS = {
    'digits_tread.yaml': {'loss/train/total', 'tread/kept_tokens', 'gradient_norm', 'digits/recognised'},
    'digits_tread_fasterdit.yaml': {'loss/train/direction', 'loss/train/mse', 'direction/switch'},
    'digits_maskdit.yaml': {'maskdit/mask_ratio', 'maskdit/kept_tokens'},
}


def glossary() -> set[str]:
    """The keys in the first column of the table."""
    rows = re.findall(r'^\| (`.*?) \|', (ROOT / 'docs' / 'metrics.md').read_text(), re.MULTILINE)
    return {key for row in rows for key in re.findall(r'`([^`]+)`', row)}


@pytest.mark.parametrize('yaml', RUNS)
def test_every_logged_number_is_in_the_glossary(yaml, tmp_path):
    extra = ['algorithms.direction_schedule={end_time: 0.5dur}'] if 'fasterdit' in yaml else []
    words = [f'data.local={tmp_path / "data"}', f'save_folder={tmp_path / "run"}', 'eval_interval=2ba']
    settings = [word for word in SMALL_HERE if not any(name in word for name in LEFT_OUT)]
    extra.append('callbacks.speed_monitor.window_size=1')
    config = load_config(YAMLS / yaml, [*settings, *words, *extra, SAMPLED, 'loggers.in_memory_logger={}'])
    trainer = build_trainer(config)
    trainer.fit()
    (logger,) = (each for each in trainer.logger.destinations if isinstance(each, InMemoryLogger))
    logged = {*logger.data}
    trainer.close()
    assert logged >= RUNS[yaml]
    explained = glossary() | {f'metrics/eval/loss_time_quarter_{quarter}' for quarter in (2, 3)}
    assert not logged - explained


def test_the_reference_is_what_the_constructors_say():
    made = runpy.run_path(str(ROOT / 'docs' / 'reference.py'))
    assert (ROOT / 'docs' / 'configuration_reference.md').read_text() == made['reference']()
