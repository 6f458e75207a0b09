"""Other people's models, unedited: what each block sees, and the output against an explicit loop."""

import copy

import pytest
import torch

from tests.routing.foreign import FAMILIES, TRANSFORMERS_5, B
from tread_composer.routing import Route, RoutingError, apply_tread, routing_of

DEPTHS = {'diffusers_flux': 6}


class Counts:
    """How many tokens each block of several lists sees, in order of the calls, however they are passed."""

    def __init__(self, model, family):
        self.seen = []
        for path in family.lists:
            container = model.get_submodule(path)
            for index in range(len(container)):
                container[index].register_forward_pre_hook(
                    lambda _, args, kwargs: self.seen.append(
                        (kwargs[family.tokens_name] if family.tokens_name in kwargs else args[0]).shape[1]
                    ),
                    with_kwargs=True,
                )


@pytest.fixture(params=FAMILIES)
def case(request):
    torch.manual_seed(0)
    family = FAMILIES[request.param]
    model = family.build()
    return family, model, copy.deepcopy(model), DEPTHS.get(request.param, 4)


def run(family, model, *, explicit=None):
    torch.manual_seed(3)  # diffusers' DiT drops labels at random while training
    inputs = family.inputs()
    return family.call(model, inputs) if explicit is None else family.explicit(model, inputs, *explicit)


def test_tokens_of_each_block_and_the_output_against_an_explicit_loop(case):
    family, model, plain, depth = case
    routing = apply_tread(model, Route(1, -2, 0.5), **family.settings)
    start, end, first = 1, depth - 2, family.settings.get('always_keep', 0)
    num_kept = family.tokens - (family.tokens - first) // 2
    seen, dense = Counts(model, family).seen, Counts(plain, family).seen
    assert torch.equal(run(family, model.eval()), run(family, plain.eval()))
    assert seen == dense == [family.tokens] * depth
    assert list(model.state_dict()) == list(plain.state_dict())

    seen.clear()
    model.train(), plain.train()
    generator = torch.Generator().manual_seed(8)
    rest = torch.rand(1 if routing.shared else B, family.tokens - first, generator=generator)
    ids = (rest.argsort(dim=1)[:, : num_kept - first] + first).sort(dim=1).values
    kept = torch.cat([torch.arange(first).expand(len(ids), -1), ids], dim=1)
    routing.arm([kept], num_tokens=family.tokens)
    out = run(family, model)
    assert seen == [family.tokens] + [num_kept] * (end - start + 1) + [family.tokens]
    expected = run(family, plain, explicit=((start, end), kept.expand(B, -1)))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(out, run(family, plain), atol=1e-3)  # dense
    assert routing.checked is True  # the blocks were tried, and rounding did not hide them

    routing.disarm()
    assert torch.equal(run(family, model), run(family, plain))
    routing.arm(sampler=routing.sample)
    seen.clear()
    run(family, model).sum().backward()
    assert seen == [family.tokens] + [num_kept] * (end - start + 1) + [family.tokens]


def test_gradients_equal_those_of_the_explicit_loop(case):
    family, model, plain, depth = case
    routing = apply_tread(model, Route(1, -2, 0.5), **family.settings)
    first = family.settings.get('always_keep', 0)
    kept = torch.cat([torch.arange(first), torch.arange(first, family.tokens, 2)]).unique().expand(B, -1)
    routing.arm([kept[:1] if routing.shared else kept], num_tokens=family.tokens)
    run(family, model.train()).square().mean().backward()
    run(family, plain.train(), explicit=((1, depth - 2), kept)).square().mean().backward()
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ('path', 'lengths'),
    [('transformer_blocks', [16, 8, 8, 16, 16, 16]), ('single_transformer_blocks', [16, 16, 16, 16, 8, 8])],
)
def test_one_list_of_flux_alone(path, lengths):
    torch.manual_seed(0)
    family = FAMILIES['diffusers_flux']
    model = family.build().train()
    routing = apply_tread(model, Route(1, 2, 0.5), **{**family.settings, 'blocks': path})
    seen = Counts(model, family).seen
    run(family, model)
    assert seen == lengths
    assert routing_of(model) is routing
    other = next(one for one in family.lists if one != path)
    with pytest.raises(ValueError, match=rf'{path} is routed already .* several lists of one model together'):
        apply_tread(model, Route(1, 2, 0.5), **{**family.settings, 'blocks': other})


def test_without_the_settings_each_model_says_what_is_missing():
    def attempt(name, **settings):
        torch.manual_seed(0)
        model = FAMILIES[name].build().train()
        apply_tread(model, Route(1, -2, 0.5), **settings)
        run(FAMILIES[name], model)

    with pytest.raises(ValueError, match=r"blocks: .* found 'transformer_blocks' .*, 'single_transformer_blocks'"):
        attempt('diffusers_flux')
    flux = FAMILIES['diffusers_flux'].settings
    with pytest.raises(ValueError, match=r"'image_rotary_emb' counts tokens in dimension 0.* shared=True"):
        attempt('diffusers_flux', **{**flux, 'shared': False})
    with pytest.raises(RoutingError, match=r"'image_rotary_emb': expected a tensor with 16 tokens in dimension 0"):
        attempt('diffusers_flux', **{**flux, 'token_arguments': {'image_rotary_emb': 0}})
    with pytest.raises(RoutingError, match=r'failed on 8 of 16 tokens'):
        attempt('diffusers_flux', **{**flux, 'token_arguments': ()})
    if not TRANSFORMERS_5:
        with pytest.raises(RoutingError, match=r'the blocks return a tuple: say where the tokens are'):
            attempt('hf_bert', token_arguments={'attention_mask': [-2, -1]})
    with pytest.raises(RoutingError, match=r'the blocks return a tuple: say where the tokens are'):
        attempt('diffusers_sd3')
    with pytest.raises(RoutingError, match=r'named in token_arguments\. Arguments .* 16 entries: .*\(3, 1, 16, 16\)'):
        attempt('hf_bert', tokens_out=0)
    with pytest.raises(
        RoutingError, match=r"'attention_mask': expected .* 3 samples x 16 .*'attention_mask': \[-2, -1\]"
    ):
        attempt('hf_bert', tokens_out=0, token_arguments=['attention_mask'])
