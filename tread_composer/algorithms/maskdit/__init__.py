"""MaskDiT as a Composer algorithm."""

from tread_composer.algorithms.maskdit.decoder import Decoder, Masking, attach_decoder, num_kept
from tread_composer.algorithms.maskdit.maskdit import MaskDiT
from tread_composer.algorithms.maskdit.objective import MaskedEDM

__all__ = ['Decoder', 'MaskDiT', 'MaskedEDM', 'Masking', 'attach_decoder', 'num_kept']
