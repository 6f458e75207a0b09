"""Parts of another package (``tests/stranger``), named in a YAML file, through the commands of a run."""

import importlib
import json
import os
import sys

import pytest
import torch
import yaml

from tests.runs import ROOT, launch
from tests.warm import inside
from tread_composer.cli import main
from tread_composer.compare.cost import training_teraflops

YAML = ROOT / 'tests' / 'stranger' / 'run.yaml'
SAMPLING = ('--steps', '2', '--sampler', 'stranger.parts:midpoint')
GUIDED = ('--guidance', 'stranger.parts:Blurred', '--guidance-scale', '2', '--guidance-settings', 'strength=0.4')
DRAWN = ('--count', '20', *SAMPLING, '--sampler-settings', 'share=0.4', *GUIDED)
NETWORK = ('--features', 'stranger.parts:Pixels', '--metrics', 'fid', 'stranger.parts:Spread')
MEASURED = ('--reference', 'data/digits/eval', *NETWORK, *DRAWN)


@pytest.fixture(autouse=True)
def package(monkeypatch):
    monkeypatch.syspath_prepend(str(YAML.parent.parent))


def call(folder, *words):
    """The exit code of the command in this process, started in ``folder``."""
    with inside(folder):
        return main([*map(str, words)])


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A run that was begun in one process and resumed in another, far from the package's folder."""
    folder = tmp_path_factory.mktemp('stranger')
    path = f'{ROOT}{os.pathsep}{YAML.parent.parent}'
    for words in ((), ('max_duration=9ba',)):
        done = launch(folder, [sys.executable, '-m', 'tread_composer', 'train', str(YAML), *words], PYTHONPATH=path)
        assert done.returncode == 0, done.stdout + done.stderr
    assert 'batches 6 to 9' in done.stdout
    return folder


def test_a_strangers_parts_are_resumed_with_what_they_saved(trained):
    state = torch.load(trained / 'runs/stranger/latest-rank0.pt', weights_only=False)['state']
    assert dict(state['algorithms'])['Louder']['batches'] == 9
    assert state['callbacks']['Counter'] == {'count': 9 * 64}
    saved = yaml.safe_load((trained / 'runs/stranger/config.yaml').read_text())
    assert saved['algorithms']['louder'] == {'name': 'stranger.parts:Louder', 'rate': 0.25}
    assert saved['callbacks']['counter'] == {'name': 'stranger.parts:Counter', 'words': 'digits'}
    assert saved['objective'] == {'name': 'stranger.parts:StraightLine', 'power': 2.0}
    assert saved['model'] == {'name': 'stranger.parts:Mixer', 'width': 16, 'num_layers': 6}


def test_their_settings_bind_the_checkpoints(trained, capsys):
    assert call(trained, 'train', YAML, 'algorithms.louder.rate=0.5') == 2
    assert 'algorithms.louder.rate: saved 0.25, now 0.5' in capsys.readouterr().err


def test_they_write_into_the_folder_of_the_run_unless_told_otherwise(trained, tmp_path):
    assert (trained / 'runs/stranger/counted/count.txt').read_text() == f'{9 * 64} digits'
    elsewhere = f'callbacks.counter.folder={tmp_path}'
    assert call(trained, 'train', YAML, 'run_name=elsewhere', 'max_duration=1ba', 'loggers=null', elsewhere) == 0
    assert (tmp_path / 'count.txt').read_text() == '64 digits'


def test_from_file_to_trainer_an_algorithm_is_made_once(trained, capsys):
    made = importlib.import_module('stranger.parts').Louder.made
    assert call(trained, 'train', YAML, 'run_name=once', 'max_duration=2ba', 'loggers=null') == 0
    assert importlib.import_module('stranger.parts').Louder.made == made + 1


def test_plan_counts_their_blocks(trained, capsys):
    assert call(trained, 'plan', YAML, '--json', 'model.num_layers=7') == 0
    found = json.loads(capsys.readouterr().out)
    assert found['tokens_per_block'] == [16, 8, 8, 8, 8, 8, 16]
    assert found['gmacs_dense'] > found['gmacs_routed'] > 0
    assert call(trained, 'plan', YAML) == 0
    assert 'stranger.parts:Mixer, 6 blocks' in capsys.readouterr().out


def test_what_their_algorithm_saves_is_planned_and_compared(trained, capsys):
    saving = 'algorithms={shallow: {name: stranger.parts:Shallow, count: 3, end_time: 4ba}}'
    words = ('algorithms=null', saving, 'callbacks.sample_grid=null', 'callbacks.evaluation=null')
    assert call(trained, 'plan', YAML, '--json', *words) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures['tokens_per_block'] == [16, 16, 16, 0, 0, 0]
    assert figures['gmacs_dense'] > figures['gmacs_routed'] > figures['gmacs_dense'] / 2
    assert call(trained, 'train', YAML, *words, 'run_name=shallow', 'loggers=null') == 0
    cost, text = training_teraflops(trained / 'runs/shallow')
    assert 'routed from step 0 to 4, else ' in text
    short, full = cost(1), cost(6) - cost(5)
    assert full / short == pytest.approx(figures['gmacs_dense'] / figures['gmacs_routed'])
    assert cost(6) == pytest.approx(4 * short + 2 * full)


