import dataclasses

import numpy as np
import pytest
import torch

from tests.metrics.small import Means, as_batch, extract, random_images
from tread_composer.core.errors import UserError
from tread_composer.metrics import METRICS
from tread_composer.metrics.digits import DigitsFeatures
from tread_composer.metrics.features import FeatureSet, joined
from tread_composer.metrics.inception import InceptionFeatures
from tread_composer.metrics.metric import Comparison, build_metrics, check_metrics, measure
from tread_composer.metrics.published import frechet_distance, statistics

# `recognised` and `sfid` read the features of one network alone.
GENERAL = [name for name in METRICS if name not in ('recognised', 'sfid')]


def features(values: np.ndarray, logits: np.ndarray | None = None) -> FeatureSet:
    """In the order given."""
    rows = torch.from_numpy(np.asarray(values, np.float32))
    marks = [index.to_bytes(16, 'big') for index in range(len(rows))]
    return FeatureSet(rows, None if logits is None else torch.from_numpy(logits), marks)


# Their covariance is exactly the identity; these means and deviations are 26 away from the standard normal.
IDENTITY = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]] * 5) * np.sqrt(19 / 20)
MOVED, STANDARD = IDENTITY * np.array([2.0, 5.0]) + np.array([3.0, 0.0]), {'mu': np.zeros(2), 'sigma': np.eye(2)}


def numbers(metrics, samples, reference, **settings):
    found = measure(build_metrics(metrics, settings), samples, Comparison(statistics(reference.features_ND), reference))
    return {figure.quantity.name: figure.value for figure in found}


def normal(count, seed, shift=0.0, width=5):
    return np.random.RandomState(seed).standard_normal((count, width)) + shift


def in_balls(points: np.ndarray, of: np.ndarray) -> float:
    """Share of ``points`` within the manifold of ``of``, by the definition, one distance after another."""
    inside = 0
    radii = [sorted(float(np.linalg.norm(a - b)) for b in of)[3] for a in of]
    for point in points:
        inside += any(np.linalg.norm(point - a) <= radius for a, radius in zip(of, radii, strict=True))
    return inside / len(points)


def test_a_set_against_itself():
    same = features(normal(60, 0))
    found = numbers(['fid', 'kid', 'prc'], same, same, kid_subset_size=60)
    assert found['fid'] == pytest.approx(0, abs=1e-6) and abs(distance(*[normal(100, 1) * 100] * 2)) < 1e-8
    assert found['precision'] == found['recall'] == 1.0
    assert found['kid'] < 0  # unbiased: below zero where the two halves are one


def distance(a: np.ndarray | torch.Tensor, b: np.ndarray | torch.Tensor) -> float:
    return frechet_distance(*(statistics(torch.as_tensor(side)) for side in (a, b)))


def by_symmetric_roots(a: np.ndarray, b: np.ndarray) -> float:
    """tr((A^1/2 B A^1/2)^1/2) from symmetric eigenvalues, where the library takes the eigenvalues of A B."""
    mean_a, mean_b, a, b = a.mean(0), b.mean(0), np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(a)
    root = vectors @ np.diag(np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ b @ root), 0, None)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * cross)


def test_the_distance_agrees_with_a_second_implementation_on_correlated_features_also_of_float16():
    rng = np.random.default_rng(1)
    a = rng.standard_normal((500, 12)) @ rng.standard_normal((12, 12))
    b = rng.standard_normal((700, 12)) @ rng.standard_normal((12, 12)) + 0.3
    assert distance(a, b) == pytest.approx(by_symmetric_roots(a, b), rel=1e-6)
    half = torch.from_numpy(a * 100).half()
    assert distance(half, b) == distance(half.double(), b)


def test_the_fid_of_gaussians_with_known_moments():
    found = measure(build_metrics(['fid'], {}), features(MOVED), Comparison(STANDARD))
    assert found[0].value == pytest.approx(9 + (2 - 1) ** 2 + (5 - 1) ** 2, rel=1e-6)


def test_sfid_is_the_distance_of_the_spatial_features_and_says_what_it_has_not_been_held_against():
    samples = dataclasses.replace(features(normal(20, 0)), spatial_NS=torch.from_numpy(MOVED))
    (found,) = measure(build_metrics(['sfid'], {}), samples, Comparison(spatial=STANDARD))
    assert found.value == pytest.approx(9 + (2 - 1) ** 2 + (5 - 1) ** 2, rel=1e-6)
    assert found.quantity.reported('inception', 50_000) == 'sfid'
    assert found.settings == {'port': "not yet held against ADM's numbers"}
    with pytest.raises(UserError, match='3 features and the samples have 2'):
        measure(build_metrics(['sfid'], {}), samples, Comparison(spatial={'mu': np.zeros(3), 'sigma': np.eye(3)}))


