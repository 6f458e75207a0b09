import pytest

from tread_composer.routing import Route, check_routes


@pytest.mark.parametrize(
    ('depth', 'span'), [(12, (2, 8)), (24, (2, 20)), (28, (2, 24)), (16, (2, 12)), (34, (2, 30)), (8, (2, 4))]
)
def test_the_default_route_is_the_authors(depth, span):
    assert Route().span(depth) == span  # methods.md 1.4


def test_ends_are_inclusive_and_may_count_from_either_side():
    assert Route(0, -1).span(6) == Route(-6, 5).span(6) == (0, 5)
    assert Route(3, 3).span(6) == (3, 3)


@pytest.mark.parametrize(('start', 'end'), [(2, -4), (5, 5), (-6, 0), (3, 2)])
def test_a_route_outside_of_the_model_is_refused_with_the_rule(start, end):
    with pytest.raises(ValueError, match=r'does not fit 5 blocks: it would run .* 0 <= start <= end <= 4'):
        Route(start, end).span(5)


@pytest.mark.parametrize(
    ('arguments', 'name'),
    [
        ({'selection_rate': 1.0}, 'selection_rate'),
        ({'selection_rate': -0.1}, 'selection_rate'),
        ({'selection_rate': '0.5'}, 'selection_rate'),
        ({'selection_rate': float('nan')}, 'selection_rate'),
        ({'start': 2.0}, 'start'),
        ({'end': True}, 'end'),
    ],
)
def test_wrong_values_are_refused_by_name(arguments, name):
    with pytest.raises(ValueError, match=f'^{name}: '):
        Route(**arguments)


def test_several_routes_must_be_disjoint_and_in_order():
    assert check_routes([Route(1, 2), Route(3, 4)], 6) == [(1, 2), (3, 4)]
    for wrong in ([Route(1, 3), Route(3, 4)], [Route(3, 4), Route(1, 2)]):
        with pytest.raises(ValueError, match='overlap or are out of order'):
            check_routes(wrong, 6)
    with pytest.raises(ValueError, match='at least one Route'):
        check_routes([], 6)