def test_they_take_interpolations(trained, capsys):
    words = ('algorithms.louder.rate=0.5', 'objective.power=1.5')
    assert call(trained, 'plan', YAML, '--json', *words, 'model.width=${global_eval_batch_size}') == 0
    config = json.loads(capsys.readouterr().out)['config']
    assert config['algorithms']['louder']['rate'] == 0.5 and config['objective']['power'] == 1.5
    assert config['model']['width'] == 64


def test_they_are_sampled_exported_measured_and_compared(trained, capsys):
    assert call(trained, 'export', 'runs/stranger', '--out', 'model.safetensors') == 0
    assert call(trained, 'sample', 'runs/stranger', '--out', 'a', *DRAWN) == 0
    assert call(trained, 'sample', 'model.safetensors', '--out', 'b', *DRAWN) == 0
    for path in sorted((trained / 'a' / 'images').iterdir()):
        assert path.read_bytes() == (trained / 'b' / 'images' / path.name).read_bytes()
    assert call(trained, 'evaluate', 'runs/stranger', *MEASURED) == 0
    dense = ('run_name=dense', 'algorithms.tread=null', 'loggers=null', 'progress_bar=false')
    assert call(trained, 'train', YAML, *dense) == 0
    assert call(trained, 'evaluate', 'runs/dense', *MEASURED) == 0
    capsys.readouterr()
    assert call(trained, 'compare', 'runs/stranger', 'runs/dense', '--out', 'c') == 0
    compared = capsys.readouterr().out
    assert 'TFLOPs a step' in compared and 'spread_pixels_20 (higher is better)' in compared
    assert call(trained, 'inspect', 'runs/stranger', '--out', 'i') == 0


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (('--sampler-settings', 'shar=0.4'), "'stranger.parts:midpoint' has no settings ['shar']; it has ['share']"),
        (('--sampler-settings', 'share=2'), 'share: 2 is not between 0 and 1'),
        ((*GUIDED[:4], '--guidance-settings', 'strenght=1'), 'has no such setting; it has strength'),
        ((*GUIDED[:4], '--guidance-settings', 'strength=2'), 'strength: 2 is not a share'),
        (('--guidance', 'stranger.parts:Blurry', '--guidance-scale', '2'), "stranger.parts has no 'Blurry'"),
        (('--sampler', 'stranger.parts:mid'), "stranger.parts has no 'mid'"),
        (('--metrics', 'stranger.parts:Spred'), "stranger.parts has no 'Spred'"),
        (('--features', 'stranger.parts:Pixel'), "stranger.parts has no 'Pixel'"),
        (('--inception', 'x.pth'), "features 'stranger.parts:Pixels' need no weights of Inception"),
    ],
)
def test_slips_in_what_draws_and_measures_are_refused(trained, capsys, words, message):
    plain = ('--count', '20', '--reference', 'data/digits/eval', *NETWORK, *SAMPLING)
    assert call(trained, 'evaluate', 'runs/stranger', *plain, *words) == 2
    assert message in capsys.readouterr().err


def test_they_are_swept(trained):
    words = ('--metrics', 'stranger.parts:Spread', '--features', 'stranger.parts:Pixels', '--samples', '20')
    words += ('--reference', 'data/digits/eval', *SAMPLING, '--out', 'swept')
    assert call(trained, 'sweep', 'runs/stranger', *words) == 0
    (entry,) = json.loads((trained / 'swept' / 'results.json').read_text())
    assert entry['metric'] == 'spread_pixels_20' and entry['better'] == 'higher'


@pytest.mark.parametrize(
    ('override', 'message'),
    [
        ('objective.powr=1', "objective.powr: unknown setting. Did you mean 'power'?"),
        ('model.widht=8', "model.widht: unknown setting. Did you mean 'width'?"),
        ('algorithms.louder.rat=1', "algorithms.louder.rat: unknown setting. Did you mean 'rate'?"),
        ('callbacks.counter.word=x', "callbacks.counter.word: unknown setting. Did you mean 'words'?"),
        ('algorithms.louder.rate=loud', "algorithms.louder.rate: 'loud' is not a number"),
        ('algorithms.louder.rate=-3', 'algorithms.louder: Louder refuses these arguments: rate: -3'),
        ('algorithms.louder.rate=2', 'algorithms.louder.rate: 2.0 above 1 needs label_dropout 0'),
        ('objective.power=0.5', 'objective: power: 0.5 is below 1'),
        ('callbacks.evaluation.sampler=stranger.parts:mid', "stranger.parts has no 'mid'"),
        ("callbacks.evaluation.metrics=['stranger.parts:Spred']", "stranger.parts has no 'Spred'"),
        ('callbacks.evaluation.features=stranger.parts:Pixel', "stranger.parts has no 'Pixel'"),
        ('model.preset=S', "model.preset: belongs to 'dit' and"),
        ('algorithms.louder.name=stranger.parts:Loud', "stranger.parts has no 'Loud'"),
        ('algorithms.louder.name=nowhere.at_all:Loud', "No module named 'nowhere'"),
        ('callbacks.counter.name=stranger.parts:Louder', "'stranger.parts:Louder' is no callback"),
        ('model.name=stranger.parts:Layer', 'its constructor has no latent_size, in_channels, num_classes'),
        ('objective={name: collections:OrderedDict}', 'is no class whose constructor says its arguments'),
        ('objective={name: stranger.parts:Counter}', 'is no objective: it has no __call__, check_latents, drift, '),
    ],
)
def test_their_slips_are_refused_in_the_words_of_ours(tmp_path, capsys, override, message):
    assert call(tmp_path, 'train', YAML, override) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
