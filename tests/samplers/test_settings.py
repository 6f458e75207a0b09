"""``SamplingSettings``: strict, and the same after JSON."""

import json
import math

import pytest

from tread_composer.samplers import SamplingSettings


@pytest.mark.parametrize(
    'settings',
    [
        SamplingSettings(),
        SamplingSettings(sampler='ddim', num_steps=9, sampler_settings={'eta': 0.5}),
        SamplingSettings(guidance='classifier_free', guidance_scale=1.5, guided_channels='first3'),
        SamplingSettings(
            guidance='sparse',
            guidance_scale=2.0,
            guidance_interval=(0.1, 0.7),
            guidance_settings={'rate_schedule': 'cosine'},
        ),
        SamplingSettings(guidance='auto', guidance_scale=2, guidance_settings={'weak_label': 'null'}),
    ],
)
def test_they_survive_json(settings: SamplingSettings) -> None:
    stored = json.loads(json.dumps(settings.to_dict(), allow_nan=False))
    assert SamplingSettings.from_dict(stored) == settings
    assert SamplingSettings.from_dict(stored).to_dict() == stored == settings.to_dict()


def test_what_has_no_effect_is_not_stored() -> None:
    assert set(SamplingSettings().to_dict()) == {
        'sampler', 'num_steps', 'sampler_settings', 'guidance', 'guidance_scale',
    }  # fmt: skip
    assert 'weak_rate' not in SamplingSettings(guidance='auto', guidance_scale=2.0).to_dict()
    assert SamplingSettings(guidance='sparse', guidance_scale=2.0).to_dict()['weak_rate'] == 0.9


@pytest.mark.parametrize(
    ('wrong', 'message'),
    [
        ({'guidance_scale': 2.0}, "guidance is 'none'"),
        ({'guidance': 'classifier_free', 'guidance_scale': -1.0}, 'guidance_scale: -1.0'),
        ({'guidance': 'classifier_free', 'guidance_scale': math.nan}, 'guidance_scale: nan'),
        ({'guidance': 'classifier_free', 'guidance_scale': math.inf}, 'guidance_scale: inf'),
        ({'guidance': 'cfg'}, "guidance: 'cfg' is none of"),
        ({'num_steps': 0}, 'num_steps: 0'),
        ({'num_steps': True}, 'num_steps: True must be a whole number'),
        ({'num_steps': 2.5}, 'num_steps: 2.5 must be a whole number'),
        ({'guidance': 'sparse', 'weak_rate': None}, 'weak_rate: None must be a number'),
        ({'guidance': 'sparse', 'weak_rate': True}, 'weak_rate: True must be a number'),
        ({'guidance': 'sparse', 'weak_label': 'some'}, "weak_label: 'some'; choose of same, null"),
        ({'guidance': 'sparse', 'weak_rate': 1.0}, 'weak_rate: 1.0 must be at least 0 and below 1'),
        ({'guidance': 'classifier_free', 'weak_rate': 0.8}, "weak_rate: 0.8 has no effect .* 'classifier_free'"),
        ({'guidance': 'classifier_free', 'weak_label': 'null'}, 'weak_label'),
        ({'guided_channels': 'first3'}, 'no effect'),
        ({'guidance_interval': (0.1, 0.2)}, 'no effect'),
        ({'guidance': 'auto', 'guidance_interval': (0.3, 0.2)}, 'low <= high'),
        ({'guidance': 'auto', 'guidance_interval': (0.3,)}, 'two times'),
        ({'guidance': 'auto', 'guidance_interval': 3}, r'guidance_interval: \(3,\) must be two times'),
        ({'sampler_settings': {'S_max': math.inf}}, 'S_max=inf'),
        ({'sampler_settings': 3}, 'sampler_settings: 3 must be a mapping'),
        ({'steps': 3}, 'steps: unknown; known are sampler'),
    ],
)
def test_contradictions_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingSettings.from_dict(wrong)


def test_settings_of_the_guidance_are_a_mapping() -> None:
    with pytest.raises(ValueError, match='guidance_settings: None must be a mapping'):
        SamplingSettings(guidance_settings=None)


def test_they_cannot_be_changed_from_outside() -> None:
    given = {'eta': 0.5}
    settings = SamplingSettings(sampler='ddim', sampler_settings=given)
    given['eta'] = 1.0
    assert settings.sampler_settings == {'eta': 0.5}


@pytest.mark.parametrize(
    ('settings', 'guides'),
    [
        (SamplingSettings(guidance='auto', guidance_scale=2.0), True),
        (SamplingSettings(guidance='auto', guidance_scale=1.0), False),
        (SamplingSettings(guidance='auto', guidance_scale=2.0, guidance_interval=(0.4, 0.4)), False),
        (SamplingSettings(), False),
    ],
)
def test_whether_anything_is_guided(settings: SamplingSettings, guides: bool) -> None:
    assert settings.guides == guides
