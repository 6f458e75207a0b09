"""Parts of another package (``tests/stranger``), named in a YAML file, through the commands of a run."""

import csv
import importlib
import json
import os
import sys

import pytest
import torch
import yaml

from tests.runs import ROOT, launch, make_store, refused_here
from tests.warm import inside
from tread_composer.compare.runs import training_teraflops

YAML = ROOT / 'tests' / 'stranger' / 'run.yaml'
SAMPLING = ('--steps', '2', '--sampler', 'stranger.parts:midpoint')
GUIDED = ('--guidance', 'stranger.parts:Blurred', '--guidance-scale', '2', '--guidance-settings', 'strength=0.4')
DRAWN = ('--count', '20', *SAMPLING, '--sampler-settings', 'share=0.4', *GUIDED)
NETWORK = ('--features', 'stranger.parts:Pixels', '--metrics', 'fid', 'stranger.parts:Spread')
MEASURED = ('--reference', 'data/digits/eval', *NETWORK, *DRAWN)


@pytest.fixture(autouse=True)
def package(monkeypatch):
    monkeypatch.syspath_prepend(str(YAML.parent.parent))


@pytest.fixture
def call(cli, trained):
    """A command in the folder of the run."""

    def run(*words, code=0):
        with inside(trained):
            return cli(*words, code=code)

    return run


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A run that was begun in one process and resumed in another, far from the package's folder."""
    folder = tmp_path_factory.mktemp('stranger')
    make_store(folder / 'runs')
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


def test_their_settings_bind_the_checkpoints(call):
    refused = call('train', YAML, 'algorithms.louder.rate=0.5', code=2).err
    assert 'algorithms.louder.rate: saved 0.25, now 0.5' in refused


def test_an_algorithm_is_made_once_and_files_go_into_the_folder_of_the_run_unless_told_otherwise(
    trained, call, tmp_path
):
    made = importlib.import_module('stranger.parts').Louder.made
    assert (trained / 'runs/stranger/counted/count.txt').read_text() == f'{9 * 64} digits'
    words = ('run_name=elsewhere', 'max_duration=1ba', 'loggers=null', f'callbacks.counter.folder={tmp_path}')
    call('train', YAML, *words)
    assert (tmp_path / 'count.txt').read_text() == '64 digits'
    assert importlib.import_module('stranger.parts').Louder.made == made + 1


def test_plan_counts_their_blocks_and_they_take_interpolations(call):
    words = ('algorithms.louder.rate=0.5', 'objective.power=1.5', 'model.width=${global_eval_batch_size}')
    found = json.loads(call('plan', YAML, '--json', 'model.num_layers=7', *words).out)
    assert found['tokens_per_block'] == [16, 8, 8, 8, 8, 8, 16]
    assert found['gmacs_dense'] > found['gmacs_routed'] > 0
    config = found['config']
    assert config['algorithms']['louder']['rate'] == 0.5 and config['objective']['power'] == 1.5
    assert config['model']['width'] == 64
    assert 'stranger.parts:Mixer, 6 blocks' in call('plan', YAML).out


def test_what_their_algorithm_saves_is_planned_and_compared(trained, call):
    saving = 'algorithms={shallow: {name: stranger.parts:Shallow, count: 3, end_time: 4ba}}'
    words = ('algorithms=null', saving, 'callbacks.sample_grid=null', 'callbacks.evaluation=null')
    figures = json.loads(call('plan', YAML, '--json', *words).out)
    assert figures['tokens_per_block'] == [16, 16, 16, 0, 0, 0]
    assert figures['gmacs_dense'] > figures['gmacs_routed'] > figures['gmacs_dense'] / 2
    call('train', YAML, *words, 'run_name=shallow', 'loggers=null')
    cost, text = training_teraflops(trained / 'runs/shallow')
    assert 'routed from step 0 to 4, else ' in text
    short, full = cost(1), cost(6) - cost(5)
    assert full / short == pytest.approx(figures['gmacs_dense'] / figures['gmacs_routed'])
    assert cost(6) == pytest.approx(4 * short + 2 * full)


