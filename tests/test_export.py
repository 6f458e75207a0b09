"""An exported file holds the weights to the bit, says what they are, and stands alone."""

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from tests.runs import export, predict, run
from tread_composer.core.errors import UserError
from tread_composer.models import DiT
from tread_composer.run.plan import make_plan
from tread_composer.weights.trained import load_trained


@pytest.fixture(scope='module')
def scaled(tmp_path_factory):
    overrides = ('algorithms.ema.decay=0.5', 'latent_scale=[0.5]', 'latent_shift=[-0.25]', 'callbacks.lr_monitor={}')
    return run(tmp_path_factory.mktemp('scaled'), 'digits_tread.yaml', *overrides)


@pytest.fixture(scope='module')
def exported(scaled, tmp_path_factory):
    folder = tmp_path_factory.mktemp('exported')
    return {kind: export(scaled.folder, folder / f'{kind}.safetensors', weights=kind) for kind in ('ema', 'raw')}


@pytest.mark.parametrize('weights', ['ema', 'raw'])
def test_export_and_load_give_the_same_model_to_the_bit(scaled, exported, weights):
    ours = load_trained(exported[weights]['out'], weights=weights)
    run_ = load_trained(scaled.folder, weights=weights)
    assert torch.equal(predict(ours.model.denoiser), predict(run_.model.denoiser))
    assert torch.equal(ours.model.sample([1, 10], [3, 4], num_steps=2), run_.model.sample([1, 10], [3, 4], num_steps=2))
    assert torch.equal(ours.model.latent_scale, torch.tensor(0.5).view(1, 1, 1))
    latents = torch.ones(1, 1, 8, 8)
    assert torch.equal(ours.model.decode(latents), run_.model.decode(latents)) and ours.model.decode(latents).max() < 2
    for name in ('digest', 'weights', 'batch', 'data'):
        assert getattr(ours, name) == getattr(run_, name), name
    assert exported[weights]['digest'] == ours.digest
    assert 'lr_monitor' in run_.config.callbacks and not ours.config.callbacks
    assert ours.config.model_copy(update={'callbacks': run_.config.callbacks}) == run_.config


def test_the_two_exports_differ_and_do_not_stand_for_each_other(exported):
    assert exported['ema']['digest'] != exported['raw']['digest']
    with pytest.raises(UserError, match='holds the ema weights alone; take weights=ema, or export'):
        load_trained(exported['ema']['out'], weights='raw')
    with pytest.raises(UserError, match='holds the raw weights alone'):
        load_trained(exported['raw']['out'])


def test_tensors_have_the_names_of_the_published_dit(exported):
    names = load_file(exported['ema']['out']).keys()
    sizes = {'hidden_size': 16, 'depth': 8, 'num_heads': 2, 'num_classes': 10}
    assert names == DiT(latent_size=8, in_channels=1, **sizes).state_dict().keys()
    assert {'pos_embed', 'blocks.7.adaLN_modulation.1.weight', 'y_embedder.embedding_table.weight'} <= names


def test_the_metadata_say_what_the_weights_are(exported):
    with safe_open(exported['ema']['out'], framework='pt') as file:
        told = file.metadata()
    assert told['prediction'] == 'velocity: noise - data'
    assert told['time_convention'].startswith('t=0 data, t=1 noise')
    assert (told['weights'], told['batch'], told['objective']) == ('ema', '3', 'flow_matching')
    assert (json.loads(told['latent_scale']), json.loads(told['latent_shift'])) == ([0.5], [-0.25])
    assert (told['autoencoder'], told['autoencoder_hash']) == ('none: pixels', 'none')
    assert told['labels'] == '0 .. 9, null label 10'
    assert json.loads(told['class_names']) == list('0123456789')
    assert json.loads(told['config'])['algorithms']['tread']['selection_rate'] == 0.5
    assert told['digest'] == exported['ema']['digest'] and told['tool_version']


