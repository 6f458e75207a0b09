"""``python -m tread_composer inspect`` and the advice behind it: figures by hand, what it leaves, what it refuses."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from streaming import MDSWriter
from torch import Tensor, nn

from tests.helpers import Lengths, randomised, tiny_dit, tiny_model
from tests.trained_runs import YAMLS, run
from tread_composer import cli
from tread_composer.advisor import (
    candidate_spans,
    format_advice,
    propose_route,
    rank_routes,
    read_route,
    recommended_route,
    token_similarity,
)
from tread_composer.advisor.noising import network_call
from tread_composer.builders.model import build_denoiser
from tread_composer.config import load_config, restore_config
from tread_composer.core.randomness import KeyedRandom
from tread_composer.data.columns import LABEL, LATENTS, NAME, columns
from tread_composer.data.digits import digits_manifest, load_digits_arrays, prepare_digits
from tread_composer.objectives import DDPM, EDM, FlowMatching
from tread_composer.routing import Route, apply_tread
from tread_composer.run.plan import make_plan
from tread_composer.weights.trained import load_trained


def inputs(count: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    return x, torch.linspace(0.1, 0.9, count), torch.arange(count)


class Stack(nn.Module):
    """Calls its blocks one after the other."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Times(nn.Module):
    """Multiplies, in place if asked."""

    def __init__(self, factor: float, in_place: bool = False) -> None:
        super().__init__()
        self.factor, self.in_place = nn.Parameter(torch.tensor(factor)), in_place

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.factor) if self.in_place else x * self.factor


def similarity_of(*blocks: nn.Module) -> Tensor:
    return token_similarity(Stack(*blocks), [lambda: model_input(blocks)], blocks='blocks').mean


def model_input(blocks: tuple[nn.Module, ...]) -> Tensor:
    return Stack(*blocks)(torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)))


def test_it_is_the_mean_cosine_of_an_explicit_loop():
    model, (x, t, labels) = tiny_dit(depth=3), inputs(2)
    with torch.no_grad():
        depths = [model.x_embedder(x) + model.pos_embed]
        for block in model.blocks:
            depths.append(block(depths[-1], model.t_embedder(t) + model.y_embedder(labels)))
    found = token_similarity(model, [lambda: model(x, t, labels)])
    for i, one in enumerate(depths):
        for j, other in enumerate(depths):
            means = []
            for sample in range(2):
                cosines = []
                for token in range(16):
                    a, b = one[sample, token].double(), other[sample, token].double()
                    cosines.append(float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)))
                means.append(sum(cosines) / 16)
            assert float(found.mean[i, j]) == pytest.approx(sum(means) / 2, abs=1e-6)
            assert float(found.std[i, j]) == pytest.approx(abs(means[0] - means[1]) / 2, abs=1e-6)
    assert found.mean[0, 3] < 0.999  # the blocks do something
    assert (found.num_samples, found.num_tokens) == (2, 16)


@pytest.mark.parametrize('in_place', [False, True])
def test_identity_is_1_a_flipped_sign_is_minus_1_and_nothing_is_0(in_place):
    ones = similarity_of(*(Times(2.0, in_place) for _ in range(3)))
    torch.testing.assert_close(ones, torch.ones(4, 4, dtype=torch.float64))
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(similarity_of(*(Times(-1.0, in_place) for _ in range(3))), signs[:, None] * signs)
    assert similarity_of(Times(1.0, in_place), Times(0.0, in_place))[:, 2].tolist() == [0, 0, 0]


