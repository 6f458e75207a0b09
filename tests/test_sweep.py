"""Sweeps: what is measured is kept, the best is marked, and what does not compare is not mixed."""

import csv
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from tests.metrics.small import grey_images, random_images, write_folder
from tests.pages import Page, assert_self_contained, drawings, lines_of
from tests.runs import environment
from tests.warm import start_program, wait_until
from tread_composer.core.errors import UserError
from tread_composer.evaluate.sweep.drawn import rows_of, sampling_of, sweep
from tread_composer.evaluate.sweep.request import SweepRequest
from tread_composer.evaluate.sweep.rows import best_rows, format_sweep, write_sweep
from tread_composer.io.locks import locked
from tread_composer.io.ranks import Ranks
from tread_composer.latent_diffusion import LatentDiffusion
from tread_composer.metrics.digits import DigitsImages
from tread_composer.metrics.measurement import Measurement
from tread_composer.samplers import SamplingSettings


def rows_with(settings) -> list[dict]:
    """Rows whose ``fid`` is a parabola over the scale, with its best at 1.5."""
    values = lambda scale: {'fid': (scale - 1.5) ** 2 + 2, 'recall': 1 - scale / 4, 'gmacs_per_image': 3.0}  # noqa: E731
    better = {'fid': 'lower', 'recall': 'higher'}
    return [
        {'settings': row, 'values': values(row['guidance_scale']), 'better': better, 'seconds': 1.0} for row in settings
    ]


def test_the_best_is_marked_by_the_direction_of_each_metric(tmp_path):
    rows = rows_with([{'weights': 'ema', 'guidance_scale': scale} for scale in (1.0, 1.5, 2.0)])
    assert best_rows(rows) == {'fid': 1, 'recall': 0}  # a cost has no best
    table = format_sweep(rows).splitlines()
    assert table[0].split() == ['weights', 'guidance_scale', 'fid', 'recall', 'gmacs_per_image']
    assert table[2].split() == ['ema', '1.5', '*2', '0.625', '3']
    assert table[1].split()[3] == '*0.75'
    paths = write_sweep(rows, tmp_path, {'model': '<b>'}, 'sweep <x>')
    lines = list(csv.DictReader(paths[0].open()))
    assert [line['best'] for line in lines] == ['recall', 'fid', '']
    assert float(lines[1]['fid']) == 2.0 and lines[0]['guidance_scale'] == '1.0'
    assert paths[1].read_bytes().startswith(b'\x89PNG')
    text = paths[2].read_text()
    page = assert_self_contained(text)
    assert [a for a in page.named('td') if a.get('class') == 'best'] and 'sweep &lt;x&gt;' in text
    assert len(drawings(page)) == 2  # a cost is in the table


def test_the_rows_of_a_request():
    request = SweepRequest(
        'x', 'o', Measurement('r'), guidance_scales=(1.0, 2.0), intervals=(None, (0.1, 0.8)),
        guidances=('classifier_free', 'sparse'), guidance_settings={'strong_rate': 0.5, 'weak_rate': 0.9},
    )  # fmt: skip
    said = []
    rows = rows_of(request, said.append)
    # Without guidance neither an interval nor rates mean anything: 1 row and not 4.
    assert [(row['guidance'], row['guidance_scale'], row['guidance_interval']) for row in rows] == [
        ('none', 1.0, None), ('classifier_free', 2.0, None), ('classifier_free', 2.0, [0.1, 0.8]),
        ('sparse', 2.0, None), ('sparse', 2.0, [0.1, 0.8]),
    ]  # fmt: skip
    assert said[0].startswith('8 combinations come to 5 rows: without guidance')
    (empty,) = rows_of(SweepRequest('x', 'o', Measurement('r'), (2.0, 2.0), ((0.3, 0.3),)))
    assert empty['guidance'] == 'none'
    with pytest.raises(UserError, match='has no value'):
        rows_of(SweepRequest('x', 'o', Measurement('r'), guidance_scales=()))
    assert sampling_of(rows[0], request) == SamplingSettings(guidance='none')
    drawn = sampling_of(rows[-1], request)
    assert (drawn.guidance, drawn.guidance_interval) == ('sparse', (0.1, 0.8))
    assert (drawn.guidance_settings['strong_rate'], drawn.guidance_settings['weak_rate']) == (0.5, 0.9)
    with pytest.raises(UserError, match=r'weak_rate: 1\.5'):
        rows_of(SweepRequest('x', 'o', Measurement('r'), guidances=('sparse',), guidance_settings={'weak_rate': 1.5}))


def test_every_line_of_the_picture_begins_at_no_guidance(tmp_path):
    kinds = [{'guidance': 'classifier_free'}, {'guidance': 'sparse', 'weak_rate': 0.9}]
    settings = [{'weights': w, 'guidance': 'none', 'guidance_scale': 1.0} for w in ('ema', 'raw')]
    settings += [
        {'weights': w, **kind, 'guidance_scale': s} for w in ('ema', 'raw') for kind in kinds for s in (2.0, 3.0)
    ]
    page = write_sweep(rows_with(settings), tmp_path, {}, 'sweep')[2].read_text()
    assert [len(points) for points in lines_of(drawings(Page(page))[0])] == [3] * 4


