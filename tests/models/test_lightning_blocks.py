"""The blocks of a LightningDiT against a second, slow implementation; rotary positions; routing beside them."""

import cmath
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import fit, loader, randomised
from tests.models.lightning import SMALL, inputs, random_net, table
from tread_composer.algorithms.tread import Tread
from tread_composer.latent_diffusion import LatentDiffusion
from tread_composer.models import LightningDiT
from tread_composer.models.lightning_dit import LightningDiTBlock, rotate
from tread_composer.objectives import FlowMatching
from tread_composer.routing import Route, apply_tread

# ---- the second implementation


def slow_rotated(v: Tensor, row: int, column: int) -> Tensor:
    """A head's vector as complex numbers, each times a number of length 1."""
    pairs = [complex(v[2 * k], v[2 * k + 1]) for k in range(len(v) // 2)]
    half = len(pairs) // 2
    out = []
    for k, pair in enumerate(pairs):
        angle = (row if k < half else column) / 10000 ** ((k % half) / half)
        turned = pair * cmath.exp(1j * angle)
        out += [turned.real, turned.imag]
    return torch.tensor(out, dtype=torch.float64)


def slow_norm(v: Tensor, weight: Tensor) -> Tensor:
    return torch.tensor([float(one) / math.sqrt(sum(float(n) ** 2 for n in v) / len(v) + 1e-6) for one in v]) * weight


def slow_block(weights: dict[str, Tensor], x: Tensor, c: Tensor, places: list[tuple[int, int]], heads: int) -> Tensor:
    """A block for one sample ``[N, D]``, token by token and head by head, in float64; ``places`` are (row, column)."""

    def linear(name: str, v: Tensor) -> Tensor:
        return weights[f'{name}.weight'] @ v + weights[f'{name}.bias']

    def silu(v: Tensor) -> Tensor:
        return v / (1 + torch.exp(-v))

    width = x.shape[1]
    size = width // heads
    m = linear('adaLN_modulation.1', silu(c)).reshape(6, width)
    qkv = [linear('attn.qkv', slow_norm(v, weights['norm1.weight']) * (1 + m[1]) + m[0]) for v in x]
    attended = torch.zeros_like(x)
    for head in range(heads):
        q, k, v = ([one[p * width + head * size : p * width + (head + 1) * size] for one in qkv] for p in range(3))
        if 'attn.q_norm.weight' in weights:
            q = [slow_norm(one, weights['attn.q_norm.weight']) for one in q]
            k = [slow_norm(one, weights['attn.k_norm.weight']) for one in k]
        q, k = ([slow_rotated(one, *place) for one, place in zip(vectors, places, strict=True)] for vectors in (q, k))
        for i in range(len(x)):
            scores = [math.exp(float(q[i] @ other) / math.sqrt(size)) for other in k]
            mixed = sum(score / sum(scores) * value for score, value in zip(scores, v, strict=True))
            attended[i, head * size : (head + 1) * size] = mixed
    out = torch.stack([token + m[2] * linear('attn.proj', one) for token, one in zip(x, attended, strict=True)])
    for i, token in enumerate(out.clone()):
        a, b = linear('mlp.w12', slow_norm(token, weights['norm2.weight']) * (1 + m[4]) + m[3]).chunk(2)
        out[i] = token + m[5] * linear('mlp.w3', silu(a) * b)
    return out


@pytest.mark.parametrize(('qk_norm', 'heads'), [(False, 3), (True, 2)])
def test_a_block_equals_a_slow_second_implementation(qk_norm: bool, heads: int) -> None:
    block = randomised(LightningDiTBlock(24, heads, 4.0, qk_norm)).double()
    weights = {key: value.detach() * 2 for key, value in block.state_dict().items()}
    block.load_state_dict(weights)
    assert weights['mlp.w3.weight'].shape == (24, 64)
    generator = torch.Generator().manual_seed(1)
    x, c = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 6, 24), (2, 24)))
    places = [(row, column) for row in range(2) for column in range(3)]
    with torch.no_grad():
        out = block(x, c, table((2, 3), 24 // heads, batch_size=2))
    for i in range(2):
        slow = slow_block(weights, x[i], c[i], places, heads)
        assert (slow - x[i]).std() > 0.1
        torch.testing.assert_close(out[i], slow, rtol=1e-6, atol=1e-6)


def test_the_network_is_its_parts() -> None:
    model = random_net().double()
    x, t, labels = inputs()
    x = x.double()
    tokens = model.x_embedder(x) + model.pos_embed
    condition = model.t_embedder(t) + model.y_embedder(labels)
    for block in model.blocks:
        tokens = block(tokens, condition, table((4, 4), batch_size=3))
    patches = model.final_layer(tokens, condition)
    out = model(x, t, labels)
    for n in (0, 6, 15):
        row, column = n // 4, n % 4
        there = out[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        torch.testing.assert_close(there, patches[:, n].reshape(3, 2, 2, 3).permute(0, 3, 1, 2))


def test_qk_norm_changes_the_output_and_adds_its_weights_only() -> None:
    plain, normed = random_net(), random_net(qk_norm=True)
    more = normed.state_dict().keys() - plain.state_dict().keys()
    assert more == {f'blocks.{i}.attn.{name}_norm.weight' for i in range(3) for name in 'qk'}
    normed.load_state_dict(plain.state_dict(), strict=False)
    assert not torch.allclose(normed(*inputs()), plain(*inputs()), atol=1e-3)


def test_qk_norm_bounds_the_attention_of_large_queries() -> None:
    """The cure for losses that become nan: what the norm takes in may be of any size."""
    model = random_net(qk_norm=True)
    expected = model(*inputs())
    for block in model.blocks:
        block.attn.qkv.weight.data[:48] *= 1e4  # queries and keys
        block.attn.qkv.bias.data[:48] *= 1e4
    torch.testing.assert_close(model(*inputs()), expected, rtol=1e-3, atol=1e-3)


# ---- rotary positions


def test_attention_scores_depend_on_differences_of_positions_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randn(1, 2, 12, 8, generator=generator, dtype=torch.float64) for _ in range(2))

    def scores(rope: Tensor) -> Tensor:
        return rotate(q, rope) @ rotate(k, rope).transpose(2, 3)

    here = scores(table((3, 4)))
    large = table((9, 9)).unflatten(1, (9, 9))
    for down, right in ((0, 5), (6, 0), (4, 3)):
        shifted = large[:, down : down + 3, right : right + 4].flatten(1, 2)
        torch.testing.assert_close(scores(shifted), here, rtol=1e-10, atol=1e-10)
    flipped = large[:, :4, :3].transpose(1, 2).flatten(1, 2)  # rows for columns is another geometry
    assert not torch.allclose(scores(flipped), here, atol=1e-2)
    torch.testing.assert_close(rotate(q, table((3, 4))).norm(dim=3), q.norm(dim=3))


def test_tokens_permuted_with_their_positions_give_the_output_permuted() -> None:
    block = randomised(LightningDiTBlock(24, 3, 4.0, False)).double()
    x, c = torch.randn(2, 16, 24, dtype=torch.float64), torch.randn(2, 24, dtype=torch.float64)
    rope, order = table((4, 4), batch_size=2), torch.randperm(16, generator=torch.Generator().manual_seed(4))
    out = block(x, c, rope)
    torch.testing.assert_close(block(x[:, order], c, rope[:, order]), out[:, order])
    assert not torch.allclose(block(x[:, order], c, rope), out[:, order], atol=1e-4)


def test_the_table_is_handed_out_once_for_all_samples_and_blocks() -> None:
    seen = []
    model = random_net()
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    model(*inputs())
    assert [tuple(rope.shape) for rope in seen] == [(3, 16, 2, 4)] * 3
    assert {rope.data_ptr() for rope in seen} == {seen[0].data_ptr()} and seen[0].stride(0) == 0


def test_a_table_of_other_tokens_is_refused() -> None:
    block = random_net().blocks[0]
    x, c = torch.randn(2, 7, 24), torch.randn(2, 24)
    with pytest.raises(ValueError, match=r'2 samples x 16 tokens, the block got 2 x 7.*token_arguments: \[rope\]'):
        block(x, c, table((4, 4), batch_size=2).float())
    with pytest.raises(ValueError, match='1 samples x 7 tokens'):
        block(x, c, table((1, 7)).float())
    with pytest.raises(ValueError, match='width 6'):
        table((2, 2), head_size=6)


# ---- routing


def test_a_routed_forward_equals_a_loop_with_gathered_positions() -> None:
    model = random_net(depth=5).train()
    x, t, labels = inputs()
    dense = model(x, t, labels)
    kept = torch.tensor([[0, 3, 9, 14], [1, 2, 4, 15], [5, 6, 7, 8]])
    tokens = model.x_embedder(x) + model.pos_embed
    condition = model.t_embedder(t) + model.y_embedder(labels)
    rope = table((4, 4)).float()[0]
    for index, block in enumerate(list(model.blocks)):
        if 1 <= index <= 3:
            done = [block(tokens[b : b + 1, ids], condition[b : b + 1], rope[ids][None]) for b, ids in enumerate(kept)]
            tokens = tokens.clone()
            for b, ids in enumerate(kept):
                tokens[b, ids] = done[b][0]
        else:
            tokens = block(tokens, condition, rope.expand(3, -1, -1, -1))
    patches = model.final_layer(tokens, condition)
    routing = apply_tread(model, Route(1, 3, 0.75), token_arguments=model.token_arguments)
    routing.arm([kept], num_tokens=16)
    out = model(x, t, labels)
    for n in range(16):
        there = out[:, :, n // 4 * 2 : n // 4 * 2 + 2, n % 4 * 2 : n % 4 * 2 + 2]
        torch.testing.assert_close(there, patches[:, n].reshape(3, 2, 2, 3).permute(0, 3, 1, 2), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out, dense, atol=1e-2)
    torch.testing.assert_close(model.eval()(x, t, labels), dense)


def test_a_route_that_forgets_the_positions_is_refused() -> None:
    model = random_net(depth=5).train()
    apply_tread(model, Route(1, 3, 0.5), token_arguments=())
    with pytest.raises(
        (ValueError, RuntimeError), match=r'3 samples x 16 tokens, the block got 3 x 8.*token_arguments'
    ):
        model(*inputs())


def test_trains_with_tread_and_draws_samples() -> None:
    def fresh() -> LatentDiffusion:
        torch.manual_seed(0)
        network = LightningDiT(**{**SMALL, 'in_channels': 1, 'depth': 6}, num_classes=10)
        return LatentDiffusion(network, FlowMatching(), latent_shape=(1, 8, 8), num_classes=10)

    model = fresh()
    network: Any = model.denoiser
    before = network.blocks[3].attn.qkv.weight.detach().clone()
    trainer, said = fit([Tread(token_arguments=['rope'])], model=model, max_duration='4ba', data=lambda: loader(16))
    _, declared = fit([Tread()], model=fresh(), max_duration='4ba', data=lambda: loader(16))
    assert declared.losses == said.losses
    assert not torch.equal(network.blocks[3].attn.qkv.weight, before)
    assert trainer.state.timestamp.batch.value == 4
    samples = model.sample([1, 2], [5, 6], num_steps=2, guidance_scale=2.0)
    assert samples.shape == (2, 1, 8, 8) and samples.isfinite().all()
    with pytest.raises((ValueError, RuntimeError), match='8 samples x 16 tokens, the block got 8 x 8'):
        fit([Tread(token_arguments=())], model=fresh())