def test_the_batch_size_does_not_change_it():
    model, (x, t, labels) = tiny_dit(), inputs(5)
    whole = token_similarity(model, [lambda: model(x, t, labels)])
    cuts = [slice(0, 2), slice(2, 4), slice(4, 5)]
    parts = token_similarity(model, [lambda cut=cut: model(x[cut], t[cut], labels[cut]) for cut in cuts])
    torch.testing.assert_close(parts.mean, whole.mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(parts.std, whole.std, atol=1e-5, rtol=0)
    assert parts.num_samples == 5


def test_the_model_is_afterwards_as_it_was():
    model, (x, t, labels) = tiny_dit(), inputs()
    dense = token_similarity(model, [lambda: model(x, t, labels)]).mean
    apply_tread(model, Route(1, 3, 0.5))
    model.train()
    model.blocks[2].eval()
    assert torch.equal(token_similarity(model, [lambda: model(x, t, labels)]).mean, dense)  # it looks at a dense pass
    with pytest.raises(ZeroDivisionError):
        token_similarity(model, [lambda: model(x, t, labels), lambda: 1 / 0])
    assert [block.training for block in model.blocks] == [True, True, False, True, True, True] and model.training
    lengths = Lengths([model.blocks[index] for index in range(6)])
    for _ in range(2):  # a hook left behind would refuse the second pass
        assert model(x, t, labels).requires_grad
    assert lengths.seen == [16, 8, 8, 8, 16, 16] * 2


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, context: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return context, self.linear(hidden)


class PairStack(Stack):
    def forward(self, x: Tensor) -> Tensor:
        context = x[:, :1]
        for block in self.blocks:
            context, x = block(context=context, hidden=x)
        return x


def test_tokens_that_are_elsewhere_are_named():
    torch.manual_seed(0)
    model, x = PairStack(Pair(), Pair()), torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match=r'at depth 1 the tokens are a tuple.*tokens_out='):
        token_similarity(model, [lambda: model(x)])
    found = token_similarity(model, [lambda: model(x)], tokens='hidden', tokens_out=1).mean
    first = model.blocks[0].linear(x)
    assert float(found[0, 1]) == pytest.approx(float(torch.cosine_similarity(x, first, dim=2).mean()), abs=1e-6)
    with pytest.raises(ValueError, match="no argument 'x', only"):
        token_similarity(model, [lambda: model(x)], tokens='x')


