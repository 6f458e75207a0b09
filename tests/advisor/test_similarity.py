"""How alike tokens are from block to block: figures by hand, any model with a list of blocks, and what is refused."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import Lengths, randomised, tiny_dit
from tests.routing.small import Chain, inputs
from tests.runs import YAMLS
from tread_composer.advisor import propose_route, token_similarity
from tread_composer.builders.model import build_denoiser
from tread_composer.config import load_config
from tread_composer.routing import Route, apply_tread


class Times(nn.Module):
    """Multiplies, in place if asked."""

    def __init__(self, factor: float, in_place: bool = False) -> None:
        super().__init__()
        self.factor, self.in_place = nn.Parameter(torch.tensor(factor)), in_place

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.factor) if self.in_place else x * self.factor


def similarity_of(*blocks: nn.Module) -> Tensor:
    model, x = Chain(*blocks), torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    return token_similarity(model, [lambda: model(x)], blocks='blocks')


def test_it_is_the_mean_cosine_of_an_explicit_loop():
    model, (x, t, labels) = tiny_dit(depth=3), inputs(2)
    with torch.no_grad():
        depths = [model.x_embedder(x) + model.pos_embed]
        for block in model.blocks:
            depths.append(block(depths[-1], model.t_embedder(t) + model.y_embedder(labels)))
    found = token_similarity(model, [lambda: model(x, t, labels)])
    for (i, a), (j, b) in itertools.product(enumerate(depths), repeat=2):
        a, b = a.double(), b.double()
        means = ((a * b).sum(2) / (a.square().sum(2) * b.square().sum(2)).sqrt()).mean(1)  # of each sample
        assert float(found[i, j]) == pytest.approx(float(means.mean()), abs=1e-6)
    assert found[0, 3] < 0.999  # the blocks do something
    assert (found.shape, found.dtype, found.device.type) == ((4, 4), torch.float64, 'cpu')


@pytest.mark.parametrize('in_place', [False, True])
def test_identity_is_1_a_flipped_sign_is_minus_1_and_nothing_is_0(in_place):
    ones = similarity_of(*(Times(2.0, in_place) for _ in range(3)))
    torch.testing.assert_close(ones, torch.ones(4, 4, dtype=torch.float64))
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(similarity_of(*(Times(-1.0, in_place) for _ in range(3))), signs[:, None] * signs)
    assert similarity_of(Times(1.0, in_place), Times(0.0, in_place))[:, 2].tolist() == [0, 0, 0]


def test_the_batch_size_does_not_change_it():
    model, (x, t, labels) = tiny_dit(), inputs(5)
    whole = token_similarity(model, [lambda: model(x, t, labels)])
    cuts = [slice(0, 2), slice(2, 4), slice(4, 5)]
    parts = token_similarity(model, [lambda cut=cut: model(x[cut], t[cut], labels[cut]) for cut in cuts])
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)


def test_the_model_is_afterwards_as_it_was():
    model, (x, t, labels) = tiny_dit(), inputs()
    dense = token_similarity(model, [lambda: model(x, t, labels)])
    apply_tread(model, Route(1, 3, 0.5))
    model.train()
    model.blocks[2].eval()
    assert torch.equal(token_similarity(model, [lambda: model(x, t, labels)]), dense)  # it looks at a dense pass
    with pytest.raises(ZeroDivisionError):
        token_similarity(model, [lambda: model(x, t, labels), lambda: 1 / 0])
    assert [block.training for block in model.blocks] == [True, True, False, True, True, True] and model.training
    lengths = Lengths([model.blocks[index] for index in range(6)])
    for _ in range(2):  # a hook left behind would refuse the second pass
        assert model(x, t, labels).requires_grad
    assert lengths.seen == [16, 8, 8, 8, 16, 16] * 2


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, context: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return context, self.linear(hidden)


class PairChain(Chain):
    def forward(self, x: Tensor) -> Tensor:
        context = x[:, :1]
        for block in self.blocks:
            context, x = block(context=context, hidden=x)
        return x


def test_tokens_that_are_elsewhere_are_named():
    torch.manual_seed(0)
    model, x = PairChain(Pair(), Pair()), torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match=r'at depth 1 the tokens are a tuple.*tokens_out='):
        token_similarity(model, [lambda: model(x)])
    found = token_similarity(model, [lambda: model(x)], tokens='hidden', tokens_out=1)
    first = model.blocks[0].linear(x)
    assert float(found[0, 1]) == pytest.approx(float(torch.cosine_similarity(x, first, dim=2).mean()), abs=1e-6)
    with pytest.raises(ValueError, match="no argument 'x', only"):
        token_similarity(model, [lambda: model(x)], tokens='x')


class Reversed(Chain):
    def forward(self, x: Tensor) -> Tensor:
        for index in (1, 0):
            x = self.blocks[index](x)
        return x


@pytest.mark.parametrize(
    ('model', 'blocks', 'message'),
    [
        (Chain(Times(1.0), Times(1.0)), 'layers', "no module 'layers'"),
        (Chain(Times(1.0), Times(1.0)), 'blocks.0', "'blocks.0' is a Times; a ModuleList or Sequential"),
        (Reversed(Times(1.0), Times(1.0)), 'blocks', 'was not called in its turn'),
        (Chain(Times(math.nan), Times(1.0)), 'blocks', 'not finite'),
        (Chain(nn.Linear(4, 5), nn.Linear(5, 4)), 'blocks', r'\(2, 3, 4\), \(2, 3, 5\).*one shape'),
    ],
)
def test_what_cannot_be_compared_is_refused(model, blocks, message):
    with pytest.raises(ValueError, match=message):
        token_similarity(model, [lambda: model(torch.ones(2, 3, 4))], blocks=blocks)


@pytest.mark.parametrize(('calls', 'message'), [([lambda: None], 'ran 0 of 6 blocks'), ([], 'calls is empty')])
def test_calls_that_run_nothing_are_refused(calls, message):
    with pytest.raises(ValueError, match=message):
        token_similarity(tiny_dit(), calls)


@pytest.mark.parametrize('yaml', ['digits.yaml', 'digits_lightning.yaml', 'digits_mamba2.yaml'])
def test_each_backbone_of_ours_can_be_looked_at(yaml):
    denoiser = build_denoiser(load_config(YAMLS / yaml), channels=1, latent_size=8, num_classes=10)
    assert propose_route(denoiser).arguments == {'start': 2, 'end': -4, 'selection_rate': 0.5}
    found = token_similarity(denoiser, [lambda: denoiser(*inputs(2))])
    torch.testing.assert_close(found, torch.ones(9, 9, dtype=torch.float64))  # each block starts as the identity
    randomised(denoiser)
    assert token_similarity(denoiser, [lambda: denoiser(*inputs(2))])[0, 8] < 0.999
