"""MaskDiT's network, loss and ratio against slow second implementations."""

import math
from statistics import NormalDist, mean, variance

import pytest
import torch

from tests.algorithms.masked import SMALL, edm_model
from tests.helpers import assert_equal_weights, randomised
from tread_composer.algorithms.maskdit import MaskDiT
from tread_composer.latent_diffusion import LatentDiffusion
from tread_composer.models import DiT
from tread_composer.objectives import EDM

TOKENS = 16


def prepared(channels=1, **settings):
    """A model with a decoder, no weight of which is zero."""
    sizes = {'patch_size': 2, 'hidden_size': 16, 'depth': 6, 'num_heads': 2}
    network = DiT(latent_size=8, in_channels=channels, num_classes=10, **sizes)
    model = LatentDiffusion(network, EDM(), latent_shape=(channels, 8, 8), num_classes=10)
    masking = MaskDiT(**SMALL, **settings).prepare(model)
    randomised(model, seed=5)
    return model.train(), masking


def draws(count=3, channels=1):
    generator = torch.Generator().manual_seed(7)
    x, noise = (torch.randn(count, channels, 8, 8, generator=generator) for _ in range(2))
    kept = torch.stack([torch.randperm(TOKENS, generator=generator)[:6].sort().values for _ in range(count)])
    return x, torch.tensor([3, 10, 0])[:count], noise, torch.tensor([0.1, 0.5, 0.8])[:count], kept


def masked_losses(model, masking, kept, *arguments):
    masking.kept = kept
    try:
        return model.objective(model.denoiser, *arguments)
    finally:
        masking.kept = None


def slow_network(net: DiT, x, t, label, kept):
    """One sample: embed, drop, encode, bridge, fill in, decode; the patches laid out pixel by pixel."""
    tokens = (net.x_embedder(x[None]) + net.pos_embed)[0]
    c = net.t_embedder(t[None]) + net.y_embedder(label[None])
    seen = torch.stack([tokens[i] for i in kept])[None]
    for index in range(net.depth):
        seen = net.blocks[index](seen, c)
    decoder = net.final_layer
    bridged = decoder.bridge(seen, c)[0]
    grid = torch.stack([bridged[kept.index(i)] if i in kept else decoder.mask_token for i in range(TOKENS)])
    grid = (grid + decoder.positions)[None]
    for index in range(len(decoder.blocks)):
        grid = decoder.blocks[index](grid, c)
    out = decoder.head(grid, c)[0]
    channels = len(x)
    image = torch.zeros(channels, 8, 8)
    for token in range(TOKENS):
        for value in range(4 * channels):  # row, column, channel
            row, column = token // 4 * 2 + value // channels // 2, token % 4 * 2 + value // channels % 2
            image[value % channels, row, column] = out[token, value]
    return image


def slow_loss(net: DiT, x, label, noise, quantile, kept, mae_weight):
    """DSM and MAE of one sample from the formulas, value by value."""
    sigma = math.exp(-1.2 + 1.2 * NormalDist().inv_cdf(quantile))
    total = sigma**2 + 0.25
    noisy = x + sigma * noise
    c_in, c_noise = 1 / math.sqrt(total), math.log(sigma) / 4
    out = slow_network(net, c_in * noisy, torch.tensor(c_noise), label, kept)
    dsm, mae = [], []
    for token in range(TOKENS):
        corner = token // 4 * 2, token % 4 * 2
        pixels = [(c, corner[0] + i, corner[1] + j) for c in range(len(x)) for i in (0, 1) for j in (0, 1)]
        predicted = [0.25 / total * float(noisy[p]) + sigma * 0.5 / math.sqrt(total) * float(out[p]) for p in pixels]
        if token in kept:
            errors = [(d - float(x[p])) ** 2 for d, p in zip(predicted, pixels, strict=True)]
            dsm.append(total / (sigma * 0.5) ** 2 * mean(errors))
        else:
            inputs = [float(noisy[p]) for p in pixels]
            target = [(v - mean(inputs)) / math.sqrt(variance(inputs) + 1e-6) for v in inputs]
            mae.append(mean((d - v) ** 2 for d, v in zip(predicted, target, strict=True)))
    return mean(dsm) + mae_weight * mean(mae), mean(dsm), mean(mae)


