import pytest
import torch

from tread_composer.routing import Route, keep_lowest, put_back, sample_kept, take_kept

# Tokens, always kept, selection rate, kept: those of the paper (methods.md 1.2), then with tokens that are always kept.
COUNTS = [
    (256, 0, 0.25, 192), (256, 0, 0.5, 128), (256, 0, 0.75, 64), (256, 0, 0.3, 180), (256, 0, 0.7, 77),
    (256, 0, 0.9, 26), (1024, 0, 0.25, 768), (1024, 0, 0.5, 512), (1024, 0, 0.75, 256), (16, 0, 0.0, 16),
    (1, 0, 0.9, 1), (16, 0, 0.5, 8),
    (257, 1, 0.5, 129), (17, 1, 0.5, 9), (18, 3, 0.5, 11), (333, 77, 0.75, 141), (5, 5, 0.9, 5),
]  # fmt: skip


@pytest.mark.parametrize(('num_tokens', 'always_keep', 'rate', 'kept'), COUNTS)
def test_kept_counts_are_those_of_the_paper_and_what_is_always_kept_comes_on_top(num_tokens, always_keep, rate, kept):
    ids_BK = sample_kept(50, num_tokens, rate, always_keep=always_keep)
    assert ids_BK.shape == (50, kept) == (50, Route(selection_rate=rate).num_kept(num_tokens, always_keep))
    assert (ids_BK[:, :always_keep] == torch.arange(always_keep)).all()
    assert (ids_BK.diff(dim=1) > 0).all() and ids_BK.max() < num_tokens
    if 0 < always_keep < num_tokens:
        assert ids_BK[:, always_keep:].unique().tolist() == list(range(always_keep, num_tokens))


def test_every_token_is_kept_equally_often_and_samples_differ():
    kept_BK = sample_kept(8000, 16, 0.75, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(kept_BK.flatten(), minlength=16)
    assert len({tuple(row) for row in kept_BK.tolist()}) > 1000
    assert torch.allclose(counts / 8000, torch.full((16,), 0.25), atol=0.02)


def test_a_generator_decides_and_the_global_one_is_left_alone():
    before = torch.get_rng_state()
    first, again = (sample_kept(4, 16, 0.5, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(before, torch.get_rng_state())


def test_take_and_put_back_equal_a_loop():
    x_BND, processed_BKD = torch.randn(3, 7, 5), torch.randn(3, 4, 5)
    kept_BK = sample_kept(3, 7, 0.5)
    taken, restored = take_kept(x_BND, kept_BK), put_back(x_BND, processed_BKD, kept_BK)
    for b in range(3):
        expected = x_BND[b].clone()
        for k, n in enumerate(kept_BK[b].tolist()):
            assert torch.equal(taken[b, k], x_BND[b, n])
            expected[n] = processed_BKD[b, k]
        assert torch.equal(restored[b], expected)


def test_put_back_of_what_was_taken_changes_nothing_and_leaves_the_input_alone():
    x_BND = torch.randn(2, 9, 3)
    copy, kept_BK = x_BND.clone(), sample_kept(2, 9, 0.4)
    assert torch.equal(put_back(x_BND, take_kept(x_BND, kept_BK), kept_BK), x_BND)
    put_back(x_BND, torch.zeros(2, kept_BK.shape[1], 3), kept_BK)
    assert torch.equal(x_BND, copy)


@pytest.mark.parametrize('full', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('processed', [torch.float32, torch.bfloat16])
def test_put_back_promotes_to_the_wider_dtype(full, processed):
    x_BND, kept_BK = torch.randn(2, 4, 3).to(full), torch.tensor([[0, 1], [2, 3]])
    out = put_back(x_BND, torch.ones(2, 2, 3, dtype=processed), kept_BK)
    assert out.dtype == torch.promote_types(full, processed)
    assert torch.equal(out[0, 2:], x_BND[0, 2:].to(out.dtype)) and (out[0, :2] == 1).all()


def test_tokens_with_further_dimensions_and_with_none():
    kept_BK = torch.tensor([[0, 2], [1, 2]])
    assert take_kept(torch.randn(2, 3, 4, 5), kept_BK).shape == (2, 2, 4, 5)
    assert torch.equal(take_kept(torch.arange(6).view(2, 3), kept_BK), torch.tensor([[0, 2], [4, 5]]))


@pytest.mark.parametrize(
    ('num_kept', 'always_keep', 'message'),
    [
        (0, 0, 'cannot keep 0 of 8 tokens; keep between 1 and all'),
        (9, 0, 'cannot keep 9 of 8'),
        (3, 4, 'cannot keep 3 of 8 tokens; keep between 4 and all'),
    ],
)
def test_an_impossible_count_is_refused(num_kept, always_keep, message):
    with pytest.raises(ValueError, match=message):
        keep_lowest(torch.rand(2, 8), num_kept, always_keep=always_keep)
    with pytest.raises(ValueError, match='always_keep: 17 tokens cannot stay in a sequence of 16'):
        sample_kept(2, 16, 0.5, always_keep=17)
