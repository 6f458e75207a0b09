"""Imported weights predict what the project that published them says they predict."""

import argparse
import dataclasses
import itertools
import math

import pytest
import torch

from tests.published import (
    DECODER,
    SIZES,
    edm_denoised,
    lightning_velocity,
    lightning_weights,
    make_weights,
    network,
    positions,
    sit_velocity,
)
from tread_composer.core.errors import UserError
from tread_composer.core.randomness import KeyedRandom
from tread_composer.weights.foreign import command
from tread_composer.weights.foreign.request import ImportRequest
from tread_composer.weights.trained import load_trained

SHAPE = (SIZES['channels'], SIZES['side'], SIZES['side'])
SAID = ImportRequest('', autoencoder='some/vae', latent_scale=0.18215, class_names='numbers', num_heads=SIZES['heads'])
HEADS = {'dit': 8, 'sit': 8, 'tread': 4, 'maskdit': 4}
OBJECTIVES = {'tread': 'edm'}  # all others have one
LABELS = (0, 3, SIZES['classes'])  # two classes and the null label
INPUTS = torch.randn(len(LABELS), *SHAPE, generator=torch.Generator().manual_seed(3))


def saved(path, layout, weights):
    """A file as the project's training saves it; DiT and SiT flat, as they publish."""
    wrapped = {f'model.{name}': value for name, value in weights.items()}
    if layout == 'tread':
        content = {'model_state_dict': wrapped, 'ema_state_dict': wrapped, 'optimizer_state_dict': {'step': 1}}
    elif layout == 'maskdit':
        content = {'model': wrapped, 'ema': wrapped, 'opt': {'step': 1}, 'step': 7}
    else:
        content = weights
    torch.save(content, path)
    return path


def import_weights(path, out, **changes):
    return command.import_weights(dataclasses.replace(SAID, path=str(path), out=str(out), **changes))


def imported(tmp_path, layout, **changes):
    """Weights of a layout, and the model that they become."""
    weights, out = make_weights(HEADS[layout], maskdit=layout == 'maskdit'), tmp_path / 'model.safetensors'
    import_weights(saved(tmp_path / 'theirs.pt', layout, weights), out, layout=layout, **changes)
    return weights, load_trained(out)


def assert_refused(path, message, **changes):
    """In these words, and nothing is written."""
    out = path.parent / 'refused.safetensors'
    with pytest.raises(UserError, match=message):
        import_weights(path, out, **changes)
    assert not out.exists()


def predicted(trained, times):
    with torch.no_grad():
        return trained.model.denoiser(INPUTS, times, torch.tensor(LABELS))


def close(ours, theirs):
    """Equal up to the rounding of float32, of outputs that are of size 1 to 10."""
    theirs = torch.stack(theirs)
    assert theirs.std() > 0.5
    torch.testing.assert_close(ours.double(), theirs, atol=2e-4, rtol=0)


def test_dit_predicts_noise_and_variance(tmp_path):
    weights, trained = imported(tmp_path, 'dit')
    t = torch.tensor([0.0, 500.0, 999.0])
    ours = predicted(trained, t)
    assert ours.shape[1] == 8
    close(ours, [network(weights, *one) for one in zip(INPUTS, t, LABELS, strict=True)])
    assert (trained.config.objective.name, trained.config.objective.instance.learned_variance) == ('ddpm', True)
    assert trained.model.sample([1], [0], sampler='ddpm', num_steps=3).isfinite().all()


def test_sit_predicts_our_velocity_at_our_times_and_samples_the_same(tmp_path):
    weights, trained = imported(tmp_path, 'sit')
    t = torch.tensor([0.0, 0.37, 1.0])
    ours = predicted(trained, t)
    assert ours.shape[1] == 4
    close(ours, [-sit_velocity(weights, *one) for one in zip(INPUTS, 1 - t, LABELS, strict=True)])
    # And the same image from the same noise: their time runs from noise at 0 to data at 1.
    noise, theirs = KeyedRandom(0, 0, [11, 12]).normal('sampling', *SHAPE), []
    for x, label in zip(noise.double(), (2, SIZES['classes']), strict=True):
        for step in range(4):
            x = x + sit_velocity(weights, x, step / 4, label) / 4
        theirs.append(x)
    close(trained.model.sample([2, SIZES['classes']], [11, 12], sampler='euler', num_steps=4), theirs)