def test_it_says_what_sampling_costs_with_the_decoder_of_maskdit(exported, tmp_path):
    decoder = 'algorithms.maskdit={mask_ratio: 0.5, decoder_depth: 2, decoder_hidden_size: 16, decoder_num_heads: 2}'
    masked = run(tmp_path, 'digits_maskdit.yaml', decoder)
    done = export(masked.folder, tmp_path / 'masked.safetensors', weights='raw')
    plan = make_plan(load_trained(masked.folder, weights='raw').config, 1)['sampling']
    assert {name: done[name] for name in plan} == plan
    assert done['parameters'] > exported['raw']['parameters'] and done['gmacs'] > 1.2 * exported['raw']['gmacs']
    again = load_trained(tmp_path / 'masked.safetensors', weights='raw')
    assert torch.equal(predict(again.model.denoiser), predict(masked.denoiser))
    assert type(again.model.objective).__name__ == 'MaskedEDM'


def test_the_command_makes_folders_and_replaces_only_if_asked(routed, tmp_path, cli):
    out = tmp_path / 'folder' / 'model.safetensors'
    text = cli('export', routed.folder, '--out', out, '--weights', 'raw').out
    assert 'the raw weights after 3 batches' in text and 'GMACs per network call' in text and 'sha256:' in text
    assert [file.name for file in out.parent.iterdir()] == ['model.safetensors']
    before = out.read_bytes()
    assert 'is there already; give another name, or --overwrite' in cli.refusal('export', routed.folder, '--out', out)
    assert out.read_bytes() == before
    cli('export', routed.folder, '--out', out, '--overwrite')
    assert load_trained(out).weights == 'ema'


def test_a_full_disk_leaves_the_old_file(exported, tmp_path):
    out = tmp_path / 'model.safetensors'
    export(exported['raw']['out'], out, weights='raw')
    before, limits = out.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(UserError, match='cannot be written'):
            export(exported['ema']['out'], out, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert out.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ['model.safetensors']


def test_an_export_takes_overrides_and_can_be_exported_on(exported, tmp_path):
    trained = load_trained(exported['ema']['out'], overrides={'objective.sampling_shift': 3.0})
    assert trained.model.objective.sampling_shift == 3.0
    assert export(exported['ema']['out'], tmp_path / 'b.safetensors')['digest'] == exported['ema']['digest']
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot be written'):
        export(exported['ema']['out'], tmp_path / 'file' / 'b.safetensors')


def test_damaged_and_foreign_files_are_refused(exported, tmp_path):
    whole, path, pos_embed = Path(exported['ema']['out']).read_bytes(), tmp_path / 'x.safetensors', torch.zeros(1)
    for content, message in (
        (whole[:-100], 'no safetensors file, or a damaged one'),
        (whole[:-1] + bytes([whole[-1] ^ 1]), 'their digest differs'),
        (b'\x80\x04K\x01.', 'no safetensors file'),
        (save({'pos_embed': pos_embed}), r'not written by `python -m tread_composer export`.*import'),
        (
            save({'pos_embed': pos_embed}, {'format': 'tread_composer 1', 'weights': 'ema'}),
            'its metadata cannot be used: no batch, config, data, digest',
        ),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_trained(path)


def test_settings_in_a_file_are_texts_and_reach_for_nothing(exported, tmp_path, monkeypatch):
    """A file of someone else's must not read this machine's environment or files through its configuration."""
    monkeypatch.setenv('A_SECRET', 'hush')
    with safe_open(exported['ema']['out'], framework='pt') as file:
        told = file.metadata()
    tensors, tree, path = load_file(exported['ema']['out']), json.loads(told['config']), tmp_path / 'x.safetensors'
    reaching = {**tree, 'data': {**tree['data'], 'local': '${oc.env:A_SECRET}'}}
    save_file(tensors, path, metadata={**told, 'config': json.dumps(reaching)})
    assert load_trained(path).config.data.local == '${oc.env:A_SECRET}'
    save_file(tensors, path, metadata={**told, 'config': json.dumps({**tree, 'extends': '/etc/hosts'})})
    with pytest.raises(UserError, match='extends'):
        load_trained(path)