def test_they_are_sampled_exported_measured_and_compared(trained, call):
    call('export', 'runs/stranger', '--out', 'model.safetensors')
    call('sample', 'runs/stranger', '--out', 'a', *DRAWN)
    call('sample', 'model.safetensors', '--out', 'b', *DRAWN)
    for path in sorted((trained / 'a' / 'images').iterdir()):
        assert path.read_bytes() == (trained / 'b' / 'images' / path.name).read_bytes()
    call('evaluate', 'runs/stranger', *MEASURED)
    call('train', YAML, 'run_name=dense', 'algorithms.tread=null', 'loggers=null', 'progress_bar=false')
    call('evaluate', 'runs/dense', *MEASURED)
    compared = call('compare', 'runs/stranger', 'runs/dense', '--out', 'c').out
    assert 'TFLOPs a step' in compared and 'spread_pixels_20 (higher is better)' in compared
    call('inspect', 'runs/stranger', '--out', 'i')


def test_images_are_measured_against_themselves(trained, call):
    call('evaluate', 'data/digits/eval', '--reference', 'data/digits/eval', *NETWORK, '--out', 'itself.json')
    _, entry = json.loads((trained / 'itself.json').read_text())
    assert (entry['metric'], entry['value']) == ('spread_pixels_297', 1.0)
    assert entry['protocol']['settings'] == {'by': 'a stranger'}


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
        (('--metrics', 'nowhere:Spread'), "named 'nowhere'"),
        (('--features', 'stranger.parts:Pixel'), "stranger.parts has no 'Pixel'"),
        (('--inception', 'x.pth'), "features 'stranger.parts:Pixels' need no weights of Inception"),
    ],
)
def test_slips_in_what_draws_and_measures_are_refused(call, words, message):
    plain = ('--count', '20', '--reference', 'data/digits/eval', *NETWORK, *SAMPLING)
    assert message in call('evaluate', 'runs/stranger', *plain, *words, code=2).err


def test_they_are_swept_and_the_best_is_marked_by_their_direction(trained, call):
    words = ('--metrics', 'stranger.parts:Spread', '--features', 'stranger.parts:Pixels', '--samples', '20')
    words += ('--reference', 'data/digits/eval', *SAMPLING, '--guidance-scale', '1', '3', '--out', 'swept')
    call('sweep', 'runs/stranger', *words)
    entries = json.loads((trained / 'swept' / 'results.json').read_text())
    assert {(entry['metric'], entry['better']) for entry in entries} == {('spread_pixels_20', 'higher')}
    rows = list(csv.DictReader((trained / 'swept' / 'sweep.csv').open()))
    values = [float(row['spread_pixels_20']) for row in rows]
    assert [row['best'] for row in rows].index('spread_pixels_20') == values.index(max(values))


# An override of `run.yaml`, and what the message says of it.
SLIPS = """
objective.powr=1 -> objective.powr: unknown setting. Did you mean 'power'?
model.widht=8 -> model.widht: unknown setting. Did you mean 'width'?
algorithms.louder.rat=1 -> algorithms.louder.rat: unknown setting. Did you mean 'rate'?
callbacks.counter.word=x -> callbacks.counter.word: unknown setting. Did you mean 'words'?
algorithms.louder.rate=loud -> algorithms.louder.rate: 'loud' is not a number
algorithms.louder.rate=-3 -> algorithms.louder: Louder refuses these arguments: rate: -3
algorithms.louder.rate=2 -> algorithms.louder.rate: 2.0 above 1 needs label_dropout 0
objective.power=0.5 -> objective: power: 0.5 is below 1
callbacks.evaluation.sampler=stranger.parts:mid -> stranger.parts has no 'mid'
callbacks.evaluation.metrics=['stranger.parts:Spred'] -> stranger.parts has no 'Spred'
callbacks.evaluation.features=stranger.parts:Pixel -> stranger.parts has no 'Pixel'
model.preset=S -> model.preset: belongs to 'dit' and
algorithms.louder.name=stranger.parts:Loud -> stranger.parts has no 'Loud'
algorithms.louder.name=nowhere.at_all:Loud -> No module named 'nowhere'
callbacks.counter.name=stranger.parts:Louder -> 'stranger.parts:Louder' is no callback
model.name=stranger.parts:Layer -> its constructor has no latent_size, in_channels, num_classes
objective={name: collections:OrderedDict} -> is no class whose constructor says its arguments
objective={name: stranger.parts:Counter} -> is no objective: it has no __call__, check_latents, drift,
"""


@pytest.mark.parametrize('line', SLIPS.strip().splitlines())
def test_their_slips_are_refused_in_the_words_of_ours(tmp_path, line):
    override, message = line.split(' -> ')
    assert message in refused_here(tmp_path, YAML, override)
