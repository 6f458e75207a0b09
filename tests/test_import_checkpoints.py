"""Imported weights predict what the project that published them says they predict."""

import argparse
import dataclasses
import json

import pytest
import torch

from tests.published import (
    DECODER,
    SIZES,
    edm_denoised,
    make_weights,
    network,
    positions,
    sit_velocity,
)
from tread_composer.cli import main
from tread_composer.core.errors import UserError
from tread_composer.core.randomness import KeyedRandom
from tread_composer.weights.foreign.command import import_weights
from tread_composer.weights.foreign.hints import Hints
from tread_composer.weights.trained import load_trained

SHAPE = (SIZES['channels'], SIZES['side'], SIZES['side'])
SAID = Hints(autoencoder='some/vae', latent_scale=0.18215, class_names='numbers', num_heads=SIZES['heads'])
HEADS = {'dit': 8, 'sit': 8, 'tread': 4, 'maskdit': 4}
LABELS = (0, 3, SIZES['classes'])  # two classes and the null label


def saved(path, layout, weights, ema=None):
    """A file as the project's training saves it; DiT and SiT flat, as they publish."""
    wrapped = {f'model.{name}': value for name, value in weights.items()}
    average = {f'model.{name}': value for name, value in (ema or weights).items()}
    if layout == 'tread':
        content = {'model_state_dict': wrapped, 'ema_state_dict': average, 'optimizer_state_dict': {'step': 1}}
    elif layout == 'maskdit':
        content = {'model': wrapped, 'ema': average, 'opt': {'step': 1}, 'step': 7}
    else:
        content = weights
    torch.save(content, path)
    return path


def imported(tmp_path, layout, **changes):
    """Weights of a layout, and the model that they become."""
    weights = make_weights(HEADS[layout], maskdit=layout == 'maskdit')
    said = dataclasses.replace(SAID, objective=changes.pop('objective', None), **changes)
    out = tmp_path / 'model.safetensors'
    import_weights(saved(tmp_path / 'theirs.pt', layout, weights), out, said, layout=layout)
    return weights, load_trained(out)


def inputs():
    return torch.randn(len(LABELS), *SHAPE, generator=torch.Generator().manual_seed(3)), torch.tensor(LABELS)


def close(ours, theirs):
    """Equal up to the rounding of float32, of outputs that are of size 1 to 10."""
    theirs = torch.stack(theirs)
    assert theirs.std() > 0.5
    torch.testing.assert_close(ours.double(), theirs, atol=2e-4, rtol=0)


def test_dit_predicts_noise_and_variance(tmp_path):
    weights, trained = imported(tmp_path, 'dit')
    x, labels = inputs()
    t = torch.tensor([0.0, 500.0, 999.0])
    with torch.no_grad():
        ours = trained.model.denoiser(x, t, labels)
    assert ours.shape[1] == 8
    close(ours, [network(weights, *one) for one in zip(x, t, LABELS, strict=True)])
    assert (trained.config.objective.name, trained.config.objective.instance.learned_variance) == ('ddpm', True)
    assert trained.model.sample([1], [0], sampler='ddpm', num_steps=3).isfinite().all()


def test_sit_predicts_our_velocity_at_our_times(tmp_path):
    weights, trained = imported(tmp_path, 'sit')
    x, labels = inputs()
    t = torch.tensor([0.0, 0.37, 1.0])
    with torch.no_grad():
        ours = trained.model.denoiser(x, t, labels)
    assert ours.shape[1] == 4
    close(ours, [-sit_velocity(weights, one, 1 - time, label) for one, time, label in zip(x, t, LABELS, strict=True)])


def test_sit_samples_the_same_image_from_the_same_noise(tmp_path):
    weights, trained = imported(tmp_path, 'sit')
    noise = KeyedRandom(0, 0, [11, 12]).normal('sampling', *SHAPE)
    theirs = []
    for x, label in zip(noise.double(), (2, SIZES['classes']), strict=True):
        for step in range(4):  # their time runs from noise at 0 to data at 1
            x = x + sit_velocity(weights, x, step / 4, label) / 4
        theirs.append(x)
    close(trained.model.sample([2, SIZES['classes']], [11, 12], sampler='euler', num_steps=4), theirs)


