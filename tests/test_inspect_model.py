"""``inspect-model`` on models of others: the printed call routes them, and what cannot be is refused in words."""

import copy

import pytest
import torch
from torch import nn

from tests.helpers import Lengths
from tests.routing.small import Busy, tokens
from tests.routing.test_between import pose
from tests.routing.test_checks import Convolution, Stack
from tread_composer.routing import Route, apply_tread, find_settings

MODULE = """
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

def vit():
    torch.manual_seed(0)
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=8, num_heads=2, num_classes=5)
    return model, lambda model: model(torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)))

def convolution():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Conv1d(8, 8, 3, padding=1) for _ in range(8))

        def forward(self, x_BND):
            for block in self.blocks:
                x_BND = block(x_BND.transpose(1, 2)).transpose(1, 2)
            return x_BND

    return Net(), lambda model: model(torch.randn(3, 16, 8))

notfunc = 7

def lonely():
    return vit()[0]

def empty():
    model, run = vit()
    model.none = nn.ModuleList()
    return model, run

def no_module():
    return (lambda: None), print
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / 'their_models.py').write_text(MODULE)
    (tmp_path / 'their_slip.py').write_text('def vit():\n    return (\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__('sys').modules, 'their_models', raising=False)


def test_the_printed_call_routes_the_model(cli):
    printed = cli('inspect-model', 'their_models:vit').out.partition('\n')[0]
    assert printed.startswith('Tread(start=2, end=-4')
    settings = eval(printed, {'Tread': dict})
    import their_models  # type: ignore[import-not-found]

    model, run = their_models.vit()
    route = Route(settings.pop('start'), settings.pop('end'))
    apply_tread(model, route, **settings)
    lengths = Lengths([model.blocks[1], model.blocks[2]])
    run(model.train())
    assert lengths.seen[0] == 17 and lengths.seen[1] < 17


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['their_models'], 'write package.module:function'),
        (['their_models:nobody'], "has no 'nobody'"),
        ([':vit'], 'write package.module:function'),
        (['their_models:'], 'write package.module:function'),
        (['their_models:notfunc'], 'their_models:notfunc is of type int, not a class or function'),
        (['their_slip:vit'], 'their_slip fails while it is imported: SyntaxError'),
        (['nothing_here:vit'], 'Python must be able to import it'),
        (['their_models:lonely'], 'returns VisionTransformer; it must return a torch.nn.Module and run(model)'),
        (['their_models:no_module'], 'returns function, builtin_function_or_method; it must return a torch.nn.Module'),
        (['their_models:empty', '--blocks', 'none'], "blocks: 'none' is empty"),
        (['their_models:convolution'], 'their_models:convolution: '),
        (['their_models:vit', '--blocks', 'layers'], "the model has no module 'layers'"),
    ],
)
def test_what_cannot_be_routed_ends_with_2_and_the_reason(words, message, cli):
    assert message in cli.refusal('inspect-model', *words)


@pytest.mark.parametrize(
    ('depth', 'route'), [(1, (0, -1)), (2, (0, -1)), (3, (1, -2)), (6, (1, -2)), (7, (2, -4)), (8, (2, -4))]
)
def test_the_printed_route_fits_the_model(depth, route):
    model = Busy()
    model.blocks = nn.ModuleList(copy.deepcopy(model.blocks[0]) for _ in range(depth))
    outcome = find_settings(model, lambda model: model(tokens()), blocks='blocks')
    assert outcome.fault is None and outcome.route == route
    assert str(outcome).startswith(f'Tread(start={route[0]}, end={route[1]}, ')
    apply_tread(model, Route(*outcome.route), **outcome.settings)
    model.train()(tokens())
    assert (f'{depth} blocks are too few' in str(outcome)) is (depth < 7)


@pytest.mark.parametrize(
    ('model', 'fault'),
    [
        (lambda: Stack(Convolution()), 'the tokens in another order give another result, whatever follows them'),
        (lambda: Busy(pose), 'another order give another result'),
        (lambda: Busy(lambda model, x: model.norm(x)), 'between block 2 and block 3'),
    ],
)
def test_what_cannot_be_routed_says_why(model, fault):
    outcome = find_settings(model(), lambda model: model(tokens()))
    assert fault in str(outcome.fault) and str(outcome).startswith('cannot be routed: ')
    with pytest.raises(ValueError, match="the forward pass does not go through 'blocks'"):
        find_settings(Busy(), lambda model: torch.zeros(1))
