"""``benchmarks/trainer_step.py`` on the digits: what a Trainer adds, as a sum of intervals."""

import json

import pytest
import trainer_step
from measuring import Timeline

TINY = ['model.preset=null', 'model.patch_size=2', 'model.hidden_size=32', 'model.depth=6', 'model.num_heads=2']


@pytest.mark.parametrize(
    ('recipe', 'clips'),
    [
        (['yamls/digits_tread.yaml'], True),
        (['yamls/dit_b_tread.yaml', *TINY, 'data.latent_size=8', 'data.num_workers=0', 'precision=fp32'], False),
    ],
)
def test_each_moment_of_a_batch_belongs_to_somebody(capsys, recipe, clips):
    words = [*recipe, '--device', 'cpu', '--batch-size', '8', '--batches', '4', '--warm-up', '2']
    assert trainer_step.main(words) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{')]
    shares = next(row for row in rows if row['measurement'] == 'shares')
    parts, added = shares['seconds_of_a_step'], shares['added_by']
    assert {'network', 'Tread'} == {*parts} - {*added}
    assert {'KeyedDraws', 'UpdateGuard', 'EMA', 'Trainer', 'data'} <= {*added}
    assert ('GradientClipping' in added) == clips
    assert min(parts.values()) > 0 and max(parts, key=parts.get) == 'network'
    assert shares['added'] == pytest.approx(sum(added.values()))
    assert sum(added.values()) == pytest.approx(
        sum(parts[name] for name in added) / (parts['network'] + parts['Tread'])
    )


class Steps:
    """A clock that counts its marks."""

    now = 0

    def mark(self):
        self.now += 1
        return self.now

    def settle(self):
        pass

    def seconds(self, begin, end):
        return end - begin


class Work:
    def outer(self):
        self.inner()

    def inner(self):
        pass


def test_a_moment_belongs_to_the_innermost_call():
    timeline, work = Timeline(Steps()), Work()
    timeline.enter('before')  # nobody watches yet
    timeline.leave()
    with timeline.watching((work, 'outer', 'outer'), (work, 'inner', 'inner')):
        work.outer()
        timeline.enter('by hand')
        timeline.leave()
    work.outer()
    assert timeline.seconds() == {'rest': 3, 'outer': 2, 'inner': 1, 'by hand': 1}
    assert timeline.calls == {'outer': 1, 'inner': 1, 'by hand': 1}
    assert not timeline.seconds()