@pytest.fixture(scope='module')
def reference(tmp_path_factory) -> Path:
    """Real digits as PNGs to compare with."""
    (images,) = DigitsImages('eval').batches(300)
    return write_folder(tmp_path_factory.mktemp('reference'), images.permute(0, 2, 3, 1).numpy())


@pytest.fixture(scope='module')
def command(routed, reference) -> list[str]:
    """A sweep of a trained run; what is measured and where it goes follow."""
    of = ['sweep', str(routed.folder), '--reference', str(reference), '--features', 'digits']
    return [*of, '--steps', '2', '--batch-size', '32', '--device', 'cpu']


def table_of(folder: Path) -> list[dict]:
    return json.loads((folder / 'sweep.json').read_text())['rows']


def measured_in(folder: Path) -> tuple[list[str], int | None]:
    """What all rows have in common: the metrics, and KID's setting where one of them takes it."""
    contract = json.loads((folder / 'sweep.json').read_text())['contract']
    return contract['metrics'], contract['kid_subset_size']


def test_the_command_measures_writes_protocols_and_resumes(command, tmp_path, cli, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    out = tmp_path / 'out'
    words = [*command, '--samples', '40', '--out', str(out)]
    printed = cli(*words, '--guidance-scale', '1', '3').out
    assert 'fd_digits_40' in printed and '* best of its column' in printed
    assert measured_in(out) == (['fid'], None)
    plain, guided = before = table_of(out)
    assert plain['values']['fd_digits_40'] != guided['values']['fd_digits_40']
    assert guided['values']['gmacs_per_image'] == pytest.approx(2 * plain['values']['gmacs_per_image'])
    entries = json.loads((out / 'results.json').read_text())
    assert [entry['protocol']['sampling']['guidance_scale'] for entry in entries] == [1.0, 3.0]
    assert entries[0]['batch'] == 3 and entries[0]['protocol']['sampling']['guidance'] == 'none'
    # The same again measures nothing; more rows are added, sparse guidance and raw weights among them.
    assert '2 of 2 rows are finished, and kept' in cli(*words, '--guidance-scale', '1', '3').out
    assert table_of(out) == before
    sparse = ['--guidance', 'sparse', '--guidance-settings', 'strong_rate=0.25', 'weak_rate=0.75']
    cli(*words, '--guidance-scale', '3', '--weights', 'raw', *sparse)
    rows = table_of(out)
    assert rows[:2] == before and rows[2]['settings']['weak_rate'] == 0.75
    assert_self_contained((out / 'sweep.html').read_text())
    # Other samples in the same folder are refused, and so is a second process in it.
    state = (out / 'sweep.json').read_bytes()
    assert 'num_samples: saved 40, now 50' in cli.refusal(*command, '--samples', '50', '--out', out)
    with locked(out / '.lock'):
        assert 'another process is sweeping' in cli.refusal(*words)
    assert (out / 'sweep.json').read_bytes() == state
    (out / 'sweep.json').write_text('{"rows": []}')
    assert 'not written by this version' in cli.refusal(*words)
    assert 'cannot be written' in cli.refusal(*command, '--samples', '40', '--out', out / 'sweep.json')


def test_kid_of_small_subsets_with_a_cache_of_its_own(command, tmp_path, cli):
    words = ['--metrics', 'kid', 'fid', 'kid', '--kid-subset-size', '20', '--samples', '20']
    cli(*command, *words, '--cache', tmp_path / 'cache', '--out', tmp_path / 'out')
    assert measured_in(tmp_path / 'out') == (['fid', 'kid'], 20)
    (entry, _) = json.loads((tmp_path / 'out' / 'results.json').read_text())
    assert entry['metric'] == 'kd_digits_20' and entry['protocol']['settings']['kid_subset_size'] == 20
    assert len(list((tmp_path / 'cache').iterdir())) == 1
    assert '--kid-subset-size 20' in (tmp_path / 'out' / 'sweep.html').read_text()


def small_request(path: Path, out: Path, reference: Path, **settings) -> SweepRequest:
    against = Measurement(str(reference), features='digits', cache=out.parent / 'cache')
    small = {'num_steps': 1, 'num_samples': 10, 'device': 'cpu'}
    return SweepRequest(str(path), str(out), against, **small, **settings)


def test_a_run_that_moves_on_while_it_is_swept_is_noticed(routed, reference, tmp_path):
    moving = shutil.copytree(routed.folder, tmp_path / 'run', symlinks=True)
    (moving / 'latest-rank0.pt').unlink()
    latest, later = (Path(shutil.copy(next(moving.glob('ep*.pt')), moving / name)) for name in ('latest-rank0.pt', 'x'))
    content = torch.load(later, weights_only=False)
    for state in (content['state']['model'], content['state']['algorithms']):
        shift(state)
    torch.save(content, later)

    def train_on(line):
        if line.startswith('1 of 2'):
            later.replace(latest)

    request = small_request(moving, tmp_path / 'out', reference, weights=('ema', 'raw'))
    with pytest.raises(UserError, match=r'holds other raw weights than at the start .* still train\?'):
        sweep(request, Ranks(), train_on)
    assert len(table_of(tmp_path / 'out')) == 1


def test_killed_within_a_row_it_goes_on_where_it_stopped(command, tmp_path, cli):
    words = [*command, '--samples', '100', '--sampler', 'euler', '--steps', '20', '--guidance-scale', '1', '2']
    cli(*words, '--out', tmp_path / 'whole')
    out = tmp_path / 'out'
    program = ['-m', 'tread_composer', *words, '--out', out]
    child = start_program(program, tmp_path, environment(), [tmp_path / 'log'])
    wait_until(lambda: list(out.glob('.row-*/.samples/part-*.npy')), child)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    parts = list(out.glob('.row-*/.samples/part-*.npy'))
    assert 1 <= len(parts) < 7 and not (out / 'sweep.json').exists()
    assert f'going on: {16 * len(parts)} of 100 images are there' in cli(*words, '--out', out).out
    assert not list(out.glob('.row-*'))
    assert [row['values'] for row in table_of(out)] == [row['values'] for row in table_of(tmp_path / 'whole')]


def dies_removing_a_row() -> None:
    """Ends the process when it has removed the images of a row, and not yet what describes them."""

    def watch(event: str, arguments: tuple) -> None:
        if event == 'shutil.rmtree' and '.row-' in str(arguments[0]):
            (Path(arguments[0]) / 'samples.npz').unlink(missing_ok=True)
            if '.samples' not in str(arguments[0]):
                os._exit(9)

    sys.addaudithook(watch)


def test_killed_while_it_removes_the_images_of_a_row_it_has_that_row(command, tmp_path, cli):
    words, out = [*command, '--samples', '20'], tmp_path / 'out'
    program = ['-m', 'tread_composer', *words, '--guidance-scale', '1', '--out', out]
    child = start_program(program, tmp_path, environment(), [tmp_path / 'log'], dies_removing_a_row)
    child.join()
    assert child.exitcode == 9 and list(out.glob('.row-*'))
    assert '1 of 1 rows are finished, and kept' in cli(*words, '--guidance-scale', '1', '--out', out).out
    assert not list(out.glob('.row-*'))


def shift(state):
    """Other weights, wherever in a state there are some."""
    for value in state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value += 0.01
        elif isinstance(value, dict | list | tuple):
            shift(value)


def test_rows_are_drawn_in_float32_and_not_before_the_reference_is_looked_at(routed, reference, tmp_path, monkeypatch):
    seen, draw = [], LatentDiffusion.draw

    def watched(*arguments, **settings):
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return draw(*arguments, **settings)

    monkeypatch.setattr(LatentDiffusion, 'draw', watched)
    damaged = write_folder(tmp_path / 'damaged', grey_images(12))
    (damaged / '000003.png').write_bytes((damaged / '000003.png').read_bytes()[:40])
    tf32 = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision('high')
    torch.backends.cudnn.allow_tf32 = True
    try:
        with pytest.raises(UserError, match=r'000003\.png'):
            sweep(small_request(routed.folder, tmp_path / 'no', damaged), Ranks(), print)
        assert seen == []
        sweep(small_request(routed.folder, tmp_path / 'out', reference), Ranks(), print)
        assert set(seen) == {('highest', False)}
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ('high', True)
    finally:
        torch.set_float32_matmul_precision('highest')
        torch.backends.cudnn.allow_tf32 = tf32


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['--samples', '45'], 'no multiple of the 10 classes'),
        (['--samples', '40', '--metrics', 'fvd'], "invalid choice: 'fvd'"),
        (['--samples', '40', '--batch-size', '0'], '--batch-size: 0 must be at least 1'),
        (['--samples', '40', '--metrics', 'kid'], 'kid needs 1000 images'),
        (['--samples', '40', '--inception-sha256', 'a' * 64], 'need no weights of Inception'),
        (['--samples', '40', '--reference', 'large'], 'images of 16 pixels, and the samples have 8'),
        (['optimizer.lr=3', '--samples', '40'], 'optimizer.lr: a trained model is sampled as it was trained'),
        (['autoencoder.path=/data/vae', '--samples', '40'], 'autoencoder'),
        (['--count', '40', '--guidance', 'cfg'], "--guidance: 'cfg' is none of none, classifier_free"),
        (['--count', '40', '--guidance-settings', 'weak_rate=1'], 'weak_rate: no setting of classifier_free'),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_is_written(
    command, tmp_path, cli, monkeypatch, words, message
):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / 'large', random_images(12, 16))
    assert message in cli.refusal(*command, *words, '--out', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
