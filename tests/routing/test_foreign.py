"""Other people's models against an oracle that gathers nothing: dense attention in which skipped tokens are masked.

On the blocks of the route every attention sees all tokens, with those that skip masked out as keys; behind the last
one they are restored. A table or a mask that went to the wrong token shows in it.
"""

import copy
import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.routing.foreign import CASES, JOINT, ROPE, SINGLE, TRANSFORMERS_5, B, Case
from tread_composer.routing import Route, RoutingError, apply_tread, find_settings, routing_of, take_kept, tap_blocks

SDPA = functional.scaled_dot_product_attention


def blocks_of(model: nn.Module, case: Case) -> list[tuple[int, nn.Module]]:
    """All blocks with the number of their list."""
    lists = [model.get_submodule(path) for path in case.lists]
    return [(number, blocks[index]) for number, blocks in enumerate(lists) for index in range(len(blocks))]


def tokens_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    names = ('hidden_states', 'x', 'src')
    return next((kwargs[name] for name in names if name in kwargs), args[0] if args else None)


class Counts:
    """How many tokens each block of several lists sees, in order of the calls, however they are passed."""

    def __init__(self, model: nn.Module, case: Case) -> None:
        self.seen: list[int] = []
        for _, block in blocks_of(model, case):
            block.register_forward_pre_hook(
                lambda _, args, kwargs: self.seen.append(tokens_in(args, kwargs).shape[1]), with_kwargs=True
            )


class Masked:
    """Makes a dense model behave as if tokens skipped its blocks from ``start`` to ``end``."""

    def __init__(self, model: nn.Module, case: Case, span: tuple[int, int], skipped: Tensor) -> None:
        self.case, self.skipped, self.active, self.first_key = case, skipped, False, 0
        self.waiting = torch.empty(0)
        self.outputs: list[Tensor] = []  # of each block
        blocks = blocks_of(model, case)
        for index, (number, block) in enumerate(blocks):
            on = span[0] <= index <= span[1]
            begins = on and (index == span[0] or blocks[index - 1][0] != number)
            ends = on and (index == span[1] or blocks[index + 1][0] != number)
            block.register_forward_pre_hook(self.before(number, on, begins), with_kwargs=True)
            block.register_forward_hook(self.after(number, ends))

    def ends_of(self, number: int) -> tuple[int, int]:
        fixed = self.case.of_list(number, 'always_keep', 0)
        return (fixed, 0) if isinstance(fixed, int) else fixed

    def before(self, number: int, on: bool, begins: bool) -> Any:
        def hook(block: nn.Module, args: Any, kwargs: Any) -> None:
            self.active, self.first_key = on, self.case.first_key[number] + self.ends_of(number)[0]
            if begins:
                self.waiting = tokens_in(args, kwargs)

        return hook

    def after(self, number: int, ends: bool) -> Any:
        def hook(block: nn.Module, args: Any, out: Any) -> Any:
            self.active, position = False, self.case.of_list(number, 'tokens_out', None)
            x = out if isinstance(out, Tensor) else out[position]
            if ends:
                x = torch.where(functional.pad(self.skipped, self.ends_of(number))[..., None], self.waiting, x)
            self.outputs.append(x)
            return x if isinstance(out, Tensor) else (*out[:position], x, *out[position + 1 :])

        return hook

    def attention(self, query, key, value, attn_mask=None, *args, **kwargs):
        keys, free = key.shape[-2], self.skipped.shape[1]
        if self.active and keys >= self.first_key + free and keys == query.shape[-2]:
            hidden = functional.pad(self.skipped, (self.first_key, keys - self.first_key - free))[:, None, None]
            if attn_mask is None:
                attn_mask = ~hidden
            elif attn_mask.dtype == torch.bool:
                attn_mask = attn_mask & ~hidden
            else:
                attn_mask = attn_mask.masked_fill(hidden, -math.inf)
        return SDPA(query, key, value, attn_mask, *args, **kwargs)