@pytest.mark.parametrize('layout', ['tread', 'maskdit'])
def test_edm_weights_denoise(tmp_path, layout):
    weights, trained = imported(tmp_path, layout, objective=OBJECTIVES.get(layout))
    sigma = torch.tensor([0.01, 0.7, 20.0])
    with torch.no_grad():
        ours = trained.model.objective.denoise(trained.model.denoiser, INPUTS, sigma, torch.tensor(LABELS))
    null = SIZES['classes'] if layout == 'tread' else None  # of MaskDiT the zero vector
    theirs = zip(INPUTS, sigma.tolist(), [*LABELS[:2], null], strict=True)
    close(ours, [edm_denoised(weights, *one) for one in theirs])


def test_treads_rectified_flow_has_our_convention(tmp_path):
    weights, trained = imported(tmp_path, 'tread', objective='flow_matching', route=(0, -1, 0.5), batch=400_000)
    t = torch.tensor([0.1, 0.5, 0.9])
    close(predicted(trained, t), [network(weights, *one) for one in zip(INPUTS, t, LABELS, strict=True)])
    assert (trained.batch, trained.config.routes()[0].selection_rate) == (400_000, 0.5)
    assert trained.model.objective.time_distribution.mean == 0.0  # its default: logit-normal


@pytest.mark.parametrize('layout', ['dit', 'sit', 'tread', 'maskdit'])
def test_what_is_known_of_imported_weights(tmp_path, layout):
    names = tmp_path / 'names.txt'
    names.write_text('tench\ngoldfish\nwhite shark\ntiger shark\nhammerhead\n')
    objective = OBJECTIVES.get(layout)
    _, trained = imported(tmp_path, layout, objective=objective, class_names=str(names))
    if layout in ('tread', 'maskdit'):  # its file shows it, and needs no word
        done = import_weights(tmp_path / 'theirs.pt', tmp_path / 'a.safetensors', objective=objective)
        assert done['layout'] == layout
    assert trained.data.class_names[1] == 'goldfish'
    assert trained.model.null_label == 5
    assert trained.model.latent_scale == pytest.approx(0.18215)
    assert trained.config.autoencoder.instance.path == trained.data.autoencoder == 'some/vae'
    assert trained.batch == 0
    images = trained.model.sample([1, 2, 5], [7, 7, 7], num_steps=2, sampler='euler')
    assert (images[0] - images[1]).abs().max() > 1e-2 < (images[0] - images[2]).abs().max()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('layout', ['dit', 'maskdit'])
def test_files_in_half_precision_are_imported(tmp_path, layout, dtype):
    """Rounded positions are no learned ones, also where the rounded file was saved as float32 again."""
    rounded = {
        name: value.to(dtype) for name, value in make_weights(HEADS[layout], maskdit=layout == 'maskdit').items()
    }
    for stored in (rounded, {name: value.float() for name, value in rounded.items()}):
        file = saved(tmp_path / 'theirs.pt', layout, stored)
        import_weights(file, tmp_path / 'a.safetensors', layout=layout, overwrite=True)
        ours = load_trained(tmp_path / 'a.safetensors').model.denoiser.state_dict()
        assert torch.equal(ours['blocks.1.attn.qkv.weight'], rounded['blocks.1.attn.qkv.weight'].float())
    stretched = positions(SIZES['width'], 4) + 0.01
    torch.save({**rounded, 'pos_embed': stretched.to(dtype)}, tmp_path / 'theirs.pt')
    assert_refused(tmp_path / 'theirs.pt', 'learned, or stretched', layout=layout)


def test_either_weights_of_a_training_file_can_be_taken(tmp_path):
    raw, ema = make_weights(8, seed=1), make_weights(8, seed=2)
    content = {'model': raw, 'ema': ema, 'opt': {'state': {}}, 'args': argparse.Namespace(model='DiT-XL/2')}
    torch.save(content, tmp_path / 'theirs.pt')
    name = 'x_embedder.proj.bias'
    for weights, wanted in (('ema', ema), ('raw', raw)):
        out = tmp_path / f'{weights}.safetensors'
        import_weights(tmp_path / 'theirs.pt', out, layout='dit', weights=weights)
        trained = load_trained(out, weights=weights)
        assert torch.equal(trained.model.denoiser.state_dict()[name], wanted[name])
    del content['ema']
    torch.save(content, tmp_path / 'theirs.pt')
    assert_refused(tmp_path / 'theirs.pt', 'holds no ema weights, only model', layout='dit')


