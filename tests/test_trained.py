"""``load_trained`` gives back the model that was trained, whatever of it the user names, or says what is wrong."""

import json
import shutil

import pytest
import torch

from tests.runs import predict, run
from tread_composer.config import ConfigError
from tread_composer.core.errors import UserError
from tread_composer.data.digits import digits_manifest
from tread_composer.data.manifest import Manifest
from tread_composer.routing import Route
from tread_composer.weights.trained import load_trained


@pytest.fixture
def copy(routed, tmp_path):
    """The run's folder, to be spoilt."""
    shutil.copytree(routed.folder, tmp_path / 'run', symlinks=True)
    return tmp_path / 'run'


def rewrite(folder, change):
    """Change the latest checkpoint as a plain dictionary."""
    file = folder / 'latest-rank0.pt'
    content = torch.load(file, weights_only=False)
    change(content['state'])
    file.unlink()
    torch.save(content, file)


def test_raw_and_averaged_weights_are_those_of_training_to_the_bit(routed):
    raw = predict(routed.denoiser)
    (ema,) = [one for one in routed.trainer.state.algorithms if type(one).__name__ == 'EMA']
    with ema.averaged(routed.trainer.state):
        averaged = predict(routed.denoiser)
    assert not torch.equal(raw, averaged)
    assert torch.equal(predict(load_trained(routed.folder, weights='raw').model.denoiser), raw)
    assert torch.equal(predict(load_trained(routed.folder).model.denoiser), averaged)


def test_what_is_known_of_a_trained_model(routed):
    text = (routed.folder / 'data.json').read_text()
    assert Manifest.parse(text, 'data.json', '') == digits_manifest('train')
    trained = load_trained(routed.folder)
    assert (trained.weights, trained.batch, trained.source) == ('ema', 3, str(routed.folder))
    assert trained.data.class_names == trained.model.class_names == tuple('0123456789')
    assert trained.config.routes() == (Route(2, -4, 0.5),)
    assert trained.data.resolution == 8
    assert not trained.model.training
    assert trained.config.run_name == 'digits_tread'
    assert 'autoencoder' not in trained.model.state_dict() and trained.model.autoencoder is not None
    assert not trained.model.denoiser.pos_embed.requires_grad


def test_a_checkpoint_of_the_folder_and_the_folder_are_the_same(routed):
    folder = load_trained(routed.folder)
    assert load_trained(routed.folder / 'latest-rank0.pt').digest == folder.digest
    (earlier,) = routed.folder.glob('ep*-ba2-rank0.pt')
    trained = load_trained(earlier)
    assert trained.batch == 2
    assert trained.digest != folder.digest != load_trained(routed.folder, weights='raw').digest


def test_it_may_be_sampled_on_ranks_that_its_batch_does_not_divide_among(routed, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '3')
    assert load_trained(routed.folder).config.global_train_batch_size == 16


@pytest.mark.skipif(torch.cuda.is_available(), reason='with a GPU nothing is wrong with it')
def test_a_run_of_a_gpu_may_be_sampled_without_one(routed):
    trained = load_trained(routed.folder, overrides={'device_train_microbatch_size': 'auto', 'precision': 'amp_bf16'})
    assert trained.config.device_train_microbatch_size == 'auto'


def test_overrides_reach_the_configuration_and_are_checked(routed):
    trained = load_trained(routed.folder, overrides={'objective.sampling_shift': 3.0})
    assert trained.model.objective.sampling_shift == 3.0
    with pytest.raises(ConfigError, match=r'objective.sampling_shft'):
        load_trained(routed.folder, overrides={'objective.sampling_shft': 3.0})


def test_composers_average_is_known_for_what_it_is(tmp_path):
    averaged = run(tmp_path, 'digits.yaml', 'algorithms.ema=null', 'algorithms.composer_ema={half_life: 2ba}')
    (ema,) = [one for one in averaged.trainer.state.algorithms if type(one).__name__ == 'EMA']
    wanted = ema.ema_model.named_parameters_dict
    loaded = dict(load_trained(averaged.folder).model.named_parameters())
    assert all(torch.equal(loaded[name.removeprefix('module.')], value) for name, value in wanted.items()) and wanted
    with pytest.raises(UserError, match="in place of the others; take weights='ema'"):
        load_trained(averaged.folder, weights='raw')


def test_weights_that_are_not_there_are_refused(copy, routed):
    rewrite(copy, lambda state: state.update(algorithms=[]))
    with pytest.raises(UserError, match=r'no averaged weights.*weights=raw'):
        load_trained(copy)
    assert load_trained(copy, weights='raw').digest == load_trained(routed.folder, weights='raw').digest
    with pytest.raises(UserError, match="'best' is not 'ema' or 'raw'"):
        load_trained(copy, weights='best')


def test_weights_that_do_not_fit_are_named(copy):
    def spoil(state):
        state['model']['denoiser.extra'] = state['model'].pop('denoiser.x_embedder.proj.bias')
        state['model']['denoiser.final_layer.linear.bias'] = torch.zeros(3)

    rewrite(copy, spoil)
    with pytest.raises(UserError) as refused:
        load_trained(copy, weights='raw')
    for words in ('Missing key(s) in state_dict: "x_embedder', 'Unexpected key(s) in state_dict: "extra', 'Size([3])'):
        assert words in str(refused.value)
    text = (copy / 'config.yaml').read_text().replace('hidden_size: 16', 'hidden_size: 32')
    (copy / 'config.yaml').write_text(text)
    with pytest.raises(UserError, match=r'model.hidden_size: saved 16, now 32'):
        load_trained(copy)


def test_a_truncated_checkpoint_is_passed_over_and_never_read(copy, capsys):
    newest = (copy / 'latest-rank0.pt').resolve()
    newest.write_bytes(newest.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r'latest-rank0.pt: damaged.*cut off.*copied to its end'):
        load_trained(copy / 'latest-rank0.pt')
    assert load_trained(copy).batch < 3
    assert f'{newest}: passed over' in capsys.readouterr().err


def test_wrong_paths_say_what_belongs_there(copy, tmp_path):
    (copy / 'latest-rank0.pt').unlink()
    assert load_trained(copy).batch == 3  # the checkpoint of the most batches
    with pytest.raises(UserError, match=r'nowhere.safetensors: there is no such file'):
        load_trained(tmp_path / 'nowhere.safetensors')
    torch.save({'weights': torch.zeros(2)}, copy / 'other.pt')
    (copy / 'data.json').write_text(json.dumps({'channels': 1}))
    for path, message in (
        (copy / 'other.pt', r'no checkpoint of a run.*tread_composer import'),
        (copy, r'data.json: .*Put back the file'),
    ):
        with pytest.raises(UserError, match=message):
            load_trained(path)
    (copy / 'data.json').unlink()
    with pytest.raises(UserError, match=r"data.json: there is no such file.*copy it from the run's folder"):
        load_trained(copy)
    (copy / 'config.yaml').unlink()
    with pytest.raises(UserError, match=r'no config.yaml beside the checkpoint'):
        load_trained(copy)
