import numpy as np
import pytest
import torch

from tests.metrics.small import as_batch
from tread_composer.core.errors import UserError
from tread_composer.metrics.digits import DigitsFeatures, DigitsImages, DigitsJudge, digits_judge, real_digits
from tread_composer.metrics.features import joined, looked
from tread_composer.metrics.inception import InceptionFeatures
from tread_composer.metrics.metric import build_metrics, check_metrics, measure


def recognised(images, labels) -> float:
    """Of bytes, in an order that is not that of the measurement."""
    (metric,) = build_metrics(['recognised'], {})
    (figure,) = measure([metric], joined(looked(images.split(100), DigitsFeatures(), labels)))
    return figure.value


def test_real_digits_are_recognised_and_noise_is_not():
    held_out = DigitsImages('eval')
    images, labels = torch.cat([*held_out.batches(100)]), held_out.labels()
    assert (held_out.count, held_out.resolution, images.dtype) == (297, 8, torch.uint8)
    assert recognised(images, labels) >= 0.97
    assert recognised(images, [(label + 1) % 10 for label in labels]) < 0.01
    noise = np.random.RandomState(0).randint(0, 256, (1000, 8, 8, 1), dtype=np.uint8)
    assert recognised(as_batch(noise), [i % 10 for i in range(1000)]) < 0.2
    assert held_out.hash != DigitsImages().hash == DigitsImages('train').hash


def test_without_labels_or_other_features_nothing_is_recognised():
    metrics = build_metrics(['recognised'], {})
    facts = {'extractor': DigitsFeatures, 'num_samples': 10, 'num_reference': 0}
    check_metrics(metrics, **facts)
    for changes, message in (
        ({'extractor': InceptionFeatures}, "of the features 'digits', not 'inception'"),
        ({'has_labels': False}, 'needs the label of each image'),
    ):
        with pytest.raises(UserError, match=message):
            check_metrics(metrics, **{**facts, **changes})
    images = next(DigitsImages('eval').batches(20))
    parts = looked([images], DigitsFeatures(), range(20)) + looked([images], DigitsFeatures())
    with pytest.raises(UserError, match='not all of them have one'):
        measure(metrics, joined(parts))


def test_the_splits_are_apart_and_in_range():
    (train, train_labels), (held_out, held_out_labels) = real_digits()['train'], real_digits()['eval']
    assert len(train) + len(held_out) == 1797
    assert train.min() == -1.0
    assert train.max() == 1.0
    assert set(train_labels.tolist()) == set(held_out_labels.tolist()) == set(range(10))
    # The data set itself holds no two equal images, so none may be in both splits.
    assert not {image.numpy().tobytes() for image in train} & {image.numpy().tobytes() for image in held_out}


def test_the_same_seed_gives_the_same_judge_and_the_global_stream_stays():
    images, labels = real_digits()['train']
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    judges = [DigitsJudge(images[:300], labels[:300], seed=5) for _ in range(2)]
    assert (judges[0].features(images[:9]) == judges[1].features(images[:9])).all()
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    with pytest.raises(ValueError, match=r'\[N, 1, 8, 8\]'):
        digits_judge().features(torch.zeros(3, 3, 32, 32))


def test_features_are_the_layer_that_decides():
    images, labels = real_digits()['train']
    features = digits_judge().features(images)
    assert features.shape == (len(images), 128)
    assert features.dtype == np.float64
    assert (features >= 0).all()
    centres = np.stack([features[labels.numpy() == digit].mean(0) for digit in range(10)])
    nearest = ((features[:, None] - centres) ** 2).sum(-1).argmin(1)
    assert (nearest == labels.numpy()).mean() > 0.95