@pytest.mark.parametrize('layout', ['tread', 'maskdit'])
def test_edm_weights_denoise(tmp_path, layout):
    objective = 'edm' if layout == 'tread' else None
    weights, trained = imported(tmp_path, layout, objective=objective)
    x, labels = inputs()
    sigma = torch.tensor([0.01, 0.7, 20.0])
    with torch.no_grad():
        ours = trained.model.objective.denoise(trained.model.denoiser, x, sigma, labels)
    null = SIZES['classes'] if layout == 'tread' else None  # of MaskDiT the zero vector
    theirs = [*LABELS[:2], null]
    close(ours, [edm_denoised(weights, one, float(s), label) for one, s, label in zip(x, sigma, theirs, strict=True)])


def test_treads_rectified_flow_has_our_convention(tmp_path):
    weights, trained = imported(tmp_path, 'tread', objective='flow_matching', route=(0, -1, 0.5), batch=400_000)
    x, labels = inputs()
    t = torch.tensor([0.1, 0.5, 0.9])
    with torch.no_grad():
        close(trained.model.denoiser(x, t, labels), [network(weights, *one) for one in zip(x, t, LABELS, strict=True)])
    assert (trained.batch, trained.config.routes()[0].selection_rate) == (400_000, 0.5)
    assert trained.model.objective.time_distribution.mean == 0.0  # its default: logit-normal


@pytest.mark.parametrize('layout', ['dit', 'sit', 'tread', 'maskdit'])
def test_what_is_known_of_imported_weights(tmp_path, layout):
    names = tmp_path / 'names.txt'
    names.write_text('tench\ngoldfish\nwhite shark\ntiger shark\nhammerhead\n')
    objective = 'edm' if layout == 'tread' else None
    _, trained = imported(tmp_path, layout, objective=objective, class_names=str(names))
    assert trained.data.class_names[1] == 'goldfish'
    assert trained.model.null_label == 5
    assert trained.model.latent_scale == pytest.approx(0.18215)
    assert trained.config.autoencoder.instance.path == trained.data.autoencoder == 'some/vae'
    assert trained.batch == 0
    images = trained.model.sample([1, 2, 5], [7, 7, 7], num_steps=2, sampler='euler')
    assert (images[0] - images[1]).abs().max() > 1e-2 < (images[0] - images[2]).abs().max()


@pytest.mark.parametrize('layout', ['tread', 'maskdit'])
def test_a_file_that_shows_its_layout_needs_no_word(tmp_path, layout):
    weights = make_weights(4, maskdit=layout == 'maskdit')
    file = saved(tmp_path / 'theirs.pt', layout, weights)
    said = dataclasses.replace(SAID, objective='edm' if layout == 'tread' else None)
    assert import_weights(file, tmp_path / 'a.safetensors', said)['layout'] == layout


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('layout', ['dit', 'maskdit'])
def test_files_in_half_precision_are_imported(tmp_path, layout, dtype):
    """Rounded positions are no learned ones, also where the rounded file was saved as float32 again."""
    rounded = {
        name: value.to(dtype) for name, value in make_weights(HEADS[layout], maskdit=layout == 'maskdit').items()
    }
    for stored in (rounded, {name: value.float() for name, value in rounded.items()}):
        file = saved(tmp_path / 'theirs.pt', layout, stored)
        import_weights(file, tmp_path / 'a.safetensors', SAID, layout=layout, overwrite=True)
        ours = load_trained(tmp_path / 'a.safetensors').model.denoiser.state_dict()
        assert torch.equal(ours['blocks.1.attn.qkv.weight'], rounded['blocks.1.attn.qkv.weight'].float())
    stretched = positions(SIZES['width'], 4) + 0.01
    torch.save({**rounded, 'pos_embed': stretched.to(dtype)}, tmp_path / 'theirs.pt')
    with pytest.raises(UserError, match='learned, or stretched'):
        import_weights(tmp_path / 'theirs.pt', tmp_path / 'b.safetensors', SAID, layout=layout)


def test_dit_and_sit_must_be_told_apart(tmp_path):
    file = saved(tmp_path / 'theirs.pt', 'dit', make_weights(8))
    with pytest.raises(UserError, match=r'DiT and SiT name their tensors alike.*--layout sit'):
        import_weights(file, tmp_path / 'a.safetensors', SAID)