class Reversed(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for index in (1, 0):
            x = self.blocks[index](x)
        return x


@pytest.mark.parametrize(
    ('model', 'blocks', 'message'),
    [
        (Stack(Times(1.0), Times(1.0)), 'layers', "no module 'layers'"),
        (Stack(Times(1.0), Times(1.0)), 'blocks.0', "'blocks.0' is a Times; a list of blocks"),
        (Reversed(Times(1.0), Times(1.0)), 'blocks', 'was not called in its turn'),
        (Stack(Times(math.nan), Times(1.0)), 'blocks', 'not finite'),
        (Stack(nn.Linear(4, 5), nn.Linear(5, 4)), 'blocks', r'\(2, 3, 4\), \(2, 3, 5\).*one shape'),
    ],
)
def test_what_cannot_be_compared_is_refused(model, blocks, message):
    with pytest.raises(ValueError, match=message):
        token_similarity(model, [lambda: model(torch.ones(2, 3, 4))], blocks=blocks)


def test_a_call_that_runs_nothing_is_refused():
    model = tiny_dit()
    with pytest.raises(ValueError, match='ran 0 of 6 blocks'):
        token_similarity(model, [lambda: None])
    with pytest.raises(ValueError, match='calls is empty'):
        token_similarity(model, [])


@pytest.mark.parametrize(
    ('depth', 'rule', 'span'),
    [
        (2, 'none', None),
        (3, 'scaled', (1, 1)),
        (4, 'scaled', (1, 2)),
        (6, 'scaled', (1, 3)),
        (8, 'authors', (2, 4)),
        (12, 'authors', (2, 8)),
        (24, 'authors', (2, 20)),
        (28, 'authors', (2, 24)),
    ],
)
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
    ranked = rank_routes(similarity)
    assert [(one.start, one.end) for one in ranked[:3]] == [(2, 4), (1, 4), (1, 3)]
    assert [one.score for one in ranked[:3]] == pytest.approx([0.9 * 3 / 8, 0.5 * 4 / 8, 0.6 * 3 / 8])
    assert len(ranked) == len(candidate_spans(8))


def test_a_route_is_read_off_its_row():
    similarity = torch.full((6, 6), 0.4, dtype=torch.float64).fill_diagonal_(1.0)
    similarity[1, 2:5] = torch.tensor([0.9, 0.7, 0.8])
    found = read_route(similarity, 1, 3)
    assert (found.ends, found.outputs_mean, found.outputs_lowest) == pytest.approx((0.8, 0.8, 0.7))
    assert found.all_pairs == pytest.approx((0.4 * 27 + 2.4) / 30)
    with pytest.raises(ValueError, match='block 5 does not lie within 5 blocks'):
        read_route(similarity, 1, 5)


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.mix = nn.Conv1d(width, width, 3, padding=1)

    def forward(self, hidden, temb, rope, encoder_hidden_states=None, attention_mask=None) -> tuple[Tensor, Tensor]:
        raise AssertionError('advice runs nothing')


def test_an_unknown_model_gets_a_route_its_reasons_and_questions():
    model = nn.Module()
    model.first, model.second = (nn.ModuleList(Block() for _ in range(depth)) for depth in (12, 4))
    with pytest.raises(ValueError, match=r"'first' \(12 blocks\), 'second' \(4 blocks\)"):
        propose_route(model)
    advice = propose_route(model, 'first')
    assert advice.arguments == {'start': 2, 'end': -4, 'selection_rate': 0.5, 'blocks': 'first'}
    assert (advice.depth, advice.route, advice.rule) == (12, Route(2, -4, 0.5), 'authors')
    text = format_advice(advice)
    for words in (
        'blocks 2 to 8 of 0 to 11',
        "tokens: 'hidden'",
        "token_arguments=['rope', 'attention_mask']",
        'encoder_hidden_states: of another sequence',
        'temb: one entry for each sample?',
        'the blocks return a tuple',
        'mix: a convolution mixes neighbours',
    ):
        assert words in ' '.join(text.split()), words
    assert 'check' not in format_advice(advice, questions=False)
    assert propose_route(model, 'second').rule == 'scaled'


@pytest.mark.parametrize('yaml', ['digits.yaml', 'digits_lightning.yaml', 'digits_mamba2.yaml'])
def test_each_backbone_of_ours_can_be_looked_at(yaml):
    denoiser = build_denoiser(load_config(YAMLS / yaml), channels=1, latent_size=8, num_classes=10)
    assert propose_route(denoiser).arguments.get('token_arguments', ()) == tuple(denoiser.token_arguments)
    found = token_similarity(denoiser, [lambda: denoiser(*inputs(2))])
    torch.testing.assert_close(found.mean, torch.ones(9, 9, dtype=torch.float64))  # each block starts as the identity
    randomised(denoiser)
    assert token_similarity(denoiser, [lambda: denoiser(*inputs(2))]).mean[0, 8] < 0.999


def test_what_the_model_tells_is_not_asked():
    with torch.device('meta'):
        model = tiny_dit(depth=8).to('meta')
    advice = propose_route(model)
    assert advice.arguments == {'start': 2, 'end': -4, 'selection_rate': 0.5}
    assert not any('tuple' in question for question in advice.questions)  # annotated: a tensor
    model.token_arguments = ('condition_BD',)
    told = propose_route(model)
    assert told.arguments['token_arguments'] == ('condition_BD',)
    assert any('condition_BD' in one for one in advice.questions) and not any('condition' in o for o in told.questions)
    apply_tread(model, Route(1, 2, 0.5))
    assert any('routed already (blocks 1 to 2)' in reason for reason in propose_route(model).reasons)
    mixed = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, width, batch_first=True) for width in (8, 8, 16, 8)))
    questions = ' '.join(propose_route(mixed).questions)
    assert 'src_mask' in questions and 'parameters: tokens must have one width' in questions


@pytest.mark.parametrize(
    ('objective', 'time'), [(FlowMatching(), 0.3), (EDM(), 0.6), (DDPM(learned_variance=False), 0.25)]
)
def test_the_network_sees_what_training_would_show_it(objective, time):
    model = tiny_model()
    model.objective = objective
    x, _, labels = inputs(3)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    seen = []
    model.denoiser.register_forward_pre_hook(lambda _, given: seen.append([one.clone() for one in given]))
    network_call(model, time, x, labels, noise)()
    normal = torch.special.ndtr
    odds = math.log(time / (1 - time))
    quantile = {
        FlowMatching: normal(torch.tensor(odds)),
        EDM: normal(torch.tensor((odds - EDM().P_mean) / EDM().P_std)),
        DDPM: torch.tensor(time),
    }[type(objective)]
    objective(model.denoiser, x, labels, noise, quantile.expand(3))
    for ours, training in zip(*seen, strict=True):
        torch.testing.assert_close(ours, training, atol=1e-5, rtol=1e-5)
    assert objective.noise_level(time) > 0


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    return run(tmp_path_factory.mktemp('inspect'), 'digits_tread.yaml', 'algorithms.ema.decay=0.5').folder


