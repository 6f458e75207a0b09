"""An average chosen after training is the one that would have been kept, as closely as it says."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from tests.pages import Page, drawings
from tests.runs import predict, run
from tread_composer.algorithms.power_ema.posthoc import LARGEST_RESIDUAL, fit_profile, inner_products, reconstruct
from tread_composer.algorithms.power_ema.snapshots import (
    WIDEST,
    list_snapshots,
    posthoc_width,
    power_exponent,
    read_header,
    snapshot_path,
    write_snapshot,
)
from tread_composer.core.errors import UserError
from tread_composer.metrics.protocol import differences, load_results
from tread_composer.weights.trained import load_trained

STEPS, EVERY = 400, 50


def walk() -> torch.Tensor:
    """Weights of 32 parameters ``[STEPS, 32]`` that drift and jitter, float64."""
    generator = torch.Generator().manual_seed(3)
    steps = torch.randn(STEPS, 32, generator=generator, dtype=torch.float64)
    return 5 + 0.05 * steps.cumsum(0) + 0.2 * torch.randn(STEPS, 32, generator=generator, dtype=torch.float64)


def average(weights: torch.Tensor, width: float, end: int) -> torch.Tensor:
    """Weighted sum over all past weights, without a recursion: step t counts the integral of s**gamma over it."""
    power = power_exponent(width) + 1
    t = torch.arange(0, end + 1, dtype=torch.float64)
    shares = ((t / end) ** power).diff()
    return shares @ weights[:end]


def write(folder, weights, ends=range(EVERY, STEPS + 1, EVERY), run='walk', previous=None):
    for end in ends:
        averages = {width: {'w': average(weights, width, end).float()} for width in (0.05, 0.1)}
        previous = write_snapshot(folder, averages, batch=end, run=run, previous=previous).digest


@pytest.fixture(scope='module')
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp('snapshots')
    write(folder, walk())
    return folder


@pytest.fixture
def copy(stored, tmp_path):
    shutil.copytree(stored, tmp_path / 'snapshots')
    return tmp_path / 'snapshots'


@pytest.mark.parametrize('width', [0.001, 0.05, 0.10, 0.13, 0.25, 0.288])
def test_the_exponent_gives_the_width_back(width):
    gamma = power_exponent(width)
    if width in (0.05, 0.10):  # as published
        assert gamma == pytest.approx({0.05: 16.97, 0.10: 6.94}[width], abs=5e-3)
    assert (gamma + 1) ** 0.5 / (gamma + 2) / (gamma + 3) ** 0.5 == pytest.approx(width, rel=1e-9)
    # the standard deviation of the density (gamma + 1) s**gamma on [0, 1], numerically
    s = (np.arange(200_000) + 0.5) / 200_000
    density = (gamma + 1) * s**gamma / 200_000
    mean = (density * s).sum()
    assert ((density * (s - mean) ** 2).sum()) ** 0.5 == pytest.approx(width, rel=1e-3)


@pytest.mark.parametrize('width', [0, -0.1, WIDEST, 0.5, float('nan')])
def test_a_width_that_no_average_has_is_refused(width):
    with pytest.raises(ValueError, match=r'is no width: it is a share of the run so far, above 0 and below 0\.2887'):
        power_exponent(width)


def test_inner_products_are_the_integrals():
    s = (np.arange(400_000) + 0.5) / 1000  # to 400

    def profile(gamma, end):
        return np.where(s < end, (gamma + 1) / end * (np.minimum(s, end) / end) ** gamma, 0.0)

    gammas, ends = np.array([16.97, 6.94, 2.0, 0.5]), np.array([400.0, 150.0, 400.0, 30.0])
    found = inner_products(gammas[:, None], ends[:, None], gammas, ends)
    for i in range(4):
        for j in range(4):
            integral = (profile(gammas[i], ends[i]) * profile(gammas[j], ends[j])).sum() / 1000
            assert found[i, j] == pytest.approx(integral, rel=2e-3), (i, j)


@pytest.mark.parametrize(('width', 'batch'), [(0.07, 400), (0.13, 400), (0.045, 400), (0.08, 250)])
def test_another_width_is_the_average_that_would_have_been_kept(stored, width, batch):
    weights = walk()
    wanted = average(weights, width, batch)
    found = reconstruct(stored, width, newest=read_header(snapshot_path(stored, batch)).digest)
    error = (found.tensors['w'].double() - wanted).norm()
    assert error < 1e-3 * wanted.norm()
    # far closer than the nearest one that was stored, and as close as it says of itself
    nearest = min((average(weights, one, batch) - wanted).norm() for one in (0.05, 0.1))
    assert error < 0.1 * nearest
    gamma = power_exponent(width)
    norm = inner_products(gamma, batch, gamma, batch) ** 0.5
    bound = found.facts['residual'] * norm * (weights[:batch] - weights[:batch].mean(0)).norm()
    assert error < bound + 1e-5
    assert 0 < found.facts['residual'] <= LARGEST_RESIDUAL
    assert (found.facts['snapshots'], found.facts['batch'], found.facts['last']) == (batch // EVERY, batch, batch)


@pytest.mark.parametrize(('width', 'batch'), [(0.05, 400), (0.1, 400), (0.1, 50), (0.05, 150)])
def test_a_stored_average_comes_back_to_the_bit(stored, width, batch):
    found = reconstruct(stored, width, newest=read_header(snapshot_path(stored, batch)).digest)
    assert torch.equal(found.tensors['w'], load_file(snapshot_path(stored, batch))[f'{width}/w'])
    assert found.facts['residual'] == 0


@pytest.mark.parametrize('count', [8, 32, 200])
def test_coefficients_add_up_to_one_and_more_snapshots_come_closer(count):
    exponents, batches = [], []
    for end in range(1, count + 1):
        exponents += [power_exponent(0.05), power_exponent(0.1)]
        batches += [end * 1000, end * 1000]
    fit = fit_profile(exponents, batches, power_exponent(0.2), count * 1000)
    assert fit.coefficients_S.sum() == pytest.approx(1, abs=1e-9)
    s = (np.arange(count * 500) + 0.5) * 2
    profiles = np.zeros_like(s)
    for share, gamma, end in zip(fit.coefficients_S, exponents, batches, strict=True):
        profiles += share * np.where(s < end, (gamma + 1) / end * (np.minimum(s, end) / end) ** gamma, 0.0)
    wanted = (power_exponent(0.2) + 1) / s[-1] * (s / s[-1]) ** power_exponent(0.2)
    measured = (((profiles - wanted) ** 2).sum() / (wanted**2).sum()) ** 0.5
    assert fit.residual == pytest.approx(measured, rel=0.05, abs=1e-4)
    assert fit.residual < {8: 0.08, 32: 0.007, 200: 0.0003}[count]


def test_what_the_snapshots_do_not_come_close_to_is_refused(stored):
    with pytest.raises(UserError, match=r'come only within \d+\.\d% of an average of width 0\.25 .*--allow-inexact'):
        reconstruct(stored, 0.25)
    assert reconstruct(stored, 0.25, allow_inexact=True).facts['residual'] > LARGEST_RESIDUAL


def test_snapshots_of_two_runs_are_refused(copy):
    write(copy / 'other', walk(), run='other')
    shutil.copy(snapshot_path(copy / 'other', 100), snapshot_path(copy, 99))
    with pytest.raises(UserError, match=r'holds snapshots of several runs \(other; walk\)'):
        reconstruct(copy, 0.07)


def test_a_missing_snapshot_is_noticed(copy):
    snapshot_path(copy, 200).unlink()
    with pytest.raises(UserError, match=r'the snapshot before that of batch 250 is missing \(sha256:'):
        reconstruct(copy, 0.07)
    found = reconstruct(copy, 0.07, allow_inexact=True)
    assert (found.facts['first'], found.facts['snapshots'], found.facts['unused']) == (250, 4, 3)
    with pytest.raises(UserError, match='that the checkpoint names as its last is missing'):
        reconstruct(copy, 0.07, newest='sha256:0')
    with pytest.raises(UserError, match=r'holds no snapshots; train with algorithms\.power_ema'):
        reconstruct(copy / 'nowhere', 0.07)


def test_damaged_snapshots_are_refused(copy):
    path = snapshot_path(copy, 300)
    whole = path.read_bytes()
    renumbered = whole.replace(b'\\"batch\\": 300', b'\\"batch\\": 301')
    path.write_bytes(renumbered)
    assert read_header(path).batch == 301
    for content, message in (
        (whole[:-1] + bytes([whole[-1] ^ 1]), 'holds something else than was written'),
        (whole[:-5], 'a damaged snapshot'),
        (renumbered, 'holds something else than was written'),
        (save({'w': torch.zeros(1)}), r'is no snapshot of algorithms\.power_ema'),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf'ba00000300\.safetensors: {message}'):
            reconstruct(copy, 0.07)


def test_a_continuation_that_was_given_up_is_not_used(copy):
    """Resumed from batch 250 and run otherwise, at another interval: the old 350 stays in the folder."""
    other = walk()
    other[250:] += 1
    write(copy, other, ends=(300, 400), previous=read_header(snapshot_path(copy, 250)).digest)
    for end in (300, 400):
        assert read_header(copy / f'ba{end:08d}.given_up1.safetensors').batch == end
    found = reconstruct(copy, 0.1)
    assert torch.equal(found.tensors['w'], average(other, 0.1, 400).float())
    found = reconstruct(copy, 0.12)
    assert (found.facts['snapshots'], found.facts['unused']) == (7, 1)
    wanted = average(other, 0.12, 400)
    assert (found.tensors['w'].double() - wanted).norm() < 2e-3 * wanted.norm()
    earlier = next(one for _, one in list_snapshots(copy) if one.batch == 250).digest
    assert reconstruct(copy, 0.07, newest=earlier).facts['batch'] == 250


def test_weights_that_do_not_move_come_out_as_they_are(tmp_path):
    write(tmp_path, torch.full((STEPS, 4), 3.7, dtype=torch.float64))
    for width in (0.06, 0.2):
        found = reconstruct(tmp_path, width, allow_inexact=True)
        torch.testing.assert_close(found.tensors['w'], torch.full((4,), 3.7), rtol=3e-7, atol=0)
        assert found.facts['snapshots'] == STEPS // EVERY


def test_words_for_a_width():
    assert (posthoc_width('ema'), posthoc_width('posthoc:0.13')) == (None, 0.13)
    for word in ('posthoc:', 'posthoc:wide', 'posthoc:0.3', 'posthoc:0'):
        with pytest.raises(UserError, match=f"'{word}' names no width; .* for example posthoc:0.13"):
            posthoc_width(word)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    settings = ('algorithms.power_ema={interval: 1ba}', 'max_duration=10ba', 'save_interval=7ba')
    return run(tmp_path_factory.mktemp('power'), 'digits_tread.yaml', *settings)


def test_export_writes_the_average_and_says_how_it_was_made(trained, tmp_path, cli):
    out = tmp_path / 'x.safetensors'
    text = cli('export', trained.folder, '--weights', 'posthoc:0.130', '--out', out).out
    assert 'the posthoc:0.13 weights after 10 batches' in text
    assert 'average   width 0.13 of the run (gamma 4.60) from 10 snapshots of batches 1 to 10' in text
    with safe_open(out, framework='pt') as file:
        facts = json.loads(file.metadata()['average'])
        assert file.metadata()['weights'] == 'posthoc:0.13'
    assert facts['sigma_rel'] == 0.13 and 0 < facts['residual'] < 0.02
    assert facts['run'].startswith('digits_tread sha256:')
    model = load_trained(out)  # an average: what `ema` asks for
    assert (model.weights, model.batch) == ('posthoc:0.13', 10)
    kept = reconstruct(trained.folder / 'snapshots', 0.13).tensors
    parameters = dict(model.model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in kept.items())
    assert torch.equal(model.model.state_dict()['denoiser.pos_embed'], trained.denoiser.state_dict()['pos_embed'])
    direct = load_trained(trained.folder, weights='posthoc:0.13')
    assert direct.digest == model.digest != load_trained(trained.folder).digest
    assert torch.equal(predict(direct.model.denoiser), predict(model.model.denoiser))
    again = tmp_path / 'again.safetensors'
    cli('export', out, '--out', again)
    with safe_open(again, framework='pt') as file:
        assert json.loads(file.metadata()['average']) == facts
    with pytest.raises(UserError, match=r'holds the posthoc:0\.13 weights alone; take weights=posthoc:0\.13'):
        load_trained(out, weights='posthoc:0.1')


def test_an_earlier_checkpoint_gives_the_average_up_to_it(trained):
    (earlier,) = trained.folder.glob('ep*-ba7-rank0.pt')
    model = load_trained(earlier, weights='posthoc:0.1')
    kept = load_file(snapshot_path(trained.folder / 'snapshots', 7))
    assert model.batch == 7
    bias = 'denoiser.final_layer.linear.bias'
    assert torch.equal(model.model.get_parameter(bias), kept[f'0.1/{bias}'])


@pytest.fixture(scope='module')
def against(digits, tmp_path_factory):
    measured = ['--reference', digits / 'eval', '--features', 'digits', '--steps', '2', '--device', 'cpu']
    return [*measured, '--cache', tmp_path_factory.mktemp('cache')]


def test_evaluate_takes_the_width_and_measures_the_average_that_export_writes(trained, against, tmp_path, cli):
    out, file = tmp_path / 'r.json', tmp_path / 'x.safetensors'
    cli('export', trained.folder, '--weights', 'posthoc:0.1', '--out', file)
    for path, weights in ((trained.folder, 'posthoc:0.1'), (file, 'ema'), (trained.folder, 'ema')):
        cli('evaluate', path, *against, '--weights', weights, '--count', '20', '--out', out)
    direct, exported, usual = load_results(out)
    assert (direct['protocol']['weights'], direct['batch'], direct['run']) == ('posthoc:0.1', 10, 'digits_tread')
    assert direct['weights_digest'] == exported['weights_digest'] != usual['weights_digest']
    assert direct['value'] == exported['value'] != usual['value']
    assert differences(direct['protocol'], exported['protocol']) == []
    assert differences(direct['protocol'], usual['protocol']) == ["weights: 'posthoc:0.1' and 'ema'"]
    folders = trained.folder / 'evaluation_samples'
    before = sorted(folders.iterdir())
    assert any(folder.name.startswith('posthoc-0.1-ba10-') for folder in before)
    again = ['--weights', 'posthoc:0.10', '--count', '20', '--out', out]
    cli('evaluate', trained.folder, *against, *again)
    assert sorted(folders.iterdir()) == before, 'another spelling of the width draws nothing anew'
    guided = ['--guidance', 'auto', '--guidance-scale', '2', '--weak', trained.folder, '--count', '20', '--out', out]
    for spelling in ('posthoc:0.1', 'posthoc:0.10'):
        cli('evaluate', trained.folder, *against, *guided, '--weak-weights', spelling)
    assert len(list(folders.iterdir())) == len(before) + 1, 'nor does one of the weak weights'


def test_a_sweep_has_average_guidance_and_interval_in_one_table(trained, against, tmp_path, cli):
    out = tmp_path / 'out'
    words = ['sweep', trained.folder, *against, '--samples', '20', '--out', out]
    words += ['--guidance-scale', '1', '3', '--interval', 'none', '0.1:0.8']
    cli(*words, '--weights', 'ema', 'posthoc:0.1')
    rows = json.loads((out / 'sweep.json').read_text())['rows']
    assert [row['settings']['weights'] for row in rows] == ['ema'] * 3 + ['posthoc:0.1'] * 3
    assert len({row['values']['fd_digits_20'] for row in rows}) == 6
    # Another width joins the table later, and nothing is measured twice, however it is spelled.
    text = cli(*words, '--weights', 'posthoc:0.100', 'posthoc:0.15', '--interval', 'none').out
    assert '2 of 4 rows are finished, and kept' in text
    widened = json.loads((out / 'sweep.json').read_text())['rows']
    assert widened[:6] == rows and [row['settings']['weights'] for row in widened[6:]] == ['posthoc:0.15'] * 2
    (chart,) = drawings(Page((out / 'sweep.html').read_text()))
    assert 'weights posthoc:0.1,' in chart and 'weights posthoc:0.15,' in chart
    entries = load_results(out / 'results.json')
    assert [entry['protocol']['weights'] for entry in entries] == [row['settings']['weights'] for row in widened]
    assert len({entry['weights_digest'] for entry in entries}) == 3
    before = (out / 'sweep.json').read_bytes()
    for width, message in (('posthoc:0.5', 'names no width'), ('posthoc:0.004', 'come only within')):
        assert message in cli.refusal(*words, '--weights', width)
    assert (out / 'sweep.json').read_bytes() == before


def test_a_run_without_snapshots_says_so(tmp_path, trained):
    shutil.copytree(trained.folder, tmp_path / 'run', symlinks=True)
    shutil.rmtree(tmp_path / 'run' / 'snapshots')
    with pytest.raises(UserError, match=r'snapshots: holds no snapshots'):
        load_trained(tmp_path / 'run', weights='posthoc:0.1')
    file = (tmp_path / 'run' / 'latest-rank0.pt').resolve()
    content = torch.load(file, weights_only=False)
    states = content['state']['algorithms']
    content['state']['algorithms'] = [one for one in states if one[0] != 'PowerEMA']
    torch.save(content, file)
    with pytest.raises(UserError, match='the run kept no averages to choose from afterwards'):
        load_trained(tmp_path / 'run', weights='posthoc:0.1')


def test_sample_takes_the_width(trained, tmp_path, cli):
    words = ['sample', str(trained.folder), '--weights', 'posthoc:0.12', '--count', '10', '--steps', '1']
    cli(*words, '--out', str(tmp_path / 'drawn'))
    assert '"posthoc:0.12"' in (tmp_path / 'drawn' / 'samples.json').read_text()