def test_either_weights_of_a_training_file_can_be_taken(tmp_path):
    raw, ema = make_weights(8, seed=1), make_weights(8, seed=2)
    content = {'model': raw, 'ema': ema, 'opt': {'state': {}}, 'args': argparse.Namespace(model='DiT-XL/2')}
    torch.save(content, tmp_path / 'theirs.pt')
    name = 'x_embedder.proj.bias'
    for weights, wanted in (('ema', ema), ('raw', raw)):
        out = tmp_path / f'{weights}.safetensors'
        import_weights(tmp_path / 'theirs.pt', out, SAID, layout='dit', weights=weights)
        trained = load_trained(out, weights=weights)
        assert torch.equal(trained.model.denoiser.state_dict()[name], wanted[name])
    del content['ema']
    torch.save(content, tmp_path / 'theirs.pt')
    with pytest.raises(UserError, match='holds no ema weights, only model'):
        import_weights(tmp_path / 'theirs.pt', tmp_path / 'b.safetensors', SAID, layout='dit')


@pytest.mark.parametrize(
    ('said', 'message'),
    [
        ({'path_type': 'GVP', 'prediction': 'velocity'}, 'trained with --path-type GVP; of SiT, the path Linear'),
        ({'path_type': 'VP', 'prediction': 'noise'}, 'trained with --path-type VP'),
        ({'path_type': 'Linear', 'prediction': 'score'}, 'trained with --prediction score'),
        ({'path_type': 'Linear', 'prediction': 'velocity'}, ''),
    ],
)
def test_sit_of_another_path_is_refused(tmp_path, said, message):
    file, out = tmp_path / 'theirs.pt', tmp_path / 'a.safetensors'
    torch.save({'ema': make_weights(8), 'args': argparse.Namespace(model='SiT-XL/2', **said)}, file)
    if message:
        with pytest.raises(UserError, match=message):
            import_weights(file, out, SAID, layout='sit')
        assert not out.exists()
    else:
        assert import_weights(file, out, SAID, layout='sit')['layout'] == 'sit'


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.model.'])
def test_names_of_wrappers_do_not_matter(tmp_path, prefix):
    weights = make_weights(4, maskdit=True)
    torch.save({'ema': {prefix + name: value for name, value in weights.items()}}, tmp_path / 'theirs.pt')
    import_weights(tmp_path / 'theirs.pt', tmp_path / 'a.safetensors', SAID)
    bridge = load_trained(tmp_path / 'a.safetensors').model.denoiser.final_layer.bridge.linear.weight
    assert torch.equal(bridge, weights['decoder_layer.linear.weight'])
    assert bridge.shape[0] == DECODER['width']


def test_maskdit_trained_without_reconstruction_has_no_mask_token(tmp_path):
    weights = make_weights(4, maskdit=True)
    del weights['mask_token']
    import_weights(saved(tmp_path / 'theirs.pt', 'maskdit', weights), tmp_path / 'a.safetensors', SAID)
    decoder = load_trained(tmp_path / 'a.safetensors').model.denoiser.final_layer
    assert torch.equal(decoder.mask_token, torch.zeros(DECODER['width']))


@pytest.mark.parametrize(
    ('file', 'layout', 'message'),
    [
        ('dit', 'maskdit', 'it has no decoder'),
        ('dit', 'tread', r'the head has 32 rows; a tread network .* has 16'),
        ('tread', 'dit', "its weights lie under 'ema_state_dict', as in files of tread"),
        ('tread', 'sit', 'take --layout tread'),
        ('tread', 'maskdit', 'it has no decoder'),
        ('maskdit', 'dit', 'it has a decoder .decoder_layer., as in files of maskdit'),
        ('maskdit', 'tread', 'take --layout maskdit'),
    ],
)
def test_a_wrong_layout_is_refused(tmp_path, file, layout, message):
    path = saved(tmp_path / 'theirs.pt', file, make_weights(HEADS[file], maskdit=file == 'maskdit'))
    said = dataclasses.replace(SAID, objective='edm' if layout == 'tread' else None)
    with pytest.raises(UserError, match=message):
        import_weights(path, tmp_path / 'a.safetensors', said, layout=layout)
    assert not (tmp_path / 'a.safetensors').exists()


def spoilt(**changes):
    weights = make_weights(8)
    for name, value in changes.items():
        name = name.replace('__', '.')
        if value is None:
            del weights[name]
        else:
            weights[name] = value
    return weights


