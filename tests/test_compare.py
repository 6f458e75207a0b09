"""Comparisons on histories made by hand, whose crossings are known, and on MLflow stores and run folders."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Metric

from tests.metrics.small import PROTOCOL
from tests.pages import assert_self_contained, drawings, png
from tests.runs import YAMLS, make_store
from tread_composer.compare.comparison import Value, common_speed_up, compare, speed_up, value_at
from tread_composer.compare.presentation import format_comparison, write_comparison
from tread_composer.compare.runs import Curve, Point, Run, open_run, recorded_seconds, training_teraflops
from tread_composer.config import load_config
from tread_composer.core.errors import UserError
from tread_composer.metrics import METRICS
from tread_composer.metrics.metric import build_metrics


def points(*values: tuple[int, float], flops: float | None = 2.0, seconds: float | None = 0.5) -> tuple[Point, ...]:
    return tuple(
        Point(s, v, None if flops is None else s * flops, None if seconds is None else s * seconds) for s, v in values
    )


def run(name: str, curve: tuple[Point, ...], metric: str = 'fid_10000', protocol=PROTOCOL, **keywords) -> Run:
    return Run(name, f'{name}.json', (Curve(metric, protocol, curve, 'lower'),), **keywords)


# --- arithmetic ---


def test_the_papers_14x_and_37x_come_out_of_its_own_points():
    # methods.md 1.12, read from TREAD's figure 1: A100 hours and FID.
    treads = [(55, 22.3), (73, 16.6), (91, 12.3), (113, 9.7), (146, 7.4), (256, 5.1)]
    tread = tuple(Point(i + 1, fid, seconds=hours) for i, (hours, fid) in enumerate(treads))
    dense = tuple(Point(i + 1, fid, seconds=hours) for i, (hours, fid) in enumerate([(239, 19.47), (1405, 10.67)]))
    found = speed_up(dense, tread, 'lower', 'seconds')
    assert found.reached == pytest.approx(91 + 22 * (12.3 - 10.67) / (12.3 - 9.7))
    assert found.ratio == pytest.approx(13.4, abs=0.05)
    assert found.measured == 113
    longer = (*dense, Point(3, 9.62, seconds=4182))
    assert speed_up(longer, tread, 'lower', 'seconds').ratio == pytest.approx(37, abs=0.5)


def test_speed_up_by_hand_on_every_axis():
    dense = points((100, 40.0), (200, 20.0))
    routed = points((100, 30.0), (200, 10.0), (300, 5.0), flops=1.5, seconds=0.25)
    steps = speed_up(dense, routed, 'lower', 'step')  # 20 lies in the middle of the first two: step 150
    assert (steps.quality, steps.reference, steps.reached, steps.measured) == (20.0, 200, 150.0, 200)
    assert steps.ratio == pytest.approx(200 / 150)
    assert speed_up(dense, routed, 'lower', 'teraflops').ratio == pytest.approx(400 / 225)
    assert speed_up(dense, routed, 'lower', 'seconds').ratio == pytest.approx(100 / 37.5)
    # The best value of the reference counts, not its last; and the first crossing of the other.
    wavy = points((100, 30.0), (200, 10.0), (300, 30.0), (400, 5.0))
    found = speed_up((*dense, *points((300, 25.0))), wavy, 'lower', 'step')
    assert (found.reference, found.reached) == (200, 150)


def test_where_higher_is_better_the_crossing_is_upwards():
    dense, routed = points((100, 0.5), (200, 0.8)), points((100, 0.7), (200, 0.9))
    assert speed_up(dense, routed, 'higher', 'step').reached == pytest.approx(150)
    # Read as a distance the very first point would do: the direction is looked at.
    missed = speed_up(dense, routed, 'lower', 'step')
    assert (missed.ratio, missed.reached, missed.reason) == (None, None, 'not reached')
    quantities = [quantity for metric in build_metrics([*METRICS], {}) for quantity in metric.quantities]
    for better, names in {
        'lower': {'fid', 'sfid', 'kid'},
        'higher': {'inception_score', 'precision', 'recall', 'recognised'},
    }.items():
        assert {quantity.name for quantity in quantities if quantity.better == better} == names


def test_where_the_best_of_the_reference_is_not_reached_the_best_that_both_reach_is_taken():
    dense, routed = points((100, 30.0), (200, 10.0)), points((100, 40.0), (150, 20.0), flops=1.0)
    found = common_speed_up(dense, routed, 'lower', 'step')  # 20: the reference at step 150, the other at its 150
    assert (found.quality, found.ratio) == (20.0, 1.0)
    assert common_speed_up(dense, routed, 'lower', 'teraflops').ratio == pytest.approx(2.0)
    (table,) = compare([run('dense', dense), run('routed', routed)]).tables
    assert table.common(1)['step'] == found
    assert compare([run('a', routed), run('b', dense)]).tables[0].common(1) == {}
    worse = common_speed_up(points((100, 10.0)), points((100, 40.0)), 'lower', 'step')
    assert worse.ratio is None and 'better from its first measurement' in worse.reason


def test_a_first_point_that_is_as_good_gives_a_lower_bound():
    found = speed_up(points((100, 30.0), (200, 20.0)), points((50, 15.0)), 'lower', 'step')
    assert (found.at_least, found.ratio) == (True, 4.0)
    assert not speed_up(points((200, 20.0)), points((50, 30.0), (100, 20.0)), 'lower', 'step').at_least


def test_a_ratio_that_is_not_known_has_a_question_mark_and_its_reason_below_the_table():
    curves = [run('dense', points((100, 3.0))), run('tread', points((100, 4.0)))]
    lines = format_comparison(compare(curves)).splitlines()
    row = next(line for line in lines if 'best of tread' in line)
    assert row.split()[-3:] == ['?', '?', '?'] and len(row) < 120
    assert lines[lines.index(row) + 1] == '?: not known, the reference was better from its first measurement on'
    better = [run('dense', points((100, 4.0))), run('tread', points((100, 3.0)))]
    text = format_comparison(compare(better))
    assert '≥ 1.00x' in text and text.count('≥: as good at its first measurement') == 1


def test_values_between_and_beyond_the_measurements():
    curve = points((100, 40.0), (200, 20.0))
    assert value_at(curve, 'step', 150) == Value(30.0, measured=False)
    assert value_at(curve, 'teraflops', 200.0) == Value(40.0, measured=True)
    assert (value_at(curve, 'step', 99), value_at(curve, 'step', 201)) == ('before its first', 'beyond its last')
    assert value_at(points((1, 2.0), flops=None), 'teraflops', 1) == 'not recorded'


# --- tables ---


def two_runs(**keywords) -> list[Run]:
    dense = run('dense', points((100, 40.0), (200, 20.0)), **keywords)
    routed = run('routed', points((100, 30.0), (200, 10.0), flops=1.5, seconds=None))
    return [dense, routed]


def test_tables_at_equal_cost():
    comparison = compare(two_runs())
    (table,) = comparison.tables
    assert table.rows('step') == [
        (100, [Value(40.0, True), Value(30.0, True)]),
        (200, [Value(20.0, True), Value(10.0, True)]),
    ]
    # At the reference's 200 and 400, and at 300, the most that both have spent.
    (a, first), (b, common), (c, last) = table.rows('teraflops')
    assert (a, b, c) == (200, 300, 400)
    assert first[1] == Value(pytest.approx(30 - 20 / 3), False)
    assert common == [Value(30.0, False), Value(10.0, True)]
    assert last == [Value(20.0, True), 'beyond its last']
    assert [cells[1] for _, cells in table.rows('seconds')] == ['not recorded', 'not recorded']
    # What nobody recorded is not a zero.
    text = format_comparison(compare([run(name, points((100, 2.0), flops=None, seconds=None)) for name in 'ab']))
    assert 'training TFLOPs: not recorded' in text and 'seconds of training: not recorded' in text
    text = format_comparison(comparison)
    assert '1.33x (1.00x at the measurement)' in text and '≈ 30' in text
    assert re.search(r'^routed +best of dense: 20 \(step 200\) +1\.33x .* not recorded$', text, re.MULTILINE)


def test_different_protocols_are_refused_with_what_differs():
    other = {**PROTOCOL, 'sampling': {**PROTOCOL['sampling'], 'num_steps': 40}, 'reference_hash': 'sha256:9'}
    a, b = two_runs()
    b = Run('routed', '', (Curve('fid_10000', other, b.curves[0].points, 'lower'),))
    with pytest.raises(UserError) as refused:
        compare([a, b])
    assert 'dense and routed:' in str(refused.value)
    assert 'sampling.num_steps: 50 and 40' in str(refused.value)
    assert "reference_hash: 'sha256:bb' and 'sha256:9'" in str(refused.value)
    old = {name: value for name, value in PROTOCOL.items() if name not in ('time_grid', 'weak')}
    with pytest.raises(UserError, match='time_grid: unknown for both numbers'):
        compare([run(name, points((100, 40.0)), protocol=old) for name in 'ab'])
    # A run that was measured both ways is compared where it can be.
    both = Run('both', '', (*b.curves, *two_runs()[1].curves))
    assert compare([a, both]).tables[0].protocol == PROTOCOL
    assert compare([a, both]).left_out == ('fid_10000 of both by 1 further protocols, which not every run has',)


def test_runs_of_two_objectives_compare_and_the_grids_are_named():
    flow, shifted = ({**PROTOCOL, 'time_grid': {'objective': 'flow_matching', 'sampling_shift': s}} for s in (1.0, 2.0))
    edm, a = run('edm', points((100, 40.0))), run('a', points((100, 30.0)), protocol=flow)
    both = compare([edm, a])
    assert both.tables[0].protocol['time_grid'] == {'edm': PROTOCOL['time_grid'], 'a': flow['time_grid']}
    assert 'each was sampled on the time grid of its own' in format_comparison(both)
    assert 'time grid of its own' not in format_comparison(compare(two_runs()))
    # Each of two grids of one objective goes with the EDM's, but they do not go with each other.
    b = run('b', points((100, 20.0)), protocol=shifted)
    with pytest.raises(UserError, match=r'a and b:\n +time_grid.sampling_shift: 1.0 and 2.0'):
        compare([edm, a, b])


def test_metrics_are_chosen_by_name_and_a_protocol_that_they_share_is_shown_once(tmp_path):
    a, b = two_runs()
    recall = Curve('recall_10000', PROTOCOL, points((100, 0.5)), 'higher')
    more = [Run(r.name, '', (*r.curves, recall)) for r in (a, b)]
    both = compare(more)
    assert [t.metric for t in both.tables] == ['fid_10000', 'recall_10000']
    assert format_comparison(both).count('protocol of fid_10000, recall_10000: ') == 1
    page = write_comparison(both, tmp_path, 'compare')[2].read_text()
    assert page.count('Protocol of fid_10000, recall_10000') == page.count('>sampling.num_steps<') == 1
    assert [t.metric for t in compare(more, ['recall']).tables] == ['recall_10000']
    with pytest.raises(UserError, match='no run has kid; there are fid_10000, recall_10000'):
        compare(more, ['kid'])
    partly = compare([more[0], b])
    assert [t.metric for t in partly.tables] == ['fid_10000']
    assert partly.left_out == ('recall_10000: not in every run',)
    with pytest.raises(UserError, match='no metric in common'):
        compare([a, run('x', points((1, 1.0)), metric='kid')])


def test_the_files_of_a_comparison(tmp_path):
    runs = two_runs(grid=png(), notes=('<b>a note</b>',), machine='1 ranks on X')
    runs[1] = Run(runs[0].name, '<i>odd</i>', runs[1].curves, machine='1 ranks on Y')  # both are called "dense"
    comparison = compare(runs)
    paths = write_comparison(comparison, tmp_path, "compare 'a b' <c>")
    text = paths[2].read_text()
    page = assert_self_contained(text)
    assert len(drawings(page)) == 3 and len(page.named('img')) == 4
    assert '<b>' not in text and '&lt;i&gt;odd&lt;/i&gt;' in text
    assert 'compare &#39;a b&#39; &lt;c&gt;' in text
    assert 'Seconds do not compare: the runs were on different machines' in text
    assert {'dense (A)', 'dense (B)', '≈ 30', 'beyond its last', 'sampling.num_steps'} <= set(page.cells)
    assert paths[1].read_bytes().startswith(b'\x89PNG')
    stored = json.loads(paths[0].read_text())
    assert stored['metrics'][0]['speed_ups']['dense (B)']['step']['ratio'] == pytest.approx(4 / 3)


# --- where runs come from ---


def entry(batch: int | None, value: float, **keywords) -> dict:
    return {'metric': 'fid_10000', 'value': value, 'protocol': PROTOCOL, 'run': 'dense', 'batch': batch,
            'better': 'lower', 'training': {'teraflops': None, 'seconds': None}, 'source': 'x', **keywords}  # fmt: skip


def test_results_files(tmp_path):
    path = tmp_path / 'results.json'
    entries = [
        entry(200, 9.0), entry(100, 12.0, training={'teraflops': 3.0, 'seconds': None}), entry(200, 8.0),
        entry(None, 1.0), entry(300, float('nan')), entry(100, 1.0, metric='speed', better=None),
    ]  # fmt: skip
    path.write_text(json.dumps(entries))
    found = open_run(str(path))
    (curve,) = found.curves
    assert curve.points == (Point(100, 12.0, 3.0, None), Point(200, 8.0))
    assert found.name == 'dense'
    notes = '\n'.join(found.notes)
    for said in (
        'measured more than once',
        'training step unknown',
        'is nan',
        'speed of x: nobody says which values are better',
    ):
        assert said in notes
    path.write_text(json.dumps([entry(1, 2.0), entry(1, 3.0, run='routed')]))
    with pytest.raises(UserError, match=r'several runs; say which one: .*results.json#dense, .*#routed'):
        open_run(str(path))
    assert open_run(f'{path}#routed').curves[0].points[0].value == 3.0
    path.write_text(json.dumps([entry(1, 2.0), entry(1, 4.0, run=None)]))
    with pytest.raises(UserError, match=r'several runs; say which one: .*results.json#, .*#dense$'):
        open_run(str(path))
    assert open_run(f'{path}#').curves[0].points[0].value == 4.0  # what the message has offered
    # A curve is one whatever the reference is called, and another where the protocol is.
    renamed = {**PROTOCOL, 'autoencoder': '/data/vae', 'reference': {'name': 'copy', 'kind': 'adm'},
               'sampling': {**PROTOCOL['sampling'], 'guidance_scale': 1}}  # fmt: skip
    for protocol, counts in ((renamed, [3]), ({**renamed, 'seed': 1}, [2, 1])):
        path.write_text(json.dumps([entry(100, 9.0), entry(200, 8.0, protocol=protocol), entry(300, 7.0)]))
        assert [len(curve.points) for curve in open_run(str(path)).curves] == counts


def test_files_that_are_no_results(tmp_path):
    path = tmp_path / 'results.json'
    for content, message in {
        '{': 'cannot be read',
        '"text"': 'no list of measured numbers',
        '{}': 'no list of measured numbers',
        '[{"metric": "fid"}]': 'result 0 has no proper value, protocol',
        '[]': 'no results',
    }.items():
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            open_run(str(path))


def write_config(folder: Path, recipe: str, *overrides: str) -> Path:
    (folder / 'config.yaml').write_text(load_config(YAMLS / recipe, overrides).to_yaml())
    return folder


def make_digits_run(root: Path, name: str, recipe: str, values: dict[int, float], **protocol) -> Path:
    """A run folder beside a store, as a training on the digits leaves them."""
    folder = root / 'runs' / name
    folder.mkdir(parents=True)
    write_config(folder, recipe, f'run_name={name}')
    shared = {'protocol': {**PROTOCOL, **protocol}, 'run': name}
    entries = [entry(step, value, metric='fd_digits_500', **shared) for step, value in values.items()]
    entries += [entry(step, 0.5, metric='recognised_digits_500', better='higher', **shared) for step in values]
    (folder / 'results.json').write_text(json.dumps(entries))
    client = MlflowClient(f'sqlite:///{root}/runs/mlflow.db')
    experiment = client.get_experiment_by_name('digits')
    place = (root / 'runs' / 'mlflow_artifacts').as_uri()
    identity = experiment.experiment_id if experiment else client.create_experiment('digits', place)
    made = client.create_run(identity, tags={'run_name': name, 'mlflow.runName': name}).info.run_id
    speeds = [2.0, 4.0, 4.0, 0.5, 5.0]
    client.log_batch(made, [Metric('throughput/batches_per_sec', v, 1, i) for i, v in enumerate(speeds)])
    (folder / 'environment.json').write_text(json.dumps({'gpus': ['Q'], 'world_size': 2}))
    (folder / 'samples').mkdir()
    (folder / 'samples' / 'latest.png').write_bytes(png())
    client.log_artifacts(made, str(folder))
    return folder


@pytest.fixture(scope='module')
def digits_runs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp('digits')
    make_store(root / 'runs')
    make_digits_run(root, 'dense', 'digits.yaml', {100: 40.0, 200: 20.0})
    make_digits_run(root, 'routed', 'digits_tread.yaml', {100: 30.0, 200: 10.0})
    make_digits_run(root, 'guided', 'digits.yaml', {100: 30.0}, seed=2)
    return root


def test_digits_runs_from_their_folders_through_the_command(digits_runs, tmp_path, cli):
    dense, routed, guided = (digits_runs / 'runs' / name for name in ('dense', 'routed', 'guided'))
    printed = cli('compare', dense, routed, '--out', tmp_path, '--metric', 'fd_digits').out
    assert '1.33x (1.00x at the measurement)' in printed
    assert f'written: {tmp_path}/comparison.html' in printed
    (stored,) = json.loads((tmp_path / 'comparison.json').read_text())['metrics']
    dense, routed = (stored['points'][name] for name in ('dense', 'routed'))
    assert [point['seconds'] for point in dense] == [25.0, 50.0]  # 4 steps a second is the middle one
    assert routed[1]['teraflops'] < dense[1]['teraflops']
    ratio = 4 / 3 * dense[0]['teraflops'] / routed[0]['teraflops']
    assert stored['speed_ups']['routed']['teraflops']['ratio'] == pytest.approx(ratio)
    # Another protocol is refused.
    assert 'seed: 0 and 2' in cli.refusal('compare', digits_runs / 'runs' / 'dense', guided, '--out', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_what_lies_beside_the_numbers_of_a_run(digits_runs, tmp_path):
    found = open_run(str(digits_runs / 'runs' / 'routed'))
    assert found.name == 'routed' and found.grid == png() and found.machine == '2 ranks on 1 x Q'
    # Resumed with other settings, it says so.
    client = MlflowClient(f'sqlite:///{digits_runs}/runs/mlflow.db')
    (record,) = client.search_runs([client.get_experiment_by_name('digits').experiment_id], "tags.run_name = 'routed'")
    client.set_tag(record.info.run_id, 'tread_composer.changed_settings', 'max_duration: 1ba -> 2ba')
    assert any('max_duration' in note for note in open_run(found.source).notes)
    # Without its store a run has no seconds, and nothing makes one.
    alone = shutil.copytree(digits_runs / 'runs' / 'routed', tmp_path / 'far' / 'routed')
    (curve, _) = open_run(str(alone)).curves
    assert {point.seconds for point in curve.points} == {None}
    assert any('no MLflow record found (there is no store' in note for note in open_run(str(alone)).notes)
    assert not list(tmp_path.rglob('*.db'))


# --- costs ---


def test_a_run_has_one_clock_whoever_measured_it(digits_runs, tmp_path):
    """A checkpoint that ``evaluate`` measures again has no seconds of its own; those written in training stay."""
    folder = shutil.copytree(digits_runs / 'runs' / 'dense', tmp_path / 'runs' / 'dense')
    shutil.copy(digits_runs / 'runs' / 'mlflow.db', tmp_path / 'runs')
    timed = [entry(step, 9.0, training={'seconds': took}) for step, took in ((100, 400.0), (200, 500.0))]
    again = [entry(step, 9.0, source='checkpoint', training={'seconds': None}) for step in (50, 100, 150)]
    (folder / 'results.json').write_text(json.dumps([*timed, *again]))
    expected = [(50, 200.0), (100, 400.0), (150, 450.0), (200, 500.0)]
    for path in (folder, folder / 'results.json'):
        (curve,) = open_run(str(path)).curves
        assert [(point.step, point.seconds) for point in curve.points] == expected
    # After the last of them the logged speed counts, 4 batches in a second.
    (folder / 'results.json').write_text(json.dumps([*timed, entry(240, 9.0, training=None)]))
    assert open_run(str(folder)).curves[0].points[-1].seconds == pytest.approx(510.0)


def test_flops_follow_the_plan_and_the_window_of_routing(tmp_path):
    dense, _ = training_teraflops(write_config(tmp_path, 'digits.yaml'))
    routed, said = training_teraflops(write_config(tmp_path, 'digits_tread.yaml'))
    assert dense(200) == 2 * dense(100) > 0 and 0.7 < routed(100) / dense(100) < 0.9
    assert 'GMACs x 128 samples' in said
    words = ['max_duration=100ba', "algorithms.tread.start_time='10ba'", "algorithms.tread.end_time='0.92dur'"]
    partly, said = training_teraflops(write_config(tmp_path, 'digits_tread.yaml', *words))
    assert partly(10) == pytest.approx(dense(10))
    assert partly(100) == pytest.approx(dense(18) + routed(82))
    assert 'routed from step 10 to 92' in said
    words = ['load_path=runs/x/latest-rank0.pt', 'load_weights_only=true']
    assert 'without what the weights in runs/x' in training_teraflops(write_config(tmp_path, 'digits.yaml', *words))[1]


def test_flops_that_cannot_be_known_are_not_recorded_and_the_reason_is_said(tmp_path):
    cost, said = training_teraflops(write_config(tmp_path, 'dit_s.yaml', 'data.local=absent'))
    assert cost(1) is not None, said  # the recipe says what its data will be
    path = tmp_path / 'config.yaml'
    tree = yaml.safe_load(path.read_text())
    for name in ('channels', 'latent_size', 'num_classes'):
        tree['data'][name] = None
    path.write_text(yaml.safe_dump(tree))
    cost, said = training_teraflops(tmp_path)
    assert cost(1) is None and 'holds no manifest' in said
    words = ["algorithms.maskdit.unmask_time='0.9dur'"]
    cost, said = training_teraflops(write_config(tmp_path, 'digits_maskdit.yaml', *words))
    assert cost(1) is None and 'unmask_time' in said
    cost, said = recorded_seconds({})
    assert cost(100) is None and 'speed_monitor' in said
    assert recorded_seconds({1: 4.0, 2: 0.5, 3: 5.0, 4: 0.0, 5: float('nan')})[0](100) == 25.0  # by the middle speed


def test_a_metric_of_somebody_else_says_its_direction_in_the_file(tmp_path):
    for name, values in (('dense', (0.2, 0.5)), ('routed', (0.4, 0.9))):
        entries = [entry(100 * (i + 1), v, metric='acme', better='higher', run=name) for i, v in enumerate(values)]
        (tmp_path / f'{name}.json').write_text(json.dumps(entries))
    (table,) = compare([open_run(str(tmp_path / f'{name}.json')) for name in ('dense', 'routed')]).tables
    assert table.better == 'higher'
    assert table.speed_ups(1)['step'].reached == pytest.approx(120)  # 0.5 lies between 0.4 and 0.9
