"""Every kind of guidance through ``LatentDiffusion.draw``: labels matter, batches do not, scale 1 is no guidance."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.helpers import Lengths, randomised, tiny_dit
from tread_composer.latent_diffusion import LatentDiffusion
from tread_composer.models import DiT
from tread_composer.objectives import DDPM, EDM, FlowMatching
from tread_composer.routing import Route, apply_tread, routing_of
from tread_composer.samplers import SamplingCost, SamplingSettings, guidance_cost

ROUTE = Route(1, -2, 0.5)
LABELS, SEEDS = [0, 1, 2, 3, 4, 5, 6], [7, 7, 8, 9, 10, 11, 12]

MODES = {
    'none': {},
    'classifier_free': {'guidance': 'classifier_free', 'guidance_scale': 3.0},
    'auto': {'guidance': 'auto', 'guidance_scale': 2.0},
    'auto and null': {'guidance': 'auto', 'guidance_scale': 2.0, 'weak_label': 'null'},
    'sparse': {'guidance': 'sparse', 'guidance_scale': 2.0},
    'sparse and null': {'guidance': 'sparse', 'guidance_scale': 2.0, 'weak_label': 'null'},
    'sparse and auto': {'guidance': 'sparse', 'guidance_scale': 2.0, 'rate_schedule': 'cosine'},
    'interval': {'guidance': 'classifier_free', 'guidance_scale': 3.0, 'guidance_interval': (0.2, 0.8)},
}
SECOND = ('auto', 'auto and null', 'sparse and auto')
CHAIN = [('ddpm', {}), ('ddim', {'eta': 0.8}), ('ddim', {}), ('heun', {})]


def network(channels: int = 1, seed: int = 0, **more) -> DiT:
    sizes = {'patch_size': 2, 'hidden_size': 16, 'depth': 6, 'num_heads': 2, **more}
    with torch.random.fork_rng(devices=[]):  # what is drawn for a fresh network is not drawn for an image
        return randomised(DiT(latent_size=8, in_channels=channels, num_classes=10, **sizes), seed)


def model(channels: int = 1, objective=None, routed: bool = True) -> LatentDiffusion:
    objective = objective or FlowMatching()
    denoiser = network(channels, learn_sigma=objective.learned_variance)
    if routed:
        apply_tread(denoiser, ROUTE)
    return LatentDiffusion(denoiser, objective, latent_shape=(channels, 8, 8), num_classes=10)


def second() -> torch.nn.Module:
    weak = network(seed=3)
    apply_tread(weak, ROUTE)
    return weak


def settings_of(mode: str, **more) -> SamplingSettings:
    return SamplingSettings.from_dict({'num_steps': 5, 'sampler': 'euler', **MODES[mode], **more})


def draw(mode: str, labels=LABELS, seeds=SEEDS, batch_size: int = 16, made=None, **more) -> Tensor:
    weak = second() if mode in SECOND else None
    return (made or model()).draw(labels, seeds, settings_of(mode, **more), weak=weak, batch_size=batch_size)


BASIC = ('none', 'classifier_free')
CASES = [
    *((mode, FlowMatching(), {}, 1e-5) for mode in MODES),
    *((mode, objective, {'sampler': 'heun'}, 1e-5) for objective in (FlowMatching(), EDM()) for mode in BASIC),
    *(
        (mode, DDPM(), {'sampler': sampler, 'sampler_settings': settings, 'num_steps': 6}, 1e-3)
        for mode in BASIC
        for sampler, settings in CHAIN
    ),
]


@pytest.mark.parametrize(('mode', 'objective', 'more', 'tolerance'), CASES)
def test_an_image_depends_on_its_label_and_seed_alone(mode: str, objective, more: dict, tolerance: float) -> None:
    more, state = {'made': model(objective=objective), **more}, torch.get_rng_state()
    whole = draw(mode, **more)
    assert torch.equal(torch.get_rng_state(), state) and more['made'].training
    for batch_size in (1, 3):
        torch.testing.assert_close(draw(mode, batch_size=batch_size, **more), whole, rtol=0, atol=tolerance)
    back = draw(mode, LABELS[::-1], SEEDS[::-1], **more)
    torch.testing.assert_close(back.flip(0), whole, rtol=0, atol=tolerance)
    for changed in ({'labels': [label + 1 for label in LABELS]}, {'seeds': [seed + 1 for seed in SEEDS]}):
        assert ((draw(mode, **changed, **more) - whole).abs().amax(dim=(1, 2, 3)) > 100 * tolerance).all()


@pytest.mark.parametrize('mode', [mode for mode in MODES if mode != 'none'])
def test_scale_one_and_an_empty_interval_are_no_guidance_to_the_bit(mode: str) -> None:
    plain = draw('none')
    assert torch.equal(draw(mode, guidance_scale=1.0), plain)
    assert torch.equal(draw(mode, guidance_interval=(0.5, 0.5)), plain)
    assert torch.equal(draw(mode, guidance_interval=(7.0, 8.0)), plain)  # no such time
    assert (draw(mode) - plain).abs().max() > 1e-3


@pytest.mark.parametrize('rate', [0.0, 0.5])
@pytest.mark.parametrize('sampler', ['heun', 'sde'])
def test_sparse_guidance_with_equal_rates_is_plain_conditional_sampling(rate: float, sampler: str) -> None:
    plain = draw('none', sampler=sampler)
    assert torch.equal(draw('sparse', sampler=sampler, strong_rate=rate, weak_rate=rate), plain)


def test_routing_is_off_again_afterwards_also_after_an_error() -> None:
    made = model().train()
    routing = routing_of(made.denoiser)
    assert routing is not None
    routing.disarm()
    seen = Lengths(made.denoiser.blocks)
    draw('sparse', [0], [0], made=made, num_steps=1)
    assert seen.seen == [16, 8, 8, 8, 8, 16, 16, 2, 2, 2, 2, 16]
    assert not routing.armed and not routing.in_evaluation and not routing.used and made.training
    made.denoiser.blocks[3].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        draw('sparse', [0], [0], made=made)
    assert not routing.armed and not routing.in_evaluation and made.training


def test_masks_differ_between_evaluations_branches_and_samples() -> None:
    made, seen = model(), []
    routing = routing_of(made.denoiser)
    assert routing is not None
    made.denoiser.blocks[2].register_forward_pre_hook(lambda *_: seen.append(routing.kept[0].clone()))
    draw('sparse', [0, 0], [1, 2], made=made, num_steps=3, strong_rate=0.5, weak_rate=0.6)
    assert [ids.shape for ids in seen] == [(2, 8), (2, 7)] * 3
    masks = {tuple(row) for ids in seen for row in ids.tolist()}
    assert len(masks) == 12
    pairs = zip(seen[::2], seen[1::2], strict=True)  # strong and weak; the weak keep less, but not of the same
    assert not any(
        set(weak) <= set(strong) for pair in pairs for strong, weak in zip(*map(Tensor.tolist, pair), strict=True)
    )


def test_the_formula_of_sparse_guidance() -> None:
    """One Euler step from t = 1: x - D, with D from both branches at the masks that were drawn."""
    made, kept, calls = model(), [], []
    routing = routing_of(made.denoiser)
    assert routing is not None
    made.denoiser.register_forward_pre_hook(lambda _, args: (calls.append(args), kept.append(routing.kept))[0])
    found = draw('sparse and null', [3], [5], made=made, num_steps=1)
    del made.denoiser._forward_pre_hooks  # type: ignore[attr-defined]
    made.denoiser._forward_pre_hooks = {}  # type: ignore[attr-defined]
    made.eval()
    outs = []
    for args, ids in zip(list(calls), list(kept), strict=True):
        with routing.forced(ids, num_tokens=16), torch.no_grad():
            outs.append(made.denoiser(*args))
    assert [int(args[2]) for args in calls] == [3, 10]  # strong with its class, weak without
    strong, weak = outs
    torch.testing.assert_close(found, calls[0][0] - (weak + 2.0 * (strong - weak)), rtol=0, atol=1e-6)


def test_the_cosine_schedule_ends_dense_in_the_weak_branch_and_begins_dense_in_the_strong() -> None:
    made = model()
    seen = Lengths([made.denoiser.blocks[2]])
    settings = {'rate_schedule': 'cosine', 'weak_rate': 0.5, 'strong_rate': 0.5, 'num_steps': 5}
    draw('sparse and null', [0], [0], made=made, **settings)
    strong, weak = seen.seen[::2], seen.seen[1::2]
    assert weak == [8, 10, 12, 15, 16]  # 16 - int(16 * 0.5 * (1 + cos(pi u)) / 2)
    assert strong == [16, 15, 12, 10, 8]


@pytest.mark.parametrize(
    ('objective', 'interval', 'guided'),
    [
        (FlowMatching(), (0.0, 0.6), 3),  # t = 0.6, 0.4, 0.2 of 1 .. 0.2: the upper end belongs to it
        (FlowMatching(), (0.6, 1.0), 2),
        (EDM(), (0.002, 80.0), 4),  # the lower end does not
        (EDM(), (0.0, 0.002), 1),
        (DDPM(learned_variance=False), (0.0, 1e6), 5),
        (DDPM(learned_variance=False), (0.0, 1e-9), 0),
    ],
)
def test_the_interval_is_in_the_time_of_the_sampling_equation(objective, interval, guided: int) -> None:
    made, sizes = model(objective=objective), []
    made.denoiser.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    draw('interval', [0], [0], made=made, guidance_interval=interval)
    assert sizes.count(2) == guided and len(sizes) == 5


def test_first3_leaves_the_fourth_channel_conditional() -> None:
    one = {'num_steps': 1, 'sampler': 'euler'}
    plain = model(4).draw([3], [5], SamplingSettings(**one))
    for mode in ('classifier_free', 'sparse and null'):
        settings = {**MODES[mode], **one}
        if mode == 'sparse and null':
            settings |= {'strong_rate': 0.0}  # then the strong branch is the plain one
        every = model(4).draw([3], [5], SamplingSettings.from_dict(settings))
        first3 = model(4).draw([3], [5], SamplingSettings.from_dict({**settings, 'guided_channels': 'first3'}))
        torch.testing.assert_close(first3[:, :3], every[:, :3], rtol=0, atol=1e-6)
        torch.testing.assert_close(first3[:, 3], plain[:, 3], rtol=0, atol=1e-5)
        assert (every - plain).abs().amax(dim=(0, 2, 3)).min() > 1e-3
    with pytest.raises(ValueError, match="'first3' repeats what DiT does with latents of 4 channels; these have 1"):
        draw('classifier_free', guided_channels='first3')


def test_sampling_with_learned_variance_and_two_networks() -> None:
    made, weak = model(objective=DDPM()), network(seed=3, learn_sigma=True)
    settings = settings_of('auto', sampler='ddpm')
    a, b = (made.draw([1, 2], [3, 4], replace(settings, guidance_scale=s), weak=weak) for s in (1.0, 1.5))
    assert a.isfinite().all() and (a - b).abs().max() > 1e-3
    with pytest.raises(ValueError, match='must have the same objective, latents and learn_sigma'):
        made.draw([1], [3], settings, weak=second())


DRAWN_ANEW = r"'sparse' draws other tokens in each evaluation.*take the sampler 'heun'"


@pytest.mark.parametrize(
    ('mode', 'more', 'weak', 'message'),
    [
        ('auto', {}, None, 'needs a second, weaker network'),
        ('classifier_free', {}, 'second', 'has no use for a second network'),
        ('sparse', {'strong_rate': 0.8, 'weak_rate': 0.2}, None, 'guides backwards'),
        ('sparse', {'rate_schedule': 'cosine'}, None, 'guides backwards'),
        ('sparse', {}, 'dense', 'routes that the weak network was trained with'),
        ('sparse', {'sampler': 'dopri5'}, None, DRAWN_ANEW),
    ],
)
def test_guidance_that_cannot_be_given_is_refused(mode: str, more: dict, weak: str | None, message: str) -> None:
    networks = {None: None, 'second': second(), 'dense': tiny_dit()}
    with pytest.raises(ValueError, match=message):
        model().draw([0], [0], settings_of(mode, **more), weak=networks[weak])


def test_a_model_without_routes_or_classes_is_refused() -> None:
    with pytest.raises(ValueError, match='routes that the network was trained with'):
        draw('sparse', made=model(routed=False))
    made = LatentDiffusion(tiny_dit(num_classes=0), FlowMatching(), latent_shape=(1, 8, 8), num_classes=0)
    with pytest.raises(ValueError, match='this model has none'):
        made.draw([0], [0], settings_of('classifier_free'))
    with pytest.raises(ValueError, match='this model has none'):
        made.draw([0], [0], settings_of('auto and null'), weak=second())


def cost(mode: str, **more) -> SamplingCost:
    made = model()
    weak = second() if mode in SECOND else None
    return guidance_cost(
        made.denoiser, made.objective, settings_of(mode, **more), latent_shape=(1, 8, 8), null_label=10, weak=weak
    )  # fmt: skip


def test_what_guidance_costs() -> None:
    plain = cost('none')
    assert (plain.evaluations, plain.guided) == (5, 0)
    assert cost('none', sampler='heun').gmacs == pytest.approx(2 * plain.gmacs)  # 2 n calls
    assert cost('classifier_free', sampler='heun', guidance_interval=(0.0, 1.0)).guided == 10  # at t = 0 too
    assert cost('classifier_free', sampler='heun', guidance_interval=(0.1, 1.0)).guided == 9
    assert cost('classifier_free') == SamplingCost(pytest.approx(2 * plain.gmacs), 5, 5)
    assert cost('auto').gmacs == pytest.approx(2 * plain.gmacs)
    assert cost('interval') == SamplingCost(pytest.approx(plain.gmacs * 8 / 5), 5, 3)  # t = 0.8, 0.6, 0.4
    assert cost('classifier_free', guidance_scale=1.0) == plain
    assert cost('sparse', strong_rate=0.5, weak_rate=0.5) == plain
    # Four of six blocks see 8 and 2 of 16 tokens.
    assert plain.gmacs < cost('sparse').gmacs < 2 * plain.gmacs
    assert cost('sparse', weak_rate=0.6).gmacs > cost('sparse', weak_rate=0.8).gmacs


def test_the_cost_is_what_the_published_model_has() -> None:
    with torch.device('meta'):
        denoiser = DiT(latent_size=32, in_channels=4, num_classes=1000)  # XL/2, 256 pixels
    apply_tread(denoiser, Route(2, -4, 0.5))

    def gmacs(**more) -> float:
        settings = SamplingSettings.from_dict({'sampler': 'euler', 'num_steps': 1, **more})
        return guidance_cost(
            denoiser, FlowMatching(), settings, latent_shape=(4, 32, 32), null_label=1000
        ).gmacs  # fmt: skip

    assert gmacs() == pytest.approx(118.6, abs=0.1)  # methods.md section 6
    # arXiv 2601.01608, SG_FLOPS: 97.67 against 228.84, of 114.42 for one dense call as they count.
    sparse = gmacs(guidance='sparse', guidance_scale=1.5, strong_rate=0.5, weak_rate=0.9)
    assert sparse / (2 * gmacs()) == pytest.approx(97.67 / 228.84, abs=0.02)