@pytest.mark.parametrize(
    ('weights', 'message'),
    [
        (spoilt(blocks__1__mlp__fc1__bias=None), r'Missing key\(s\) in state_dict: "blocks.1.mlp.fc1.bias"'),
        (spoilt(cls_token=torch.zeros(1, 1, 32)), r'Unexpected key\(s\) in state_dict: "cls_token"'),
        (spoilt(pos_embed=None), "'pos_embed' is missing"),
        (spoilt(pos_embed=make_weights(8)['pos_embed'] + 0.1), r'pos_embed differs by 0.1 .* 4 x 4 grid: these'),
        (spoilt(pos_embed=torch.zeros(1, 17, 32)), r'pos_embed is \[1, 17, 32\]; .* class token or another grid'),
        (spoilt(y_embedder__embedding_table__weight=torch.zeros(32, 5)), r'the label table is \[32, 5\]'),
        ({'conv.weight': torch.zeros(2)}, 'holds no tensors named'),
        ({**make_weights(8), 'steps': 7}, "'steps' stands beside"),
    ],
)
def test_other_networks_are_refused_by_what_does_not_fit(tmp_path, weights, message):
    torch.save(weights, tmp_path / 'theirs.pt')
    with pytest.raises(UserError, match=message):
        import_weights(tmp_path / 'theirs.pt', tmp_path / 'a.safetensors', SAID, layout='dit')
    assert not (tmp_path / 'a.safetensors').exists()


def test_what_the_file_does_not_say_is_asked_for_with_the_reason(tmp_path, capsys):
    path = saved(tmp_path / 'theirs.pt', 'tread', make_weights(4))
    assert main(['import', str(path), '--out', str(tmp_path / 'a.safetensors')]) == 2
    told = capsys.readouterr().err
    for option in ('--autoencoder: which', '--latent-scale: the factor', '--class-names: a file', '--objective: Comp'):
        assert option in told
    said = [
        *('--autoencoder', 'some/vae', '--latent-scale', '0.18215', '--class-names', 'numbers'),
        *('--objective', 'edm', '--route', '0,-1,0.5'),
    ]
    assert main(['import', str(path), '--out', str(tmp_path / 'a.safetensors'), *said]) == 2
    assert 'attention heads; give it: --num-heads' in capsys.readouterr().err
    assert main(['import', str(path), '--out', str(tmp_path / 'a.safetensors'), *said, '--num-heads', '4']) == 0
    assert 'layout    tread' in capsys.readouterr().out
    trained = load_trained(tmp_path / 'a.safetensors')
    (route,) = trained.config.routes()
    assert (route.start, route.end) == (0, -1)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'objective': 'edm'}, '--objective edm: the layout dit has decided that'),
        ({'class_names': 'nowhere.txt'}, '--class-names nowhere.txt: cannot be read'),
        ({'num_heads': 5}, '--num-heads 5: does not divide the width 32'),
    ],
)
def test_wrong_words_are_refused(tmp_path, changes, message):
    path = saved(tmp_path / 'theirs.pt', 'dit', make_weights(8))
    with pytest.raises(UserError, match=message):
        import_weights(path, tmp_path / 'a.safetensors', dataclasses.replace(SAID, **changes), layout='dit')


def test_class_names_must_be_as_many_as_the_table_has(tmp_path):
    path = saved(tmp_path / 'theirs.pt', 'dit', make_weights(8))
    (tmp_path / 'names.json').write_text(json.dumps(['a', 'b']))
    said = dataclasses.replace(SAID, class_names=str(tmp_path / 'names.json'))
    with pytest.raises(UserError, match='2 names for the 5 classes'):
        import_weights(path, tmp_path / 'a.safetensors', said, layout='dit')


@pytest.mark.parametrize(
    # Two of one name are none of its business: ImageNet has two cranes.
    ('text', 'message'),
    [('["a", ""]', 'no list of texts'), ('["a", "b", "a"]', '3 names for the 5 classes')],
)
def test_each_class_has_a_name(tmp_path, text, message):
    path = saved(tmp_path / 'theirs.pt', 'dit', make_weights(8))
    (tmp_path / 'names.json').write_text(text)
    said = dataclasses.replace(SAID, class_names=str(tmp_path / 'names.json'))
    with pytest.raises(UserError, match=message):
        import_weights(path, tmp_path / 'a.safetensors', said, layout='dit')


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    weights = make_weights(HEADS['sit'])
    weights['y_embedder.embedding_table.weight'][0, 0] = value
    theirs, out = saved(tmp_path / 'theirs.pt', 'sit', weights), tmp_path / 'model.safetensors'
    with pytest.raises(UserError, match='weights hold NaN or infinity, such as '):
        import_weights(theirs, out, SAID, layout='sit')
    assert not out.exists()
