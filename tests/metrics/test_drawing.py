"""How images are drawn, as protocols have it: what must be in there, and for whom it is unknown."""

import pytest

from tests.helpers import tiny_dit, tiny_model
from tests.metrics.small import PROTOCOL
from tread_composer.autoencoders import Pixels
from tread_composer.latent_diffusion import LatentDiffusion
from tread_composer.metrics.drawing import Draws, drawing_facts, time_grid
from tread_composer.metrics.protocol import UNKNOWN, Protocol, differences
from tread_composer.objectives import DDPM, EDM, FlowMatching
from tread_composer.routing import Route
from tread_composer.samplers import SamplingSettings

SETTINGS = SamplingSettings(num_steps=4)


class Encoded(Pixels):
    """Stands for an autoencoder with weights: its latents are the pixels."""

    path = 'some/vae'

    def weight_hash(self):
        return 'sha256:aa'


def facts(model, settings=SETTINGS, **how):
    return drawing_facts(model, settings, Draws.in_turn(20, model.num_classes, 0), **{'weights': 'ema', **how})


def protocol(model, **how):
    rest = ('num_samples', 'reference', 'reference_hash', 'features', 'resolution')
    return Protocol(**facts(model, **how), **{key: PROTOCOL[key] for key in rest}).to_dict()


def model_of(objective, num_classes=10, autoencoder=None):
    settings = {'latent_shape': (1, 8, 8), 'num_classes': num_classes, 'autoencoder': autoencoder}
    return LatentDiffusion(tiny_dit(num_classes=num_classes), objective, **settings)


@pytest.mark.parametrize(
    ('one', 'other', 'line'),
    [
        (FlowMatching(), FlowMatching(sampling_shift=2.0), 'time_grid.sampling_shift: 1.0 and 2.0'),
        (EDM(), EDM(sigma_min=0.01), 'time_grid.sigma_min: 0.002 and 0.01'),
        (EDM(), EDM(sigma_max=70.0), 'time_grid.sigma_max: 80.0 and 70.0'),
        (EDM(), EDM(rho=5.0), 'time_grid.rho: 7.0 and 5.0'),
        (DDPM(), DDPM(beta_end=0.03), 'time_grid.beta_end: 0.02 and 0.03'),
        (DDPM(), DDPM(num_timesteps=500), 'time_grid.num_timesteps: 1000 and 500'),
        (DDPM(), DDPM(schedule='cosine'), "time_grid.schedule: 'linear' and 'cosine'"),
    ],
)
def test_another_time_grid_is_another_protocol(one, other, line):
    assert line in differences(protocol(model_of(one)), protocol(model_of(other)))
    assert differences(protocol(model_of(one)), protocol(model_of(one))) == []


def test_what_is_trained_otherwise_and_sampled_alike_compares():
    assert differences(protocol(model_of(EDM())), protocol(model_of(EDM(P_mean=-0.4)))) == []
    # Grids in t and in noise levels cannot be equal; which objective it is belongs to the model.
    assert differences(protocol(model_of(EDM())), protocol(model_of(FlowMatching()))) == []


def test_numbers_of_samplers_that_end_otherwise_do_not_compare():
    """Before 0.2 the last step of heun was Euler's in flow matching too; in other equations nothing has changed."""
    heun, euler = (SamplingSettings(sampler=name, num_steps=4) for name in ('heun', 'euler'))
    before = protocol(model_of(FlowMatching()), settings=heun)
    assert before['time_grid'].pop('corrected_at_zero') is True
    found = differences(before, protocol(model_of(FlowMatching()), settings=heun))
    assert found == ["time_grid.corrected_at_zero: 'absent' and True"]
    unchanged = [(FlowMatching(), euler), (EDM(), heun), (EDM(), SamplingSettings(sampler='edm_heun')), (DDPM(), heun)]
    for objective, settings in unchanged:
        plain = {'objective': objective.name, **objective.time_grid()}
        assert facts(model_of(objective), settings)['time_grid'] == plain


def test_of_a_foreign_objective_the_grid_is_unknown():
    assert time_grid(object(), 'heun') == UNKNOWN == time_grid(None, 'heun')


def test_the_second_network_and_the_routes_count():
    weak = protocol(tiny_model(), weak=('ema', 'sha256:1'))
    assert differences(protocol(tiny_model()), weak) == ["weak: 'none' and 'ema sha256:1'"]
    assert differences(weak, protocol(tiny_model(), weak=('raw', 'sha256:1'))) != []
    sparse = SamplingSettings(guidance='sparse', guidance_scale=2.0)
    found = facts(tiny_model(), sparse, routes=[Route(1, 3, 0.5)])
    assert found['sampling']['routes'] == [[1, 3]]
    assert 'routes' not in facts(tiny_model(), routes=[Route(1, 3, 0.5)])['sampling']


def test_labels_and_autoencoders():
    assert facts(model_of(FlowMatching(), num_classes=0))['labels'] == 'none'
    assert facts(model_of(FlowMatching()))['labels'] == 'balanced'
    plain, encoded = (facts(model_of(FlowMatching(), autoencoder=one)) for one in (Pixels(), Encoded()))
    assert (plain['autoencoder'], plain['autoencoder_hash']) == ('pixels', None)
    assert (encoded['autoencoder'], encoded['autoencoder_hash']) == ('some/vae', 'sha256:aa')


def test_labels_and_seeds():
    balanced, random = (rule(1000, 4, 1) for rule in (Draws.in_turn, Draws.at_random))
    assert balanced.labels[:5] == (0, 1, 2, 3, 0) and balanced.rule == 'balanced' and balanced.seed(5) == 6
    assert (Draws.in_turn(10, 4, 0).rule, Draws.at_random(3, 0, 0)) == ('in turn', Draws((0, 0, 0), 0, 'none'))
    assert set(random.labels) == {0, 1, 2, 3} and random.rule == 'random'
    assert random == Draws.at_random(1000, 4, 1) != Draws.at_random(1000, 4, 2)
    grid = Draws((7, 7, 8, 8), 3, 'classes', columns=2)
    assert [grid.of(indices) for indices in ([0, 1, 2], [3])] == [([7, 7, 8], [3, 4, 3]), ([8], [4])]
