"""Loss weights by signal-to-noise ratio: min-SNR-gamma (Hang et al. 2023, arXiv 2303.09556), for each prediction.

Min-SNR weighs the squared error of the data ``x0`` with ``min(SNR, gamma)``. A network that predicts something else
makes an error that is a known multiple of the error of ``x0``; the weight is divided by it, so that all forms are one
and the same loss. With ``x_t = alpha x0 + sigma noise`` and ``SNR = alpha^2 / sigma^2``:

* ``x0``: nothing to convert, ``min(SNR, gamma)``.
* ``eps`` (the noise): ``x0 = (x_t - sigma eps) / alpha``, so ``|dx0|^2 = |deps|^2 / SNR`` and the weight is
  ``min(SNR, gamma) / SNR``.
* ``v`` (``alpha noise - sigma x0`` on a path with ``alpha^2 + sigma^2 = 1``): ``x0 = alpha x_t - sigma v``, so
  ``|dx0|^2 = sigma^2 |dv|^2`` with ``sigma^2 = 1 / (SNR + 1)`` and the weight is ``min(SNR, gamma) / (SNR + 1)``.
* ``flow`` (``noise - x0`` on the straight path, ``alpha = 1 - t`` and ``sigma = t``; not the ``v`` above, since
  ``alpha^2 + sigma^2`` is not 1 here): ``x_t = x0 + t (noise - x0)``, hence ``x0 = x_t - t v`` and
  ``|dx0|^2 = t^2 |dv|^2``. From ``SNR = (1 - t)^2 / t^2`` follows ``t = 1 / (sqrt(SNR) + 1)``, and the weight is
  ``min(SNR, gamma) / (sqrt(SNR) + 1)^2 = min((1 - t)^2, gamma t^2)``.

SNR is the path's own ratio, as in the paper: the strength of the data (``tread_composer.objectives.snr``) is not in it.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tread_composer.core.bounds import Positive
from tread_composer.core.options import Checked

__all__ = ['MinSNR', 'Prediction', 'check_weighting']

Prediction = Literal['x0', 'eps', 'v', 'flow']
"""What the network predicts; see the module's text."""


@dataclass(frozen=True)
class MinSNR(Checked):
    """Min-SNR-gamma as an objective's option.

    Args:
        gamma: Where the weight of the data's error stops to grow; the paper takes 5.
    """

    gamma: Positive = 5.0

    def __call__(self, snr: Tensor, prediction: Prediction) -> Tensor:
        """The weight on the squared error of what the network predicts, in the shape and dtype of ``snr``.

        ``snr`` is ``alpha^2 / sigma^2``, 0 and infinity included.

        Raises:
            ValueError: There is no such prediction.
        """
        clamped = snr.clamp(max=self.gamma)
        if prediction == 'x0':
            return clamped
        # Each divides by the factor between the squared errors of x0 and of the prediction (see the module).
        if prediction == 'eps':
            return (self.gamma / snr).clamp(max=1.0)  # the same, and 1 at SNR 0
        if prediction == 'v':
            return clamped / (snr + 1)  # |dx0|^2 = |dv|^2 / (SNR + 1)
        if prediction == 'flow':
            return clamped / (snr.sqrt() + 1).square()  # t^2 = 1 / (sqrt(SNR) + 1)^2
        raise ValueError(f"prediction={prediction!r}: choose 'x0', 'eps', 'v' or 'flow'")


def check_weighting(name: str, value: object) -> None:
    """Refuse what weighs nothing; the ``ValueError`` calls it ``name``."""
    if value is not None and (isinstance(value, type) or not callable(value)):
        raise ValueError(
            f'{name}: {value!r} is no weighting; give None, MinSNR(), or a function of yours (snr_B, prediction)'
        )