def test_ill_conditioned_covariances_give_finite_numbers():
    line = np.outer(np.linspace(-1, 1, 40), np.ones(30)) * 1e3
    found = numbers(['fid'], features(line), features(line + 1e-4))
    assert np.isfinite(found['fid'])
    # A square root of a covariance knows half of the digits of its trace.
    assert abs(found['fid']) < 1e-8 * np.trace(np.cov(line, rowvar=False))


@pytest.mark.parametrize(('seed', 'shift'), [(1, 0.0), (2, 1.5), (3, 50.0)])
def test_precision_and_recall_by_their_definition(seed, shift):
    real, fake = normal(40, 0, width=3), normal(30, seed, shift, width=3).astype(np.float32)
    real = real.astype(np.float32)
    found = numbers(['prc'], features(fake), features(real))
    assert found == {
        'precision': pytest.approx(in_balls(fake, real)), 'recall': pytest.approx(in_balls(real, fake)),
    }  # fmt: skip
    assert found['precision'] < 1 or shift == 0


def test_kid_by_its_definition():
    fake, real = normal(20, 1, 0.5), normal(20, 2)
    kernel = lambda a, b: (a.astype(np.float32).astype(float) @ b.astype(np.float32).astype(float).T / 5 + 1) ** 3  # noqa: E731
    within = sum((kernel(x, x).sum() - np.trace(kernel(x, x))) / (20 * 19) for x in (fake, real))
    expected = within - 2 * kernel(fake, real).mean()
    assert numbers(['kid'], features(fake), features(real), kid_subset_size=20)['kid'] == pytest.approx(expected)


def test_the_inception_score_of_certain_and_of_undecided_images():
    certain = np.tile(np.eye(4) * 100, (50, 1))
    assert measure(build_metrics(['is'], {}), features(certain, certain))[0].value == pytest.approx(4, rel=0.2)
    undecided = np.zeros((200, 4))
    assert measure(build_metrics(['is'], {}), features(undecided, undecided))[0].value == pytest.approx(1)


def test_numbers_depend_neither_on_order_nor_on_batch_size_nor_on_the_ranks():
    images, extractor = as_batch(random_images(60)), Means()
    reference = extract(as_batch(random_images(50, seed=1)).split(50), extractor)

    def found(batches):
        return numbers(GENERAL, extract(batches, extractor), reference, kid_subset_size=20)

    whole = found(images.split(60))
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    for size in (1, 7, 16):
        assert found(images[order].split(size)) == pytest.approx(whole, rel=1e-6, abs=1e-9)
    parts = [extract(images[rank::2].split(8), extractor) for rank in (1, 0)]
    assert numbers(GENERAL, joined(parts), reference, kid_subset_size=20) == pytest.approx(whole, rel=1e-6, abs=1e-9)
    assert len(set(whole.values())) == 5


def test_the_global_streams_and_the_log_stay_as_they_are(capsys):
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    extractor = Means()
    sets = [extract(as_batch(random_images(30, seed=seed)).split(9), extractor) for seed in (0, 1)]
    numbers(GENERAL, *sets, kid_subset_size=10)
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert capsys.readouterr() == ('', '')


def check(metrics, **changes):
    facts = {'extractor': InceptionFeatures, 'num_samples': 100, 'num_reference': 100}
    check_metrics(build_metrics(metrics, {'kid_subset_size': 50}), **{**facts, **changes})


@pytest.mark.parametrize(
    ('metrics', 'changes', 'message'),
    [
        (['sfidd'], {}, r"\['sfidd'\] given; choose of fid"),
        (['sfid'], {'extractor': DigitsFeatures}, "sfid is of the features 'inception', not 'digits'"),
        ([], {}, 'none given'),
        (['is'], {'num_samples': 9}, '10 parts'),
        (['prc'], {'num_reference': 0}, 'statistics alone'),
        (['prc'], {'num_reference': 3}, 'prc needs 4 images'),
    ],
)
def test_what_cannot_be_measured_is_refused_beforehand(metrics, changes, message):
    check(['fid', 'kid', 'is', 'prc'])
    with pytest.raises(UserError, match=message):
        check(metrics, **changes)


def test_features_of_other_networks_and_broken_ones_are_refused():
    against = Comparison(statistics(torch.from_numpy(normal(10, 0))))
    with pytest.raises(UserError, match='5 features and the samples have 4'):
        measure(build_metrics(['fid'], {}), features(normal(10, 0, width=4)), against)
    with pytest.raises(UserError, match='not finite'):
        joined([features(np.full((3, 2), np.nan))])
    with pytest.raises(UserError, match='no images'):
        extract([], Means())
    with pytest.raises(UserError, match='at least 2'):
        statistics(torch.from_numpy(normal(1, 0)))
