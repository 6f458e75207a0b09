"""Which route is proposed for a depth, a model and a map, and why."""

import pytest
import torch
from torch import nn

from tests.helpers import tiny_dit
from tread_composer.advisor import placement
from tread_composer.advisor.placement import candidate_spans, propose_route, recommended_route
from tread_composer.routing import Route, apply_tread

AUTHORS = [(8, 'authors', (2, 4)), (12, 'authors', (2, 8)), (24, 'authors', (2, 20)), (28, 'authors', (2, 24))]
SCALED = [(3, 'scaled', (1, 1)), (4, 'scaled', (1, 2)), (6, 'scaled', (1, 3))]


@pytest.mark.parametrize(('depth', 'rule', 'span'), [(2, 'none', None), *SCALED, *AUTHORS])
def test_the_route_of_a_depth(depth, rule, span):
    found = recommended_route(depth)
    assert found.rule == rule
    assert (found.route and found.route.span(depth)) == span
    if span is None:
        assert candidate_spans(depth) == [] and 'train densely' in found.reasons[0]
        return
    assert found.route.selection_rate == 0.5
    assert ("not the authors'" in found.reasons[0]) == (rule == 'scaled')
    assert span in candidate_spans(depth)


def test_candidates_keep_to_the_guidelines():
    spans = candidate_spans(12)
    assert min(start for start, _ in spans) == 1 and max(end for _, end in spans) == 8
    assert (5, 8) in spans and (6, 8) not in spans and len(set(spans)) == len(spans) == 15


def test_routes_are_ranked_by_similarity_times_length():
    similarity = torch.eye(9, dtype=torch.float64)
    similarity[1, 5], similarity[2, 5], similarity[1, 4], similarity[0, 8] = 0.5, 0.9, 0.6, 1.0
    ranked = placement.rank_routes(similarity)
    assert [(one.start, one.end) for one in ranked[:3]] == [(2, 4), (1, 4), (1, 3)]
    assert [one.score for one in ranked[:3]] == pytest.approx([0.9 * 3 / 8, 0.5 * 4 / 8, 0.6 * 3 / 8])
    assert len(ranked) == len(candidate_spans(8))


def test_a_route_is_read_off_its_row():
    similarity = torch.full((6, 6), 0.4, dtype=torch.float64).fill_diagonal_(1.0)
    similarity[1, 2:5] = torch.tensor([0.9, 0.7, 0.8])
    found = placement.read_route(similarity, 1, 3)
    figures = {'ends': 0.8, 'outputs_mean': 0.8, 'outputs_lowest': 0.7, 'all_pairs': (0.4 * 27 + 2.4) / 30}
    assert found == pytest.approx({'start': 1, 'end': 3, **figures})


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.mix = nn.Linear(width, width)

    def forward(self, hidden):
        raise AssertionError('advice runs nothing')


def test_an_unknown_model_gets_a_route_and_its_reasons():
    model = nn.Module()
    model.first, model.second = (nn.ModuleList(Block() for _ in range(depth)) for depth in (12, 4))
    with pytest.raises(ValueError, match=r"'first' \(12 blocks\), 'second' \(4 blocks\)"):
        propose_route(model)
    advice = propose_route(model, 'first')
    assert advice.arguments == {'start': 2, 'end': -4, 'selection_rate': 0.5, 'blocks': 'first'}
    assert (advice.depth, advice.route, advice.rule) == (12, Route(2, -4, 0.5), 'authors')
    text = ' '.join(placement.format_advice(advice).split())
    assert 'blocks 2 to 8 of 0 to 11' in text and "because the authors' rule" in text
    assert propose_route(model, 'second').rule == 'scaled'


def test_a_model_on_the_meta_device_and_one_that_is_routed():
    with torch.device('meta'):
        model = tiny_dit(depth=8).to('meta')
    assert propose_route(model).arguments == {'start': 2, 'end': -4, 'selection_rate': 0.5}
    apply_tread(model, Route(1, 2, 0.5))
    assert any('routed already (blocks 1 to 2)' in reason for reason in propose_route(model).reasons)
