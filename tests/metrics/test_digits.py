import numpy as np
import pytest
import torch

from tread_composer.metrics.digits import DigitsJudge, digits_judge, real_digits


def test_the_judge_knows_held_out_digits_and_not_noise():
    images, labels = real_digits()['eval']
    assert digits_judge().recognised(images, labels) >= 0.97
    assert digits_judge().recognised(images, (labels + 1) % 10) < 0.01
    noise = torch.rand(1000, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert digits_judge().recognised(noise, torch.arange(1000) % 10) < 0.2


def test_the_splits_are_apart_and_in_range():
    (train, train_labels), (held_out, held_out_labels) = real_digits()['train'], real_digits()['eval']
    assert len(train) + len(held_out) == 1797
    assert train.min() == -1.0
    assert train.max() == 1.0
    assert set(train_labels.tolist()) == set(held_out_labels.tolist()) == set(range(10))
    # The data set itself holds no two equal images, so none may be in both splits.
    assert not {image.numpy().tobytes() for image in train} & {image.numpy().tobytes() for image in held_out}


def test_features_are_the_layer_that_decides():
    images, labels = real_digits()['train']
    features = digits_judge().features(images)
    assert features.shape == (len(images), 128)
    assert features.dtype == np.float64
    assert (features >= 0).all()
    centres = np.stack([features[labels.numpy() == digit].mean(0) for digit in range(10)])
    nearest = ((features[:, None] - centres) ** 2).sum(-1).argmin(1)
    assert (nearest == labels.numpy()).mean() > 0.95


def test_the_same_seed_gives_the_same_judge_and_the_global_stream_stays():
    images, labels = real_digits()['train']
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    judges = [DigitsJudge(images[:300], labels[:300], seed=5) for _ in range(2)]
    assert (judges[0].features(images[:9]) == judges[1].features(images[:9])).all()
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r'\[N, 1, 8, 8\]'):
        digits_judge().features(torch.zeros(3, 3, 32, 32))