def inspect(path, out, *words: str) -> int:
    return cli.main(['inspect', str(path), '--out', str(out), '--device', 'cpu', *words])


def numbers(folder) -> dict:
    return json.loads((folder / 'inspection.json').read_text())


def test_the_command_from_its_words_to_its_files(trained, tmp_path, capsys):
    assert inspect(trained, tmp_path / 'a', '--samples', '6', '--times', '0.5', '0.9') == 0
    text, found = capsys.readouterr().out, numbers(tmp_path / 'a')
    assert sorted(path.name for path in (tmp_path / 'a').iterdir()) == ['inspection.json', 'similarity.png']
    with Image.open(tmp_path / 'a' / 'similarity.png') as picture:
        assert picture.width > picture.height > 300
    ids = [0, 49, 99, 148, 198, 247]  # six at equal distances among 297
    images, labels = (torch.from_numpy(part[ids]) for part in load_digits_arrays('eval'))
    noise = KeyedRandom(0, 0, ids).normal('noise', 1, 8, 8)
    denoiser = load_trained(trained).model.denoiser
    t = torch.full((6,), 0.5)
    by_hand = token_similarity(denoiser, [lambda: denoiser((images + noise) / 2, t, labels)])
    assert np.allclose(found['times'][0]['mean'], by_hand.mean, atol=2e-6)
    assert np.allclose(found['times'][0]['std_over_samples'], by_hand.std, atol=1e-5)
    assert not np.allclose(found['times'][1]['mean'], by_hand.mean, atol=1e-3)
    both = [one['mean'] for one in found['times']]
    assert np.allclose(found['mean'], np.mean(both, axis=0), atol=2e-6)
    protocol = found['protocol']
    assert (protocol['times'], protocol['noise_levels']) == ([0.5, 0.9], [1.0, pytest.approx(9.0)])
    assert protocol['weights_digest'] == load_trained(trained).digest and protocol['data'].endswith('eval split')
    (route,) = found['routes']
    assert (route['start'], route['end']) == (2, 4) == tuple(found['proposal']['span'])
    assert route['ends'] == pytest.approx(found['mean'][2][5], abs=1e-6)
    assert route['outputs_mean'] == pytest.approx(np.mean(found['mean'][2][3:6]), abs=1e-6)
    (own,) = [one for one in found['candidates'] if (one['start'], one['end']) == (2, 4)]
    config = restore_config(trained / 'config.yaml')
    assert own['ideal_step_ratio'] == pytest.approx(make_plan(config, 1)['ideal_step_ratio'])
    assert own['lowest_over_times'] == pytest.approx(min(one[2][5] for one in both), abs=1e-6)
    assert [one['rank'] for one in found['candidates']][:5] == [1, 2, 3, 4, 5] and found['num_candidates'] == 6
    assert f'similarity {route["ends"]:.3f}' in text and 'proposed, the run' in text
    assert 'algorithms: {tread: {start: 2, end: -4, selection_rate: 0.5}}' in text


def test_neither_batch_size_nor_the_way_to_the_same_data_change_the_numbers(trained, tmp_path, capsys):
    data = tmp_path / 'digits'
    prepare_digits(data)
    words = ('--samples', '7', '--times', '0.4')
    assert inspect(trained, tmp_path / 'a', *words) == 0
    assert inspect(trained, tmp_path / 'b', *words, '--batch-size', '3', '--data', str(data)) == 0
    assert inspect(trained, tmp_path / 'c', *words, '--weights', 'raw', '--data', str(data / 'eval')) == 0
    a, b, c = (np.array(numbers(tmp_path / name)['mean']) for name in 'abc')
    assert np.abs(a - b).max() < 2e-6 < np.abs(a - c).max()
    assert numbers(tmp_path / 'b')['protocol']['data'].startswith(str(data / 'eval'))


