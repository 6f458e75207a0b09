"""What cannot be routed soundly is refused with the reason, and the check itself leaves no trace."""

import pytest
import timm.models.swin_transformer
import torch
from composer.devices import DeviceCPU
from composer.distributed.shared_utils import generate_oom_hook
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import SwinConfig, SwinModel

from tests.routing.small import N, tokens
from tread_composer.routing import Route, RoutingError, apply_tread


class Stack(nn.Module):
    """Residual blocks around a mixing of tokens that the tests choose."""

    class Block(nn.Module):
        def __init__(self, mixing):
            super().__init__()
            self.mixing, self.linear = mixing, nn.Linear(8, 8)

        def forward(self, x):
            return x + self.linear(self.mixing(x))

    def __init__(self, mixing):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Stack.Block(mixing) for _ in range(4))
        self.wrap = lambda block, x: block(x)

    def forward(self, x):
        for block in self.blocks:
            x = self.wrap(block, x)
        return x


def attention(x, **how):
    return functional.scaled_dot_product_attention(x, x, x, **how)


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


def own_rotary(x):
    """Positions counted within the block: those of the kept tokens would be wrong."""
    angle = torch.arange(x.shape[1]).float()[:, None] * 0.5
    turned = x * angle.cos() + x.flip(-1) * angle.sin()
    return functional.scaled_dot_product_attention(turned, turned, x)


BY_POSITION = {
    'convolution': Convolution(),
    'windows of four': lambda x: attention(x.unflatten(1, (-1, 4))).flatten(1, 2),
    'scan': lambda x: x.cumsum(dim=1),
    'causal mask': lambda x: attention(x, is_causal=True),
    'rotary positions of its own': own_rotary,
}


def routed(mixing, **settings):
    """A stack whose inner blocks are routed, and its routing."""
    model = Stack(mixing).train()
    return model, apply_tread(model, Route(1, -2, 0.5), **settings)


@pytest.mark.parametrize('kind', BY_POSITION)
def test_blocks_that_mix_by_position_are_refused_and_may_be_allowed_in_words(kind):
    model, _ = routed(BY_POSITION[kind])
    with pytest.raises(RoutingError, match=r"block 1 of 'blocks' cannot be routed: the same tokens in another order"):
        model(tokens())
    model, routing = routed(BY_POSITION[kind], ordered=True)
    model(tokens())
    assert routing.used and routing.checked is None


def test_each_block_of_a_route_is_tried_but_none_outside():
    model, routing = routed(nn.Identity())
    model.blocks[0].mixing = model.blocks[3].mixing = Convolution()
    model(tokens())
    assert routing.checked is True
    model.blocks[2].mixing = Convolution()
    with pytest.raises(RoutingError, match="block 2 of 'blocks' cannot be routed"):
        model(tokens())


def test_samples_behind_tokens_are_refused():
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), 4).train()
    apply_tread(layers, Route(1, -2, 0.5))
    with pytest.raises(RoutingError, match=r'outputs of a sample change with .* batch_first=True'):
        layers(tokens().transpose(0, 1))


def test_a_gate_that_is_still_zero_is_looked_at_again():
    model, routing = routed(Convolution())
    for block in model.blocks:
        nn.init.zeros_(block.linear.weight)
        nn.init.zeros_(block.linear.bias)
    model(tokens())
    assert routing.checked is False
    nn.init.normal_(model.blocks[2].linear.weight, std=1e-3)
    with pytest.raises(RoutingError, match="block 2 of 'blocks' cannot be routed"):
        model(tokens())


class Traceable(nn.Module):
    """Keeps a count in a buffer, draws random numbers and drops out."""

    def __init__(self):
        super().__init__()
        self.register_buffer('calls', torch.zeros(()))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        self.calls += 1
        return self.dropout(attention(x)) + 0.0 * torch.rand(())


@pytest.mark.parametrize('autocast', [False, True])
def test_the_check_leaves_no_trace(autocast):
    def train(ordered):
        model, hooked = Stack(Traceable()).train(), []
        model.blocks[1].linear.eval()
        for block in model.blocks:
            block.register_forward_hook(lambda *_: hooked.append('after'))
            block.linear.register_forward_pre_hook(lambda *_: hooked.append('before'))
        routing = apply_tread(model, Route(1, -2, 0.5), ordered=ordered)
        kept = torch.arange(0, N, 2).expand(4, -1)
        torch.manual_seed(5)
        for _ in range(3):
            routing.arm([kept], num_tokens=N)
            with torch.autocast('cpu', dtype=torch.bfloat16, enabled=autocast):
                loss = model(tokens()).square().mean()
            loss.backward()
        assert routing.checked is (None if ordered else True)
        gradients = [p.grad for p in model.parameters()]
        assert all(gradient is not None for gradient in gradients)
        modes = [module.training for module in model.modules()]
        return [loss, *gradients, model.blocks[1].mixing.calls, torch.get_rng_state()], (hooked, modes)

    (checked, kept), (unchecked, expected) = train(False), train(True)
    for one, other in zip(checked, unchecked, strict=True):
        assert torch.equal(one, other)
    assert kept == expected and len(kept[0]) == 3 * 4 * 2 and not all(kept[1])


