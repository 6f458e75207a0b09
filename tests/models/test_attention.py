"""``attention`` other than torch's own: same numbers from the same weights, or a refusal in words; norms of heads."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import randomised
from tests.models.networks import fresh_net
from tests.runs import SMALL, YAMLS, Run, launch_here, predict, run
from tread_composer.builders.run_folder import decisive_settings
from tread_composer.config import ConfigError, check_machine, load_config
from tread_composer.core.errors import UserError
from tread_composer.models import DiT, LightningDiT, Mamba2DiT
from tread_composer.routing import Route, apply_tread
from tread_composer.weights.trained import load_trained

CPU = torch.device('cpu')
BACKBONES = pytest.mark.parametrize('backbone', [DiT, LightningDiT])


def network(backbone: type, **changes: Any) -> Any:
    torch.manual_seed(0)
    return randomised(fresh_net(backbone, **{'depth': 3, **changes}))


def outcome(model: Any) -> list[Tensor]:
    """The prediction and all gradients of one training pass with 5 of the 16 tokens on the route."""
    routing = apply_tread(model.train(), Route(1, 2, 0.7), token_arguments=model.token_arguments)
    generator = torch.Generator().manual_seed(1)
    kept = torch.stack([torch.randperm(16, generator=generator)[:5].sort().values for _ in range(3)])
    routing.arm([kept], num_tokens=16)
    x, t = torch.randn(3, 3, 8, 8, generator=generator), torch.rand(3, generator=generator)
    out = model(x, t, torch.tensor([0, 4, 5]))
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@BACKBONES
def test_sdpa_is_the_start_and_changes_no_bit(backbone: type) -> None:
    plain, chosen = network(backbone), network(backbone)
    assert chosen.use_attention('sdpa', CPU) == "attention: sdpa, torch's own"
    assert all(torch.equal(a, b) for a, b in zip(outcome(chosen), outcome(plain), strict=True))


def flex_has_a_backward_pass() -> bool:
    """Newer torch refuses gradients of FlexAttention on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = torch.ones(3, 1, 1, 4, 8, requires_grad=True)
    try:
        flex_attention(q, k, v).sum().backward()
    except NotImplementedError:
        return False
    return True


