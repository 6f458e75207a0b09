"""LightningDiT's checkpoints: imported, they predict and sample what their layout says; other switches are refused."""

import dataclasses
import itertools

import pytest
import torch

from tests.published import lightning_velocity, lightning_weights, make_weights
from tests.test_import_checkpoints import LABELS, SAID, SHAPE, close, inputs, saved
from tread_composer.core.errors import UserError
from tread_composer.core.randomness import KeyedRandom
from tread_composer.weights.foreign.command import import_weights
from tread_composer.weights.trained import load_trained

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
    said = dataclasses.replace(SAID, latent_scale=None, latent_stats=str(tmp_path / 'latents_stats.pt'))
    out = tmp_path / 'model.safetensors'
    assert import_weights(lightning_file(tmp_path / 't.pt', weights), out, said)['layout'] == 'lightningdit'
    trained = load_trained(out)
    # Positions and rotary table are computed, not read: a file of rounded ones gets exact ones in the table.
    theirs = {**weights, **{name: lightning_weights()[name] for name in weights if name.startswith('feat_rope.')}}
    x, labels = inputs()
    t = torch.tensor([0.0, 0.37, 1.0])
    with torch.no_grad():
        ours = trained.model.denoiser(x, t, labels)
    expected = [-lightning_velocity(theirs, *one) for one in zip(x, 1 - t, LABELS, strict=True)]
    close(ours, expected)
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
        (lightning_weights(), {'path_type': 'GVP'}, 'trained with --path-type GVP; of LightningDiT, the path Linear'),
    ],
)
def test_lightningdit_of_other_switches_is_refused(tmp_path, weights, changes, message):
    path = lightning_file(tmp_path / 'theirs.pt', weights, **changes)
    with pytest.raises(UserError, match=message):
        import_weights(path, tmp_path / 'a.safetensors', SAID)
    assert not (tmp_path / 'a.safetensors').exists()


def test_a_number_of_heads_without_rotary_positions_is_refused(tmp_path):
    weights = lightning_weights()
    width = weights['x_embedder.proj.weight'].shape[0]
    path, said = lightning_file(tmp_path / 'theirs.pt', weights), dataclasses.replace(SAID, num_heads=width // 2)
    with pytest.raises(UserError, match='heads of width 2 have no rotary positions; is --num-heads right'):
        import_weights(path, tmp_path / 'a.safetensors', said)


def test_lightningdit_is_no_other_layout_and_its_statistics_must_fit(tmp_path):
    path = lightning_file(tmp_path / 'theirs.pt', lightning_weights())
    with pytest.raises(UserError, match=r'--layout sit, but it has gated MLPs \(mlp.w12\).*take --layout lightningdit'):
        import_weights(path, tmp_path / 'a.safetensors', SAID, layout='sit')
    plain = saved(tmp_path / 'sit.pt', 'sit', make_weights(8))
    with pytest.raises(UserError, match='--layout lightningdit, but it has no gated MLP'):
        import_weights(plain, tmp_path / 'a.safetensors', SAID, layout='lightningdit')
    torch.save({'mean': torch.zeros(3), 'std': torch.ones(3)}, tmp_path / 'stats.pt')
    said = dataclasses.replace(SAID, latent_stats=str(tmp_path / 'stats.pt'))
    with pytest.raises(UserError, match='replaces --latent-scale'):
        import_weights(path, tmp_path / 'a.safetensors', said)
    with pytest.raises(UserError, match=r"does not hold 'mean' and 'std' of 4 channels"):
        import_weights(path, tmp_path / 'a.safetensors', dataclasses.replace(said, latent_scale=None))