def test_autocast_that_a_block_switches_on_itself_keeps_its_gradients():
    """Weights that were cast in the check, without a gradient, must not be those of the call that counts."""

    class Casting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            with torch.autocast('cpu', dtype=torch.bfloat16):
                return self.linear(x).float()

    def wide(block, x):
        with torch.autocast('cpu', enabled=False):
            return block(x)

    model, routing = routed(nn.Identity())
    for block in model.blocks:
        block.mixing = Casting()
    model.wrap = wide
    with torch.autocast('cpu', dtype=torch.bfloat16):
        model(tokens()).square().mean().backward()
        assert torch.is_autocast_cache_enabled()
    assert routing.checked is True
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_check_that_runs_out_of_memory_leaves_the_run_alone():
    class Scarce(nn.Module):
        def forward(self, x):
            if not self.training:
                raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate')
            return attention(x)

    outputs = []
    for ordered in (False, True):
        model, routing = routed(Scarce(), ordered=ordered)
        routing.arm([torch.arange(0, N, 2).expand(4, -1)], num_tokens=N)
        outputs.append(model(tokens()))
        assert routing.checked is (None if ordered else False)
    assert torch.equal(*outputs)


def test_hooks_of_composers_ranks_see_the_check_and_others_do_not():
    """Without them a rank that ran out of memory would wait in another collective than the rank that checks."""
    calls = []
    model = Stack(nn.Identity()).train()
    for home in ('composer.distributed.shared_utils', 'composer.callbacks.activation_monitor', 'torch_like'):

        def hook(*_, home=home):
            calls.append(home.rpartition('.')[2])

        hook.__module__ = home
        model.blocks[1].register_forward_pre_hook(hook)
    assert generate_oom_hook(DeviceCPU()).func.__module__ == 'composer.distributed.shared_utils'
    apply_tread(model, Route(1, -2, 0.5))
    model(tokens())
    assert {home: calls.count(home) for home in calls} == {
        'shared_utils': 4, 'activation_monitor': 1, 'torch_like': 1
    }  # fmt: skip


def test_grids_of_tokens_are_refused_swin_of_timm():
    sizes = {'img_size': 32, 'patch_size': 4, 'embed_dim': 8, 'depths': (2,), 'num_heads': (2,), 'window_size': 4}
    model = timm.models.swin_transformer.SwinTransformer(**sizes).train()
    apply_tread(model, Route(0, 1, 0.5), blocks='layers.0.blocks')
    with pytest.raises(
        RoutingError, match=r"layers\.0\.blocks: .*'x' should hold tokens .* got a tensor of shape \(2, 8"
    ):
        model(torch.randn(2, 3, 32, 32))


def test_blocks_that_need_their_grid_are_explained_swin_of_hugging_face():
    sizes = {'image_size': 32, 'patch_size': 4, 'embed_dim': 8, 'depths': [2], 'num_heads': [2], 'window_size': 4}
    model = SwinModel(SwinConfig(**sizes)).train()
    apply_tread(model, Route(0, 1, 0.5), blocks='encoder.layers.0.blocks', tokens_out=0)
    with pytest.raises(RoutingError, match=r'failed on 32 of 64 tokens: .*\n.*number or their grid') as caught:
        model(torch.randn(2, 3, 32, 32))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_block_that_changes_the_number_of_tokens_is_refused():
    class Merging(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x):
            return x[:, ::2] * self.weight

    model = nn.Sequential(Merging(), Merging()).train()
    apply_tread(model, Route(0, 1, 0.5), blocks='')
    with pytest.raises(RoutingError, match=r'returns a tensor of shape \(4, 4, 8\) for 4 samples x 8 tokens'):
        model(tokens())


def test_running_out_of_memory_stays_what_it_is():
    def hungry(x):
        raise RuntimeError('CUDA out of memory. Tried to allocate')

    model, _ = routed(hungry)
    with pytest.raises(RuntimeError, match=r'^CUDA out of memory') as caught:
        model(tokens())
    assert type(caught.value) is RuntimeError  # Composer looks for this to try a smaller microbatch


def test_a_model_that_checkpoints_its_blocks_reentrantly_is_refused_before_its_backward_pass():
    model, _ = routed(nn.Identity())
    model.wrap = lambda block, x: checkpoint(block, x, use_reentrant=True)
    with pytest.raises(RoutingError, match=r'block 1 .* reentrant activation .* activation_checkpointing'):
        model(tokens().requires_grad_())


def test_frozen_blocks_without_gradients_are_no_checkpointing():
    def frozen(block, x):
        with torch.no_grad():
            return block(x)

    model, routing = routed(nn.Identity())
    model.wrap = frozen
    model(tokens())
    assert routing.used


def test_a_block_compiled_in_place_gets_no_graph_for_the_check():
    counts = []
    for ordered in (False, True):
        torch._dynamo.reset()
        counter = CompileCounter()
        model, routing = routed(nn.Identity(), ordered=ordered)
        for index in range(4):
            model.blocks[index].compile(backend=counter, fullgraph=True)
        for _ in range(2):
            model(tokens().requires_grad_())
        counts.append(counter.frame_count)
        assert routing.checked is (None if ordered else True)
    assert counts[0] == counts[1] > 0
