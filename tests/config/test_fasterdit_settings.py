"""The settings of FasterDiT, SD3's times and min-SNR: what they build, and what is refused in which words."""

import pytest

from tread_composer.config import load_config
from tread_composer.objectives import CosMap, FlowMatching, LogitNormal, MinSNR, Mode, Uniform

FLOW = 'objective={name: flow_matching, time_distribution: '


@pytest.mark.parametrize(
    ('override', 'objective'),
    [
        (FLOW + '{name: uniform}}', FlowMatching(Uniform())),
        (FLOW + '{name: logit_normal, mean: -1.2, std: 1.2}}', FlowMatching(LogitNormal(-1.2, 1.2))),
        (FLOW + '{name: mode, scale: 0.8}}', FlowMatching(Mode(0.8))),
        (FLOW + '{name: mode}}', FlowMatching(Mode(1.29))),
        (FLOW + '{name: cosmap}, time_shift: 3.0}', FlowMatching(CosMap(), time_shift=3.0)),
        ('objective.sampling_shift=0.5', FlowMatching(sampling_shift=0.5)),
        ('objective.weighting={name: min_snr}', FlowMatching(weighting=MinSNR(5.0))),
        ('objective.weighting={name: min_snr, gamma: 2.0}', FlowMatching(weighting=MinSNR(2.0))),
        (
            'objective={direction_weight: 1.0, direction_patch: 2}',
            FlowMatching(direction_weight=1.0, direction_patch=2),
        ),
    ],
)
def test_a_setting_builds_its_class_and_survives_the_resolved_file(base, write, override, objective):
    config = load_config(base, [override])
    assert config.objective.instance == objective
    assert load_config(write('again.yaml', config.to_yaml())) == config


@pytest.mark.parametrize(
    ('override', 'part'),
    [
        ('objective.time_distribution={name: mode, scale: 1.8}', 'objective.time_distribution.scale: 1.8 is not less'),
        ('objective.time_distribution={name: mode, std: 1.0}', "std: belongs to 'logit_normal', not to 'mode'"),
        ('objective.time_distribution={name: cosmos}', "'cosmos' is unknown. Did you mean 'cosmap'?"),
        ('objective.time_shift=0.0', 'objective.time_shift: 0.0 is not greater than 0'),
        ('objective.sampling_shift=-1.0', 'objective.sampling_shift: -1.0 is not greater than 0'),
        ('objective.weighting={name: min_snr, gamma: 0.0}', 'objective.weighting.gamma: 0.0 is not greater than 0'),
        ('objective.weighting={name: p2}', "objective.weighting.name: 'p2' is unknown."),
        ('objective.direction_weight=-1.0', 'objective.direction_weight: -1.0 is not greater than or equal to 0'),
        ('objective.direction_patch=0', 'objective.direction_patch: 0 is not greater than or equal to 1'),
        ('objective={name: edm, direction_weight: 1.0}', "direction_weight: belongs to 'flow_matching', not to 'edm'"),
        ('algorithms.direction_schedule={end_time: 2ba}', 'objective.direction_weight is 0; set it'),
        ('algorithms.direction_schedule={}', 'DirectionSchedule refuses these arguments: give start_time, end_time'),
        ('algorithms.direction_schedule={end_time: 3}', 'direction_schedule.end_time: a bare number has no unit'),
        ('latent_normalization={name: per_channel, std: 0.0}', 'latent_normalization.std: 0.0 is not greater than 0'),
        ('latent_normalization={name: whitening}', "latent_normalization.name: 'whitening' is unknown."),
    ],
)
def test_refused(message, override, part):
    assert part in message(override)


def test_a_window_for_an_objective_without_the_loss(message):
    text = message('algorithms.direction_schedule={end_time: 2ba}', 'objective={name: edm}')
    assert "algorithms.direction_schedule: opens and closes the velocity-direction loss, and objective 'edm'" in text


def test_numbers_beside_the_normalization_contradict_it(base, message):
    normalization = 'latent_normalization={name: per_channel}'
    text = message(normalization, 'latent_scale=0.18215', 'latent_shift=[0.5]')
    assert 'latent_scale: 0.18215: latent_normalization decides that; remove one of the two' in text
    assert 'latent_shift: [0.5]: latent_normalization decides that' in text
    assert load_config(base, [normalization, 'latent_scale=1.0', 'latent_shift=0.0']).latent_normalization.std == 1


def test_normalization_becomes_numbers(base, write):
    config = load_config(base, ['latent_normalization={name: per_channel, std: 0.7}'])
    assert load_config(write('again.yaml', config.to_yaml())) == config
    resolved = config.normalized(mean=[-1.25, 4.0], std=[3.0, 0.5])
    assert resolved.latent_scale == [pytest.approx(0.7 / 3, rel=1e-5), 1.4] and resolved.latent_shift == [-1.25, 4.0]
    assert 'latent_normalization' not in resolved.to_dict()
    assert load_config(write('resolved.yaml', resolved.to_yaml())).to_dict() == resolved.to_dict()
    assert resolved.normalized(mean=[9.0, 9.0], std=[9.0, 9.0]) is resolved
    # The last bits of statistics differ between machines; the runs must not.
    assert config.normalized(mean=[-1.25 * (1 + 1e-12), 4.0], std=[3.0 * (1 + 1e-12), 0.5]) == resolved