def test_sit_of_another_path_is_refused(tmp_path):
    def trained_with(path_type, prediction):
        words = argparse.Namespace(model='SiT-XL/2', path_type=path_type, prediction=prediction)
        torch.save({'ema': make_weights(8), 'args': words}, tmp_path / 'theirs.pt')
        return tmp_path / 'theirs.pt'

    for path_type, prediction, message in (
        ('GVP', 'velocity', 'trained with --path-type GVP; of SiT, the path Linear'),
        ('VP', 'noise', 'trained with --path-type VP'),
        ('Linear', 'score', 'trained with --prediction score'),
    ):
        assert_refused(trained_with(path_type, prediction), message, layout='sit')
    published = trained_with('Linear', 'velocity')
    assert import_weights(published, tmp_path / 'a.safetensors', layout='sit')['layout'] == 'sit'


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.model.'])
def test_names_of_wrappers_do_not_matter(tmp_path, prefix):
    weights = make_weights(4, maskdit=True)
    torch.save({'ema': {prefix + name: value for name, value in weights.items()}}, tmp_path / 'theirs.pt')
    import_weights(tmp_path / 'theirs.pt', tmp_path / 'a.safetensors')
    bridge = load_trained(tmp_path / 'a.safetensors').model.denoiser.final_layer.bridge.linear.weight
    assert torch.equal(bridge, weights['decoder_layer.linear.weight'])
    assert bridge.shape[0] == DECODER['width']


def test_maskdit_trained_without_reconstruction_has_no_mask_token(tmp_path):
    weights = make_weights(4, maskdit=True)
    del weights['mask_token']
    import_weights(saved(tmp_path / 'theirs.pt', 'maskdit', weights), tmp_path / 'a.safetensors')
    decoder = load_trained(tmp_path / 'a.safetensors').model.denoiser.final_layer
    assert torch.equal(decoder.mask_token, torch.zeros(DECODER['width']))


