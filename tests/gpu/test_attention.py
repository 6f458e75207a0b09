"""Attention by xformers and by compiled FlexAttention on a GPU against ``scaled_dot_product_attention``."""

from typing import Any

import pytest
import torch

from tests.helpers import randomised
from tread_composer.models import DiT, LightningDiT

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize('backbone', [DiT, LightningDiT])
@pytest.mark.parametrize('head_size', [64, 72])  # B and L; XL
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('name', ['xformers', 'flex'])
def test_it_trains_as_sdpa_does(name: str, dtype: torch.dtype, head_size: int, backbone: type) -> None:
    if name == 'xformers':
        pytest.importorskip('xformers', exc_type=ImportError)
    sizes = {'latent_size': 16, 'in_channels': 4, 'hidden_size': 4 * head_size, 'depth': 3, 'num_heads': 4}
    device, results = torch.device('cuda', 0), []
    for attention in ('sdpa', name):
        model: Any = randomised(backbone(**sizes, num_classes=5)).to(device)
        line = model.use_attention(attention, device, dtypes=(dtype, torch.float32))
        assert line.startswith(f'attention: {attention}')
        generator = torch.Generator().manual_seed(1)
        x, t = (torch.randn(3, 4, 16, 16, generator=generator), torch.rand(3, generator=generator))
        with torch.autocast('cuda', dtype, enabled=dtype != torch.float32):
            out = model(x.to(device), t.to(device), torch.tensor([0, 4, 5], device=device))
        out.float().square().mean().backward()
        results.append([out.detach().float(), *(p.grad for p in model.parameters() if p.grad is not None)])
    limit = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    for a, b in zip(*results, strict=True):
        assert float((a - b).norm()) <= limit * float(b.norm()) + 1e-6
