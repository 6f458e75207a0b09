"""Pages: well-formed, self-contained, escaped."""

import re
from xml.etree import ElementTree

import pytest

from tests.pages import Page, assert_self_contained, drawings, lines_of, png
from tread_composer.core.errors import UserError
from tread_composer.io.chart import Chart, Curve
from tread_composer.io.page import Report

EVIL = '<script>alert("x")</script> & \'quoted\' "twice"'


def full_page(text: str = 'plain') -> Report:
    chart = Chart(text, text, [Curve(text, [(1, 100.0), (2, 1.0)], 0, 1), Curve(text, [(1, 5.0)], 1)], 2.0, text)
    page = Report(text, text).heading(text).text(text).tiles([(text, text)]).facts({text: {text: text}})
    return page.table([text, text], [[text, text]], [(0, 1)]).charts([chart]).pictures([(text, png())]).command(text)


def test_a_page_is_well_formed_self_contained_and_fit_for_a_phone():
    text = full_page().html()
    page = assert_self_contained(text)
    assert {'name': 'viewport', 'content': 'width=device-width, initial-scale=1'} in page.named('meta')
    assert '@media (prefers-color-scheme: dark)' in text
    assert page.named('img')[1]['src'].startswith('data:image/png;base64,iVBOR')
    scrolling = [index for index, (name, a) in enumerate(page.tags) if name == 'div' and a.get('class') == 'scroll']
    assert [page.tags[index + 1][0] for index in scrolling] == ['table', 'table']  # every table is in one


def test_all_text_is_escaped():
    text = full_page(EVIL).html()
    page = assert_self_contained(text)
    assert '<script' not in text
    assert EVIL in page.cells and f'{EVIL}.{EVIL}' in page.cells
    assert [image['alt'] for image in page.named('img')] == [f'{EVIL} against {EVIL}', EVIL]
    (chart,) = drawings(page)
    texts = [element.text for element in ElementTree.fromstring(chart).iter() if element.tag.endswith('}text')]
    assert texts.count(EVIL) == 5  # both axes, two curves, the level


def test_the_best_cell_is_marked_nested_settings_are_flat_and_an_impossible_place_is_refused(tmp_path):
    page = Page(Report('t').table(['a', 'b'], [['1', '2'], ['3', '4']], [(1, 0)]).html())
    assert [a.get('class') for a in page.named('td')] == [None, None, 'best', None]
    page = Page(Report('t').facts({'sampling': {'sampler': 'heun', 'interval': None}, 'seed': 0, 'empty': {}}).html())
    assert page.cells == ['sampling.sampler', 'heun', 'sampling.interval', 'none', 'seed', '0', 'empty', 'none']
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot be written'):
        Report('t').write(tmp_path / 'file' / 'page.html')


def heights(chart: Chart) -> list[float]:
    (points,) = lines_of(chart.svg())
    return [y for _, y in points]


def test_a_chart_has_equal_values_at_equal_heights_and_goes_up():
    a, b, c = heights(Chart('x', 'y', [Curve('c', [(0, 1.0), (1, 2.0), (2, 3.0)])]))
    assert a - b == pytest.approx(b - c, abs=0.11) and a > c
    # Over a factor of 20 the axis is logarithmic: equal factors are equal heights.
    a, b, c = heights(Chart('x', 'y', [Curve('c', [(0, 1.0), (1, 10.0), (2, 100.0)])]))
    assert a - b == pytest.approx(b - c, abs=0.11)
    # With a zero there is no logarithm.
    a, b, c = heights(Chart('x', 'y', [Curve('c', [(0, 0.0), (1, 10.0), (2, 100.0)])]))
    assert (b - c) == pytest.approx(9 * (a - b), rel=0.05)


@pytest.mark.parametrize('points', [[(5, 3.0)], [(0, 0.0)], [(1, 2.0), (2, 2.0)], [(1, -2.0), (1e9, 1e-12)]])
def test_charts_of_awkward_numbers_are_drawn_inside_their_frame(points):
    svg = Chart('x', 'y', [Curve('c', points)], level=points[0][1]).svg()
    width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', svg).groups())
    places = re.findall(r'<use xlink:href="#\w+" x="([^"]*)" y="([^"]*)" style="fill: var\(--c0\)', svg)
    assert len(set(places)) >= len(points)
    for x, y in places:
        assert 0 <= float(x) <= width and 0 <= float(y) <= height


def test_every_colour_of_a_chart_has_a_value_for_dark_pages():
    chart = Chart('x', 'y', [Curve(str(i), [(0, i), (1, i + 1)], i, 0) for i in range(7)], 2.0, 'level')
    drawing, style = re.sub(r'<style>.*?</style>', '', chart.svg()), re.search(r'<style>(.*?)</style>', chart.svg())[1]
    assert not re.search(r'(fill|stroke): #', drawing)
    light, dark = style.split('@media (prefers-color-scheme: dark)')
    for name in set(re.findall(r'var\(--(\w+)\)', drawing)):
        assert f'--{name}: #' in light and f'--{name}: #' in dark


@pytest.mark.parametrize('name', ['_hidden', '$x_1$', 'ünïcode ψ'])
def test_names_of_curves_are_written_as_they_are(name):
    assert name in Chart('x', 'y', [Curve(name, [(0, 1.0)])]).svg()