def write_data(folder, **changes):
    """Twelve samples of noise with a manifest that says so."""
    given = digits_manifest('train').model_dump() | {'num_samples': 12, 'source': 'noise'} | changes
    manifest = type(digits_manifest('train'))(**given)
    encodings = columns(manifest.kind, manifest.latent_shape)
    random = np.random.default_rng(0)
    with MDSWriter(out=str(folder), columns=encodings, hashes=['xxh64']) as writer:
        for index in range(12):
            latents = random.standard_normal(manifest.stored_shape).astype(np.float16)
            writer.write({LATENTS: latents, LABEL: index % 10, NAME: f'{index}'})
    manifest.save(folder)
    return folder


MOMENTS = {'kind': 'moments', 'autoencoder': 'my-vae', 'autoencoder_hash': 'sha256:0'}


def test_moments_and_a_decoder_of_maskdit(tmp_path, capsys):
    """A run without a route on moments of its own folder, without an evaluation split."""
    (tmp_path / 'data').mkdir()
    write_data(tmp_path / 'mine' / 'train', **MOMENTS)
    folder = run(
        tmp_path,
        'digits_maskdit.yaml',
        'algorithms.maskdit={mask_ratio: 0.5, decoder_depth: 1, decoder_hidden_size: 16, decoder_num_heads: 2}',
        f'data={{name: latents, local: {tmp_path / "mine"}, eval_split: null, num_workers: 0}}',
        'autoencoder={name: kl, path: nowhere, id: my-vae}',
        'global_train_batch_size=4',
        'max_duration=1ba',
    ).folder
    for name, size in (('a', '4'), ('b', '3')):
        words = ('--samples', '4', '--times', '0.1', '--weights', 'raw', '--batch-size', size)
        assert inspect(folder, tmp_path / name, *words) == 0
    a, b = (np.array(numbers(tmp_path / name)['mean']) for name in 'ab')
    assert np.abs(a - b).max() < 2e-6 and a.min() < 0.999
    text = capsys.readouterr().out
    assert 'route of the run: none' in text and 'MaskDiT and TREAD exclude each other' in text
    shutil.rmtree(tmp_path / 'mine')
    assert inspect(folder, tmp_path / 'c', '--samples', '4') == 2
    assert '--data FOLDER' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['--times', '0'], '--times: 0.0 is not between 0 (data) and 1 (noise)'),
        (['--times', '0.5', '1.5'], '--times: 1.5 is not between'),
        (['--times', 'nan'], '--times: nan is not between'),
        (['--times', '0.5', '0.5'], '--times: 0.5 is given twice'),
        (['--samples', '298'], '--count: 298 is not between 1 and 297, the samples of the eval split of the digits'),
        (['--samples', '0'], '--count: 0 is not between 1 and 297'),
        (['--batch-size', '0'], '--batch-size: 0 must be at least 1'),
        (['--data', '{}/nowhere'], 'there is no such folder'),
        (['--data', '{}'], 'holds no manifest.json, nor does a split in it (eval, train, val)'),
        (['--data', '{}/large'], 'latent_size: the run expects (8, 8), the data have (4, 4)'),
        (['--data', '{}/moments'], "autoencoder: the run expects 'pixels', the data have 'my-vae'"),
        (['--data', '{}/classes'], 'num_classes: the run expects 10, the data have 2'),
    ],
)
def test_refused(trained, other_data, tmp_path, capsys, words, message):
    assert inspect(trained, tmp_path / 'out', *(word.format(other_data) for word in words)) == 2
    assert message in capsys.readouterr().err and not (tmp_path / 'out').exists()


@pytest.fixture(scope='module')
def other_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('other')
    write_data(folder / 'large', latent_height=4, latent_width=4)
    write_data(folder / 'moments', **MOMENTS)
    write_data(folder / 'classes', num_classes=2, class_names=('a', 'b'))
    return folder


def test_a_wrong_path_and_a_place_that_cannot_be_written(trained, tmp_path, capsys):
    assert inspect(tmp_path / 'nowhere', tmp_path / 'out') == 2
    assert 'there is no such file; give a run folder' in capsys.readouterr().err
    assert inspect(trained, '/dev/null/x', '--samples', '1', '--times', '0.5') == 2
    assert "--out: '/dev/null/x' cannot be written" in capsys.readouterr().err