@pytest.mark.parametrize('name', CASES)
def test_tokens_taps_output_and_gradients_equal_dense_attention_with_skipped_tokens_masked(name):
    case = CASES[name]
    model = case.randomised()
    plain, dense = copy.deepcopy(model), copy.deepcopy(model)
    depth = len(blocks_of(model, case))
    span = Route(*case.route).span(depth)
    settings = {'blocks': case.lists[0], **case.settings}
    routing = apply_tread(model, Route(*case.route, 0.5), **settings)
    seen = Counts(model, case).seen
    assert list(model.state_dict()) == list(plain.state_dict())
    assert torch.equal(case.call(model.eval()), case.call(dense.eval())) and len(seen) == depth
    full = list(seen)
    seen.clear()
    model.train(), dense.train()

    oracle = Masked(plain, case, span, torch.empty(0))
    lead, trail = oracle.ends_of(0)
    free = case.tokens - lead - trail
    rows = [torch.randperm(free, generator=torch.Generator().manual_seed(b)) for b in range(1 if case.shared else B)]
    stay = torch.stack(rows)[:, : free - free // 2].sort(dim=1).values
    oracle.skipped = torch.ones(len(stay), free, dtype=torch.bool).scatter(1, stay, False).expand(B, -1)
    kept = torch.cat([torch.arange(lead).expand(len(stay), -1), stay + lead], dim=1)
    routing.arm([kept], num_tokens=case.tokens)
    taps = tap_blocks(model, range(depth))
    out, tapped = case.call(model), taps.read()
    assert routing.used and routing.checked is True  # the blocks were tried, and rounding did not hide them
    expected_lengths = [n - free // 2 if span[0] <= at <= span[1] else n for at, n in enumerate(full)]
    assert seen == expected_lengths
    beside = None
    if not isinstance(settings['blocks'], dict):  # on a model that is not routed
        beside = tap_blocks(plain, range(depth), blocks=case.lists, tokens_out=settings.get('tokens_out'))
    with mock.patch.object(functional, 'scaled_dot_product_attention', oracle.attention):
        expected = case.call(plain)
    unrouted = beside.read() if beside else {}
    assert all(torch.equal(tap.tokens, oracle.outputs[at]) and tap.kept is None for at, tap in unrouted.items())
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    loss, reference = out.square().mean(), expected.square().mean()
    for at, output in enumerate(oracle.outputs):
        ids = tapped[at].kept
        assert (ids is None) is not (span[0] <= at <= span[1])
        wanted = output if ids is None else take_kept(output, ids)
        torch.testing.assert_close(tapped[at].tokens, wanted, rtol=1e-5, atol=1e-5)
        loss = loss + (at + 1) * tapped[at].tokens.pow(3).mean()
        reference = reference + (at + 1) * wanted.pow(3).mean()
    loss.backward()
    reference.backward()
    for (at, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), at
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5, msg=at)

    routing.disarm()
    assert torch.equal(case.call(model), case.call(dense)) and (out - case.call(dense)).abs().max() > 1e-4
    routing.arm(sampler=routing.sample)  # draws of its own, in the layout of the first list
    seen.clear()
    case.call(model).sum().backward()
    assert seen == expected_lengths


@pytest.mark.parametrize('name', [name for name in CASES if name not in ('hunyuan_video', 'flux2', 'chroma')])
def test_the_settings_are_found_by_running_the_model(name):
    """One list at a time, and all but whether the first tokens are part of the image."""
    case = CASES[name]
    model, path = case.randomised().eval(), case.lists[0]
    before = case.call(model)
    outcome = find_settings(model, case.call, blocks=path)
    expected = {**case.settings, 'blocks': path}
    if 'without_first' not in str(expected):
        expected.pop('always_keep', None)
    if name == 'hf_bert' and TRANSFORMERS_5:
        expected.pop('tokens_out')
    assert outcome.fault is None and outcome.settings == expected
    container = model.get_submodule(path)
    assert type(container) in (nn.ModuleList, nn.Sequential) and torch.equal(case.call(model), before)
    printed = eval(str(outcome).partition('\n')[0], {'Tread': dict})
    apply_tread(model, Route(printed.pop('start'), printed.pop('end')), **printed)
    assert ('always_keep=1, or [0, 1]' in str(outcome)) is (name in ('timm_vit', 'hf_vit'))
    rivals = "'hidden_states' holds the tokens: 16 of them; 'encoder_hidden_states' would fit too"
    two_streams = ('diffusers_sd3', 'diffusers_flux', 'qwen_image', 'hidream')
    assert (rivals in outcome.notes) is (name in two_streams)


@pytest.mark.parametrize(
    ('path', 'lengths'), [(JOINT, [16, 8, 8, 16, 16, 16]), (SINGLE, [16, 16, 16, 16, 8, 8])]
)  # fmt: skip
def test_one_list_of_flux_alone(path, lengths):
    case = CASES['diffusers_flux']
    model = case.randomised()
    routing = apply_tread(model, Route(1, 2, 0.5), **{**case.settings, 'blocks': path})
    seen = Counts(model, case).seen
    case.call(model)
    assert seen == lengths
    assert routing_of(model) is routing
    second = next(part for part in case.lists if part != path)
    with pytest.raises(ValueError, match=rf'{path} is routed already .* several lists of one model together'):
        apply_tread(model, Route(1, 2, 0.5), **{**case.settings, 'blocks': second})


FLUX = CASES['diffusers_flux'].settings
INCOMPLETE = [
    ('diffusers_flux', {}, r"blocks: .* found 'transformer_blocks' .*, 'single_transformer_blocks'"),
    ('diffusers_flux', {**FLUX, 'shared': False}, r"'image_rotary_emb' counts tokens in dimension 0.* shared=True"),
    (
        'diffusers_flux', {**FLUX, 'token_arguments': {ROPE: 0}},
        r"'image_rotary_emb': expected a tensor with 16 tokens in dimension 0",
    ),
    ('diffusers_flux', {**FLUX, 'token_arguments': ()}, r'failed on 8 of 16 tokens'),
    ('diffusers_sd3', {}, r'the blocks return a tuple: say where the tokens are'),
    ('hf_bert', {'tokens_out': 0}, r'named in token_arguments\. Arguments .* 16 entries: .*\(3, 1, 16, 16\)'),
    (
        'hf_bert', {'tokens_out': 0, 'token_arguments': ['attention_mask']},
        r"'attention_mask': expected .* 3 samples x 16 .*'attention_mask': \[-2, -1\]",
    ),
]  # fmt: skip


@pytest.mark.parametrize(('name', 'settings', 'message'), INCOMPLETE)
def test_without_the_settings_each_model_says_what_is_missing(name, settings, message):
    def attempt(model):
        apply_tread(model, Route(1, -2, 0.5), **settings)
        CASES[name].call(model)

    by_settings = 'blocks' in message or 'shared' in message  # known before a call
    with pytest.raises(ValueError if by_settings and 'return' not in message else RoutingError, match=message):
        attempt(CASES[name].randomised())