@pytest.mark.parametrize(
    ('file', 'layout', 'message'),
    [
        ('dit', 'auto', r'DiT and SiT name their tensors alike.*--layout sit'),
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
    assert_refused(path, message, layout=layout, objective=OBJECTIVES.get(layout))


def spoilt(**changes):
    weights = make_weights(8)
    for name, value in changes.items():
        name = name.replace('__', '.')
        if value is None:
            del weights[name]
        else:
            weights[name] = value
    return weights


NOT_FINITE = [torch.tensor([*[0.0] * 31, value]) for value in (math.nan, math.inf)]


@pytest.mark.parametrize(
    ('weights', 'message'),
    [
        (spoilt(blocks__1__mlp__fc1__bias=None), r'Missing key\(s\) in state_dict: "blocks.1.mlp.fc1.bias"'),
        (spoilt(cls_token=torch.zeros(1, 1, 32)), r'Unexpected key\(s\) in state_dict: "cls_token"'),
        (spoilt(pos_embed=None), "'pos_embed' is missing"),
        (spoilt(pos_embed=make_weights(8)['pos_embed'] + 0.1), r'pos_embed differs by 0.1 .* 4 x 4 grid: these'),
        (spoilt(pos_embed=torch.zeros(1, 17, 32)), r'pos_embed is \[1, 17, 32\]; .* class token or another grid'),
        (spoilt(y_embedder__embedding_table__weight=torch.zeros(32, 5)), r'the label table is \[32, 5\]'),
        (spoilt(y_embedder__embedding_table__weight=torch.zeros(0, 32)), r"weight' is \[0, 32\], not of 2 dimensions"),
        (spoilt(blocks__0__mlp__fc1__weight=torch.tensor(1.0)), r"fc1.weight' is \[\], not of 2 dimensions"),
        (spoilt(final_layer__linear__bias=None), "'final_layer.linear.bias' is missing"),
        (spoilt(final_layer__linear__bias=torch.zeros(16)), r'the bias of the head is \[16\] for 32 rows'),
        (spoilt(t_embedder__mlp__0__weight=torch.zeros(32, 8)), r't_embedder.mlp.0.weight \[32, 8\] for 256 numbers'),
        (spoilt(blocks__1__attn__qkv__weight=torch.zeros(96, 32, dtype=torch.int8)), "qkv.weight' is int8; weights"),
        ({'conv.weight': torch.zeros(2)}, 'holds no tensors named'),
        ({**make_weights(8), 'steps': 7}, "'steps' stands beside"),
        *((spoilt(x_embedder__proj__bias=bias), 'weights hold NaN or infinity, such as ') for bias in NOT_FINITE),
    ],
)
def test_other_networks_are_refused_by_what_does_not_fit(tmp_path, weights, message):
    torch.save(weights, tmp_path / 'theirs.pt')
    assert_refused(tmp_path / 'theirs.pt', message, layout='dit')


def test_what_the_file_does_not_say_is_asked_for_with_the_reason(tmp_path, cli):
    path, out = saved(tmp_path / 'theirs.pt', 'tread', make_weights(4)), tmp_path / 'a.safetensors'
    asked = cli.refusal('import', path, '--out', out)
    for option in ('--autoencoder: which', '--latent-scale: the factor', '--class-names: a file', '--objective: Comp'):
        assert option in asked
    said = ['--autoencoder', 'some/vae', '--latent-scale', '0.18215', '--class-names', 'numbers', '--objective', 'edm']
    said += ['--route', '0,-1,0.5']
    assert 'attention heads; give it: --num-heads' in cli.refusal('import', path, '--out', out, *said)
    assert 'layout    tread' in cli('import', path, '--out', out, *said, '--num-heads', '4').out
    (route,) = load_trained(out).config.routes()
    assert (route.start, route.end) == (0, -1)


@pytest.mark.parametrize(
    # Two classes of one name are none of its business: ImageNet has two cranes.
    ('changes', 'names', 'message'),
    [
        ({'objective': 'edm'}, '', '--objective edm: the layout dit has decided that'),
        ({'num_heads': 5}, '', '--num-heads 5: does not divide the width 32'),
        ({'route': (0, 9, 0.5)}, '', '--route 0,9,0.5: the route from block 0 to block 9 does not fit 2 blocks'),
        ({'class_names': 'nowhere.txt'}, '', '--class-names nowhere.txt: cannot be read'),
        ({'class_names': 'names.json'}, '["a", "b"]', '2 names for the 5 classes'),
        ({'class_names': 'names.json'}, '["a", ""]', 'no list of texts'),
        ({'class_names': 'names.json'}, '["a", "b", "a"]', '3 names for the 5 classes'),
    ],
)
def test_wrong_words_are_refused(tmp_path, monkeypatch, changes, names, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'names.json').write_text(names)
    assert_refused(saved(tmp_path / 'theirs.pt', 'dit', make_weights(8)), message, layout='dit', **changes)


TRANSPORT = {'path_type': 'Linear', 'prediction': 'velocity', 'use_lognorm': True, 'use_cosine_loss': True}


def lightning_file(path, weights, **changes):
    """As LightningDiT's training saves it."""
    config = {'transport': {**TRANSPORT, **changes}, 'sample': {'timestep_shift': 0.3, 'cfg_scale': 10.0}}
    torch.save({'model': weights, 'ema': weights, 'opt': {'state': {}}, 'config': config}, path)
    return path


@pytest.mark.parametrize(('qk_norm', 'head_channels'), [(False, 4), (True, 8)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_lightningdit_predicts_our_velocity_and_samples_at_its_times(tmp_path, qk_norm, head_channels, dtype):
    weights = {name: value.to(dtype) for name, value in lightning_weights(qk_norm, head_channels).items()}
    stats = {'mean': torch.linspace(-1, 1, 4).view(1, 4, 1, 1), 'std': torch.linspace(1, 4, 4).view(1, 4, 1, 1)}
    torch.save(stats, tmp_path / 'latents_stats.pt')
    file, out = lightning_file(tmp_path / 'theirs.pt', weights), tmp_path / 'model.safetensors'
    done = import_weights(file, out, latent_scale=None, latent_stats=str(tmp_path / 'latents_stats.pt'))
    assert done['layout'] == 'lightningdit'
    trained = load_trained(out)
    # Positions and rotary table are computed, not read: a file of rounded ones gets exact ones in the table.
    theirs = {**weights, **{name: lightning_weights()[name] for name in weights if name.startswith('feat_rope.')}}
    t = torch.tensor([0.0, 0.37, 1.0])
    expected = [-lightning_velocity(theirs, *one) for one in zip(INPUTS, 1 - t, LABELS, strict=True)]
    close(predicted(trained, t), expected)
    assert trained.model.denoiser.token_arguments == ('rope',)
    # Four Euler steps at their shifted times, from noise at 0 to data at 1.
    times = [0.3 * s / (1 + (0.3 - 1) * s) for s in torch.linspace(0, 1, 5, dtype=torch.float64).tolist()]
    x = KeyedRandom(0, 0, [11]).normal('sampling', *SHAPE)[0].double()
    for time, following in itertools.pairwise(times):
        x = x + (following - time) * lightning_velocity(theirs, x, time, 2)
    close(trained.model.sample([2], [11], sampler='euler', num_steps=4), [x])
    decoded = trained.model.latent_shift + 1 / trained.model.latent_scale
    torch.testing.assert_close(decoded.flatten(), (stats['mean'] + stats['std']).flatten())
    objective = trained.config.objective.instance
    assert (objective.direction_weight, trained.config.model.name) == (1.0, 'lightning_dit')


def without(weights, *names):
    return {name: value for name, value in weights.items() if not any(part in name for part in names)}


def widened(weights):
    modulation = 'blocks.0.adaLN_modulation.1.weight'
    return {**weights, modulation: weights[modulation][:128]}


@pytest.mark.parametrize(
    ('weights', 'changes', 'message'),
    [
        (without(lightning_weights(), 'feat_rope'), {}, 'has no feat_rope.freqs_cos, so it was trained with use_rope'),
        (without(lightning_weights(), 'norm1', 'norm2', 'norm_final'), {}, 'trained with use_rmsnorm false'),
        (widened(lightning_weights()), {}, 'trained with wo_shift true'),
        ({**lightning_weights(), 'feat_rope.freqs_sin': torch.zeros(16, 8)}, {}, r'freqs_sin \[16, 8\] is not the rot'),
        ({**lightning_weights(), 'feat_rope.freqs_cos': torch.zeros(0, 8)}, {}, r'freqs_cos \[0, 8\] is not the rot'),
        (
            {**lightning_weights(), 'feat_rope.freqs_cos': torch.full((16, 8), math.nan)},
            {},
            r'freqs_cos \[16, 8\] is not the rot',
        ),
        (lightning_weights(), {'path_type': 'GVP'}, 'trained with --path-type GVP; of LightningDiT, the path Linear'),
    ],
)
def test_lightningdit_of_other_switches_is_refused(tmp_path, weights, changes, message):
    assert_refused(lightning_file(tmp_path / 'theirs.pt', weights, **changes), message)


def test_lightningdit_is_no_other_layout_and_heads_and_statistics_must_fit(tmp_path):
    path, plain = tmp_path / 'theirs.pt', saved(tmp_path / 'sit.pt', 'sit', make_weights(8))
    lightning_file(path, lightning_weights())
    torch.save({'mean': torch.zeros(3), 'std': torch.ones(3)}, tmp_path / 'stats.pt')
    stats = {'latent_stats': str(tmp_path / 'stats.pt')}
    for file, changes, layout, message in (
        (path, {}, 'sit', r'--layout sit, but it has gated MLPs \(mlp.w12\).*take --layout lightningdit'),
        (plain, {}, 'lightningdit', '--layout lightningdit, but it has no gated MLP'),
        (path, stats, 'auto', 'replaces --latent-scale'),
        (path, {**stats, 'latent_scale': None}, 'auto', r"does not hold 'mean' and 'std' of 4 channels"),
        (path, {'num_heads': 16}, 'auto', 'heads of width 2 have no rotary positions; is --num-heads right'),
    ):
        assert_refused(file, message, layout=layout, **changes)