def test_flex_without_a_backward_pass_draws_and_is_refused_for_training() -> None:
    if flex_has_a_backward_pass():
        pytest.skip('this torch trains with FlexAttention on a CPU')
    plain, chosen = network(DiT).eval(), network(DiT).eval()
    with pytest.raises(UserError, match=r"'flex' cannot run on cpu .*backward"):
        chosen.use_attention('flex', CPU)
    assert chosen.use_attention('flex', CPU, training=False).startswith('attention: flex of torch')
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        a, b = (model(x, torch.tensor([0.2, 0.7]), torch.tensor([1, 5])) for model in (chosen, plain))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@BACKBONES
@pytest.mark.skipif(not flex_has_a_backward_pass(), reason='this torch has no backward pass of FlexAttention on a CPU')
def test_flex_gives_predictions_and_gradients_of_sdpa(backbone: type) -> None:
    plain, chosen = network(backbone), network(backbone)
    line = chosen.use_attention('flex', CPU)
    assert line.startswith(f'attention: flex of torch {torch.__version__}, not compiled') and 'heads of 8' in line
    assert chosen.state_dict().keys() == plain.state_dict().keys()
    assert all(block.attn.attend is not plain.blocks[0].attn.attend for block in chosen.blocks)
    for a, b in zip(outcome(chosen), outcome(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_an_attention_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = 'torch.nn.attention.flex_attention.flex_attention'
    monkeypatch.setattr(module, lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0))
    with pytest.raises(UserError, match=r"'flex' gives another result than sdpa on cpu \(float32, heads of 12\)"):
        network(DiT, num_heads=2).use_attention('flex', CPU)


def test_a_network_without_attention_has_no_choice() -> None:
    model = Mamba2DiT(latent_size=8, in_channels=3, num_classes=5, hidden_size=24, depth=2, head_size=12)
    with pytest.raises(ValueError, match=r"attention='flex': Mamba2DiT has none"):
        model.use_attention('flex', CPU)


def test_without_xformers_a_run_ends_with_the_remedy(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / 'xformers.py').write_text("raise ImportError('No module named xformers')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'xformers', raising=False)
    words = ('model.attention=xformers', f'data.local={digits}', f'save_folder={tmp_path}/r')
    ended = launch_here(tmp_path, YAMLS / 'digits.yaml', *SMALL, *words)
    assert ended.returncode == 2, ended.stderr
    assert "model.attention: 'xformers' cannot run: the package is not installed" in ended.stderr
    assert 'or take attention: sdpa' in ended.stderr and 'Traceback' not in ended.stderr
    assert not (tmp_path / 'r').exists()


def test_xformers_on_a_cpu_is_refused() -> None:
    pytest.importorskip('xformers', exc_type=ImportError)
    with pytest.raises(UserError, match="'xformers' cannot run on cpu: its kernels need a CUDA device"):
        network(DiT).use_attention('xformers', CPU)


def test_a_compiled_run_with_flex_on_a_cpu_is_refused() -> None:
    config = load_config(YAMLS / 'digits.yaml', ['model.attention=flex', 'compile=true', 'device=cpu'])
    with pytest.raises(ConfigError, match=r"model\.attention: 'flex' has no compiled backward pass on a CPU"):
        check_machine(config)


def test_a_run_trains_and_samples_with_any(
    routed: Run, tmp_path: Path, capsys: pytest.CaptureFixture, cli: Any
) -> None:
    trained = routed
    if flex_has_a_backward_pass():
        capsys.readouterr()
        trained = run(tmp_path / 'flex', 'digits_tread.yaml', 'model.attention=flex')
        assert 'attention: flex of torch' in capsys.readouterr().out
        torch.testing.assert_close(predict(trained.denoiser), predict(routed.denoiser), rtol=1e-3, atol=1e-4)
    # Trained with one, sampled with the other: sdpa, unless the command says.
    again = load_trained(trained.folder, weights='raw')
    assert again.attention.startswith('attention: sdpa')
    chosen = load_trained(routed.folder, weights='raw', overrides={'model.attention': 'flex'})
    assert chosen.attention.startswith('attention: flex')
    torch.testing.assert_close(predict(chosen.model.denoiser), predict(again.model.denoiser), rtol=1e-3, atol=1e-4)
    words = ('--out', tmp_path / 'out', '--count', '2', '--steps', '2', '--device', 'cpu')
    assert 'attention: flex of torch' in cli('sample', routed.folder, 'model.attention=flex', *words).out


def test_a_checkpoint_does_not_know_what_computed_it() -> None:
    plain, flex = (load_config(YAMLS / 'digits.yaml', [f'model.attention={name}']) for name in ('sdpa', 'flex'))
    assert decisive_settings(plain.to_dict()) == decisive_settings(flex.to_dict())
    # Runs from before dit had qk_norm go on; those that have it are bound to it.
    assert 'qk_norm' not in decisive_settings(plain.to_dict())['model']
    normed = load_config(YAMLS / 'digits.yaml', ['model.qk_norm=rms'])
    assert decisive_settings(normed.to_dict())['model']['qk_norm'] == 'rms'


@pytest.mark.parametrize('kind', ['rms', 'layer'])
def test_queries_and_keys_of_a_dit_are_normalised_per_head(kind: str) -> None:
    model = network(DiT, qk_norm=kind)
    attention = model.blocks[1].attn
    x = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(3))
    done = torch.zeros(2, 7, 24)
    for b in range(2):  # once more, sample by sample and head by head
        rows = (x[b] @ attention.qkv.weight.T + attention.qkv.bias).view(7, 3, 3, 8)
        for head in range(3):
            q, k, v = rows[:, :, head].unbind(1)
            normed = []
            for value, norm in ((q, attention.q_norm), (k, attention.k_norm)):
                centred = value - value.mean(1, keepdim=True) if kind == 'layer' else value
                unit = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
                normed.append(unit * norm.weight + (norm.bias if kind == 'layer' else 0))
            done[b, :, 8 * head : 8 * head + 8] = (normed[0] @ normed[1].T / 8**0.5).softmax(1) @ v
    torch.testing.assert_close(attention(x), attention.proj(done), rtol=1e-4, atol=1e-5)
    plain = set(network(DiT).state_dict())
    added = {name.split('.', 2)[2].rpartition('.')[0] for name in model.state_dict().keys() - plain}
    assert added == {'attn.q_norm', 'attn.k_norm'} and plain <= model.state_dict().keys()


def test_qk_norm_is_typed() -> None:
    for value in ('true', 'rmsnorm'):
        with pytest.raises(ConfigError, match=r"model\.qk_norm: .* is not one of false, 'rms', 'layer'"):
            load_config(YAMLS / 'digits.yaml', [f'model.qk_norm={value}'])
    for value in ('true', 'false', 'rms', 'layer'):
        load_config(YAMLS / 'digits_lightning.yaml', [f'model.qk_norm={value}'])
    with pytest.raises(ValueError, match=r"qk_norm='batch': must be False, 'rms' or 'layer'"):
        network(DiT, qk_norm='batch')
    true, rms = (network(LightningDiT, qk_norm=value).state_dict() for value in (True, 'rms'))
    assert true.keys() == rms.keys() and all(torch.equal(true[name], rms[name]) for name in true)
