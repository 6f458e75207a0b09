"""The one place where objectives call a denoiser: float32 on both sides of it, and a refused channel mismatch.

Shapes: B samples, C channels, H x W latent pixels.
"""

from torch import Tensor

from tread_composer.core.protocols import Denoiser

__all__ = ['predict', 'squared_error']

_ONE_CHANNEL = (
    'this objective needs one output channel for each channel of the latents: set `learn_sigma: false` in the model '
    '(weights that have the variance channels: tread_composer.models.without_sigma)'
)
_TWO_CHANNELS = (
    'learned variance needs two output channels for each channel of the latents: set `learn_sigma: true` in the model, '
    'or `learned_variance: false` in the objective'
)


def predict(denoiser: Denoiser, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor, *, learn_sigma: bool = False) -> Tensor:
    """``denoiser(x, t, labels)`` with ``x``, ``t`` and the result in float32; whole timesteps stay integers.

    What happens inside is the denoiser's (autocast, bfloat16 weights); a loss or an integration step computed in
    bfloat16 would lose what it measures. FSDP rounds every float that goes into the network to its weights' precision:
    harmless to a t of about 1, but bfloat16 tells 507 of 1000 timesteps apart.

    Raises:
        ValueError: The prediction's shape is not that of ``x`` (with ``learn_sigma``: that with twice its channels).
    """
    # float64 states of a sampler and bfloat16 latents both arrive in float32.
    out = denoiser(x_BCHW.float(), t_B.float() if t_B.is_floating_point() else t_B, labels_B)
    channels = x_BCHW.shape[1] * (2 if learn_sigma else 1)  # C, or 2C: noise, then the place of the variance
    if out.shape != (x_BCHW.shape[0], channels, *x_BCHW.shape[2:]):
        rule = _TWO_CHANNELS if learn_sigma else _ONE_CHANNEL
        raise ValueError(f'the denoiser returns {list(out.shape)} for latents {list(x_BCHW.shape)}; {rule}')
    return out.float()


def squared_error(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Mean squared difference of each sample: ``[B]``."""
    return (a_BCHW - b_BCHW).square().flatten(1).mean(dim=1)
