"""``PowerEMA`` through a real ``Trainer``, against the weighted sum over all past weights."""

import logging

import pytest
import torch
from composer import Callback
from safetensors.torch import load_file

from tests.helpers import fit, loader, make_trainer, tiny_model
from tread_composer.algorithms.power_ema import PowerEMA
from tread_composer.algorithms.power_ema.posthoc import reconstruct
from tread_composer.algorithms.power_ema.snapshots import list_snapshots, power_exponent, snapshot_path
from tread_composer.core.errors import ResumeError, UserError

WIDTHS = (0.05, 0.2)
NAME = 'denoiser.blocks.2.attn.qkv.weight'


class AllWeights(Callback):
    """Every trainable weight after every batch; ``stop`` ends the run there as a crash would."""

    def __init__(self, stop=None):
        self.seen, self.stop = [], stop

    def batch_end(self, state, logger):
        self.seen.append({n: p.detach().double().clone() for n, p in state.model.named_parameters() if p.requires_grad})

    def batch_start(self, state, logger):
        if self.stop is not None and int(state.timestamp.batch) >= self.stop:
            raise InterruptedError('killed')


class Nudge(Callback):
    """A machine whose sums come out otherwise."""

    def batch_end(self, state, logger):
        with torch.no_grad():
            state.model.get_parameter(NAME).add_(0.01)


def power(folder, interval='1ba', widths=WIDTHS):
    return PowerEMA(widths, interval, folder=str(folder / '{run_name}' / 'snapshots'))


def go(algorithms, **keywords):
    return fit(algorithms, run_name='run', data=lambda: loader(shuffle=False), **keywords)


def files(folder):
    return {path.name: path.read_bytes() for path in (folder / 'run' / 'snapshots').iterdir()}


def expected(seen, width):
    """Batch t counts the integral of s**gamma from t - 1 to t."""
    exponent, end = power_exponent(width) + 1, len(seen)
    shares = [(t / end) ** exponent - ((t - 1) / end) ** exponent for t in range(1, end + 1)]
    return {name: sum(s * one[name] for s, one in zip(shares, seen, strict=True)) for name in seen[0]}


def test_the_averages_are_the_weighted_sums_of_all_past_weights(tmp_path):
    weights = AllWeights()
    trainer, _ = go([power(tmp_path, '4ba')], callbacks=[weights])
    # The end too, and once although it is the end of an epoch.
    assert sorted(files(tmp_path)) == ['ba00000004.safetensors', 'ba00000006.safetensors']
    for batch in (4, 6):
        stored = load_file(snapshot_path(tmp_path / 'run' / 'snapshots', batch))
        for width in WIDTHS:
            wanted = expected(weights.seen[:batch], width)
            assert {name for name in stored if name.startswith(f'{width}/')} == {f'{width}/{name}' for name in wanted}
            for name, value in wanted.items():
                found = stored[f'{width}/{name}']
                assert found.dtype == torch.float32
                torch.testing.assert_close(found.double(), value, atol=2e-7, rtol=1e-5, msg=name)
    assert len(stored) == 2 * sum(p.requires_grad for p in trainer.state.model.parameters())


def test_a_killed_and_resumed_run_leaves_the_files_of_one_that_was_not(tmp_path):
    go([power(tmp_path / 'whole')], max_duration='9ba')
    saving = {'save_folder': str(tmp_path / 'checkpoints'), 'save_interval': '4ba', 'max_duration': '9ba'}
    with pytest.raises(InterruptedError):
        go([power(tmp_path)], callbacks=[AllWeights(stop=7)], **saving)
    before = files(tmp_path)
    assert len(before) == 7  # more than the checkpoint of batch 4 knows of
    resumed = {**saving, 'load_path': str(tmp_path / 'checkpoints' / 'latest-rank0.pt'), 'save_overwrite': True}
    trainer, _ = go([power(tmp_path)], **resumed)
    assert int(trainer.state.timestamp.batch) == 9
    assert files(tmp_path) == files(tmp_path / 'whole')


