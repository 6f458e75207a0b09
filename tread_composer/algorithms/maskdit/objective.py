"""MaskDiT's loss: EDM on the kept patches, reconstruction of the noisy input on the masked ones.

Shapes: B samples, C channels, H x W latent pixels, N patches (tokens), K kept patches, P values of a patch.
"""

import dataclasses

import torch
from torch import Tensor

from tread_composer.algorithms.maskdit.decoder import Masking
from tread_composer.core.protocols import Denoiser
from tread_composer.objectives import EDM
from tread_composer.routing.tokens import take_kept

__all__ = ['MaskedEDM', 'patches']

_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class MaskedEDM(EDM):
    """EDM with MaskDiT's masked training loss (arXiv 2306.09305, section 3.3); sampling is EDM's.

    Without kept patches in ``masking``, and in evaluation, the loss is EDM's own.
    """

    masking: Masking = dataclasses.field(default_factory=Masking, compare=False)
    mae_weight: float = 0.1  # of the reconstruction
    patch_size: int = 2

    @classmethod
    def of(cls, objective: EDM, masking: Masking, mae_weight: float, patch_size: int) -> 'MaskedEDM':
        """The masked form of an objective."""
        settings = {entry.name: getattr(objective, entry.name) for entry in dataclasses.fields(EDM)}
        return cls(**settings, masking=masking, mae_weight=mae_weight, patch_size=patch_size)

    def __call__(
        self, denoiser: Denoiser, latents_BCHW: Tensor, labels_B: Tensor, noise_BCHW: Tensor, quantiles_B: Tensor, /
    ) -> dict[str, Tensor]:
        """Per-sample losses ``[B]``: ``loss = dsm + mae_weight * mae``, and the two terms.

        ``dsm``: EDM's weighted squared error of the denoised latents, mean over the kept patches. ``mae``: squared
        error of the denoised latents against the *noisy* ones, whose patches are normalised one by one to mean 0 and
        (unbiased) variance 1; mean over the masked patches. Without masked patches there is no ``mae``.
        """
        training = denoiser.training  # type: ignore[attr-defined]
        kept_BK = self.masking.kept if training else None
        if kept_BK is None:
            losses = super().__call__(denoiser, latents_BCHW, labels_B, noise_BCHW, quantiles_B)
            return {**losses, 'dsm': losses['loss']} if training else losses
        x = latents_BCHW.float()
        noisy, sigma_B = self.training_noise(x, noise_BCHW, quantiles_B)
        denoised = self.denoise(denoiser, noisy, sigma_B, labels_B)
        # Mean over the values of a patch, then over the kept ones.
        errors_BN = patches((denoised - x).square(), self.patch_size).mean(2)
        dsm_B = self.weight(sigma_B) * take_kept(errors_BN, kept_BK).mean(1)
        noisy_BNP = patches(noisy, self.patch_size)
        variance, mean = torch.var_mean(noisy_BNP, dim=2, keepdim=True)  # unbiased, as in the authors' code
        differences_BNP = patches(denoised, self.patch_size) - (noisy_BNP - mean) / (variance + _EPS).sqrt()
        masked_BN = torch.ones_like(errors_BN).scatter(1, kept_BK, 0.0)
        mae_B = (differences_BNP.square().mean(2) * masked_BN).sum(1) / masked_BN.sum(1)
        return {'loss': dsm_B + self.mae_weight * mae_B, 'dsm': dsm_B, 'mae': mae_B}


def patches(x_BCHW: Tensor, patch_size: int) -> Tensor:
    """Cut into patches in raster order: ``[B, N, P]``."""
    x = x_BCHW.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # [B, C, rows, p, columns, p]
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