@pytest.mark.parametrize(('channels', 'mae_weight'), [(1, 0.1), (3, 2.0)])
def test_loss_is_that_of_the_formulas(channels, mae_weight):
    model, masking = prepared(channels, mae_weight=mae_weight)
    x, labels, noise, quantiles, kept = draws(channels=channels)
    with torch.no_grad():
        losses = masked_losses(model, masking, kept, x, labels, noise, quantiles)
        slow = [
            slow_loss(model.denoiser, x[i], labels[i], noise[i], float(quantiles[i]), kept[i].tolist(), mae_weight)
            for i in range(3)
        ]  # fmt: skip
    for column, name in enumerate(('loss', 'dsm', 'mae')):
        assert losses[name].tolist() == pytest.approx([row[column] for row in slow], rel=1e-4)
    assert losses['mae'].min() > 0.1


def test_keeping_every_patch_is_edm_itself():
    model, masking = prepared()
    x, labels, noise, quantiles, _ = draws()
    with torch.no_grad():
        plain = EDM()(model.denoiser, x, labels, noise, quantiles)['loss']
        unmasked = masked_losses(model, masking, None, x, labels, noise, quantiles)
        model.eval()
        evaluated = masked_losses(model, masking, draws()[4], x, labels, noise, quantiles)
    assert torch.equal(unmasked['loss'], plain) and torch.equal(unmasked['dsm'], plain) and 'mae' not in unmasked
    assert list(evaluated) == ['loss'] and torch.equal(evaluated['loss'], plain)


def test_masked_input_reaches_nobody_and_kept_input_everybody():
    model, masking = prepared()
    net = model.denoiser
    x, labels, _, t, kept = draws(1)
    encoded = []
    net.blocks[net.depth - 1].register_forward_hook(lambda *args: encoded.append(args[2]))

    def outputs(token, change):
        moved = x.clone()
        moved[0, 0, token // 4 * 2, token % 4 * 2] += change
        masking.kept = kept
        return net(moved, t, labels)

    masked = next(token for token in range(TOKENS) if token not in kept[0])
    with torch.no_grad():
        before, after = outputs(masked, 0.0), outputs(masked, 5.0)
        assert encoded[0].shape[1] == 6 and torch.equal(encoded[0], encoded[1]) and torch.equal(before, after)
        moved = outputs(int(kept[0, 0]), 5.0)
    assert ((encoded[2] != encoded[0]).any(2)).all() and (moved != before).any(1).all()


def test_gradient_reaches_the_mask_token_only_when_masking_and_every_parameter_always():
    model, masking = prepared()
    *arguments, kept = draws()
    for ids, expected in ((kept, True), (None, False)):
        model.zero_grad()
        masked_losses(model, masking, ids, *arguments)['loss'].mean().backward()
        without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert without == []  # what DDP needs
        assert model.denoiser.final_layer.mask_token.grad.any() == expected


def test_the_decoder_starts_as_published_and_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    models = [edm_model() for _ in range(3)]
    torch.set_rng_state(state)
    for model, seed in zip(models, (1, 1, 2), strict=True):
        MaskDiT(decoder_depth=1, decoder_hidden_size=256, decoder_num_heads=2).prepare(model, seed)
    assert torch.equal(torch.get_rng_state(), state)
    one, same, other = (model.denoiser.final_layer for model in models)
    assert_equal_weights(one.state_dict(), same.state_dict())
    assert not torch.equal(one.blocks[0].mlp.fc1.weight, other.blocks[0].mlp.fc1.weight)
    zero = [one.bridge.linear, one.head.linear, one.head.adaLN_modulation[1], one.blocks[0].adaLN_modulation[1]]
    assert not any(parameter.any() for module in zero for parameter in module.parameters())
    weight = one.blocks[0].attn.qkv.weight
    assert float(weight.detach().abs().max()) == pytest.approx(math.sqrt(6 / (256 + 768)), rel=1e-3)
    assert float(one.mask_token.detach().std()) == pytest.approx(0.02, rel=0.2)
    with torch.no_grad():
        assert not models[0].denoiser(torch.randn(1, 1, 8, 8), torch.zeros(1), torch.zeros(1).long()).any()
