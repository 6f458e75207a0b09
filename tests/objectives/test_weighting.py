"""Min-SNR: every form must be the same loss of the data, whatever the network predicts."""

import math

import pytest
import torch

from tests.objectives.denoisers import Affine
from tread_composer.objectives import FlowMatching, MinSNR, Uniform
from tread_composer.objectives.weighting import Prediction

GAMMA = 5.0


@pytest.mark.parametrize('t', [0.02, 0.2, 0.3, 0.31, 0.5, 0.9])
def test_all_forms_are_one_loss_of_the_data(t: float) -> None:
    """An error of the prediction is turned into an error of x0 with the definition of the prediction alone."""
    x0, noise, wrong = 0.7, -1.3, 0.01
    forms: list[tuple[Prediction, float, float]] = [
        ('x0', 1 - t, t),
        ('eps', 1 - t, t),
        ('v', math.cos(t), math.sin(t)),  # this one is defined where alpha^2 + sigma^2 = 1
        ('flow', 1 - t, t),
    ]
    for prediction, alpha, sigma in forms:
        x_t = alpha * x0 + sigma * noise
        guess = {
            'x0': lambda a, s, x: x0 + wrong,
            'eps': lambda a, s, x: (x - s * (noise + wrong)) / a,
            'v': lambda a, s, x: a * x - s * (a * noise - s * x0 + wrong),
            'flow': lambda a, s, x: x - s * (noise - x0 + wrong),
        }[prediction](alpha, sigma, x_t)
        snr = alpha**2 / sigma**2
        expected = min(snr, GAMMA) * (guess - x0) ** 2
        weight = MinSNR(GAMMA)(torch.tensor(snr, dtype=torch.float64), prediction)
        assert float(weight) * wrong**2 == pytest.approx(expected, rel=1e-9), prediction


def test_the_forms_of_the_paper() -> None:
    snr, weight = torch.tensor([0.0, 0.5, 5.0, 20.0, math.inf]), MinSNR(GAMMA)
    assert weight(snr, 'x0').tolist() == [0.0, 0.5, 5.0, 5.0, 5.0]
    assert weight(snr, 'eps').tolist() == [1.0, 1.0, 1.0, 0.25, 0.0]
    torch.testing.assert_close(weight(snr, 'v'), torch.tensor([0.0, 0.5 / 1.5, 5 / 6, 5 / 21, 0.0]))
    assert weight(snr, 'flow').isfinite().all()


@pytest.mark.parametrize('t', [0.05, 0.3, 0.7])
def test_flow_matching_weighs_its_error_and_shows_the_plain_one(t: float) -> None:
    batch = torch.randn(2, 2, 3, 3), torch.tensor([1, 4]), torch.randn(2, 2, 3, 3), torch.full((2,), t)
    out = FlowMatching(Uniform(), weighting=MinSNR(GAMMA))(Affine(), *batch)
    plain = FlowMatching(Uniform())(Affine(), *batch)
    assert set(out) == {'loss', 'mse'} and set(plain) == {'loss'}
    assert torch.equal(out['mse'], plain['loss'])
    torch.testing.assert_close(out['loss'], min((1 - t) ** 2, GAMMA * t**2) * plain['loss'])