def test_a_continuation_that_comes_out_otherwise_keeps_the_old_snapshot_aside(tmp_path, caplog):
    saving = {'save_folder': str(tmp_path / 'checkpoints'), 'save_interval': '4ba', 'max_duration': '8ba'}
    go([power(tmp_path, '2ba')], **saving)
    before = files(tmp_path)
    (earlier,) = (tmp_path / 'checkpoints').glob('ep*-ba4-rank0.pt')
    resumed = {'load_path': str(earlier), 'max_duration': '8ba'}
    with caplog.at_level(logging.WARNING):
        go([power(tmp_path, '2ba')], callbacks=[Nudge()], **resumed)
    after = files(tmp_path)
    assert 'has come to other averages at batch 6 than before' in caplog.text
    for batch in (2, 4):
        assert after[f'ba{batch:08d}.safetensors'] == before[f'ba{batch:08d}.safetensors']
    for batch in (6, 8):
        assert after[f'ba{batch:08d}.given_up1.safetensors'] == before[f'ba{batch:08d}.safetensors']
    folder = tmp_path / 'run' / 'snapshots'
    assert [one.batch for _, one in list_snapshots(folder)] == [2, 4, 6, 8]
    assert reconstruct(folder, 0.1, allow_inexact=True).facts['snapshots'] == 4


def test_snapshots_of_another_run_are_never_touched(tmp_path):
    folder = str(tmp_path / 'run' / 'snapshots')
    fit([PowerEMA(WIDTHS, '2ba', folder=folder)], run_name='one', max_duration='2ba')
    before = files(tmp_path)
    with pytest.raises(UserError, match=r'ba00000002.safetensors: is a snapshot of another run \(one\), .* is two;'):
        fit([PowerEMA(WIDTHS, '2ba', folder=folder)], run_name='two', max_duration='2ba')
    with pytest.raises(UserError, match=r'another run \(one\), and this one is one sha256:ab'):
        fit([PowerEMA(WIDTHS, '3ba', folder=folder, settings_digest='sha256:ab')], run_name='one', max_duration='2ba')
    assert files(tmp_path) == before


def test_a_checkpoint_with_other_widths_is_refused(tmp_path):
    go([power(tmp_path)], save_folder=str(tmp_path / 'a'), save_interval='2ba', max_duration='2ba')
    with pytest.raises(ResumeError, match=r'PowerEMA: the checkpoint.*\n  widths: saved \[0\.05, 0\.2\], now \[0\.1\]'):
        make_trainer(algorithms=[power(tmp_path, widths=[0.1])], load_path=str(tmp_path / 'a' / 'latest-rank0.pt'))


def test_a_layer_that_is_frozen_on_the_way_stays_in_the_average(tmp_path):
    class Freeze(Callback):
        def batch_start(self, state, logger):
            if int(state.timestamp.batch) == 2:
                state.model.get_parameter(NAME).requires_grad_(False)

    model, weights = tiny_model(), AllWeights()
    model.denoiser.x_embedder.requires_grad_(False)
    go([power(tmp_path, '4ba')], callbacks=[weights, Freeze()], model=model, max_duration='4ba')
    stored = load_file(snapshot_path(tmp_path / 'run' / 'snapshots', 4))
    assert not any('x_embedder' in name or 'pos_embed' in name for name in stored)
    after_two = [one[NAME] for one in weights.seen[:2]]
    seen = [{NAME: value} for value in (*after_two, model.get_parameter(NAME), model.get_parameter(NAME))]
    torch.testing.assert_close(stored[f'0.2/{NAME}'].double(), expected(seen, 0.2)[NAME], atol=2e-7, rtol=1e-5)


def test_a_full_disk_stops_the_run_in_words(tmp_path):
    (tmp_path / 'run').write_text('a file where the folder belongs')
    with pytest.raises(UserError, match='this snapshot of the averaged weights cannot be written'):
        go([power(tmp_path)], max_duration='1ba')
