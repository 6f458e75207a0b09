"""``inspect-model`` on models of others: the printed call routes them, and what cannot be is refused in words."""

import pytest
import torch

from tests.runs import ROOT
from tread_composer.cli import main
from tread_composer.routing import Route, apply_tread

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

def lonely():
    return vit()[0]

def empty():
    model, run = vit()
    model.none = nn.ModuleList()
    return model, run

def no_module():
    return (lambda: None), print

notfunc = 7
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / 'their_models.py').write_text(MODULE)
    (tmp_path / 'their_slip.py').write_text('def vit():\n    return (\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__('sys').modules, 'their_models', raising=False)


def test_the_printed_call_routes_the_model(capsys):
    assert main(['inspect-model', 'their_models:vit']) == 0
    printed = capsys.readouterr().out.partition('\n')[0]
    assert printed.startswith('Tread(start=2, end=-4')
    settings = eval(printed, {'Tread': dict})
    import their_models  # type: ignore[import-not-found]

    model, run = their_models.vit()
    route = Route(settings.pop('start'), settings.pop('end'))
    apply_tread(model, route, **settings)
    lengths = []
    blocks = [block for name, block in model.named_modules() if name in ('blocks.1', 'blocks.2')]
    for block in blocks:
        block.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    run(model.train())
    assert lengths[0] == 17 and lengths[1] < 17


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['their_models'], 'write package.module:function'),
        (['their_models:nobody'], "has no 'nobody'"),
        (['nothing_here:vit'], 'Python must be able to import it'),
        (['their_models:lonely'], 'returns VisionTransformer; it must return the model and run(model)'),
        (['their_models:notfunc'], 'their_models:notfunc is of type int, not a class or function'),
        (['their_models:no_module'], 'the first of the two is of type function; it must be a torch.nn.Module'),
        (['their_models:empty', '--blocks', 'none'], "blocks: 'none' is empty"),
        (['their_slip:vit'], 'their_slip fails while it is imported: SyntaxError'),
        ([':vit'], 'write package.module:function'),
        (['their_models:'], 'write package.module:function'),
        (['their_models:convolution'], 'their_models:convolution: '),
        (['their_models:vit', '--blocks', 'layers'], "the model has no module 'layers'"),
    ],
)
def test_what_cannot_be_routed_ends_with_2_and_the_reason(words, message, capsys):
    assert main(['inspect-model', *words]) == 2
    assert message in capsys.readouterr().err


def test_the_page_names_the_command():
    assert 'python -m tread_composer inspect-model' in (ROOT / 'docs' / 'your_model.md').read_text()
    assert torch.is_grad_enabled()
