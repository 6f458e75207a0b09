"""MaskDiT's network: a DiT whose blocks see the kept tokens only, and a decoder that sees the whole grid.

The DiT's ``forward`` stays as it is. Its first *block* gets a hook that takes the kept tokens out of the sequence
(positions were added by then); its *head* ``final_layer`` is replaced by the decoder, which puts them back on the grid.

Shapes: B samples, N tokens, K kept tokens, D width of the encoder, E width of the decoder, O values of a patch.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tread_composer.core.errors import ResumeError
from tread_composer.core.randomness import KeyedRandom
from tread_composer.models import DiT, DiTBlock
from tread_composer.models.dit import FinalLayer
from tread_composer.models.layers import sincos_positions
from tread_composer.routing.tokens import put_back, take_kept

__all__ = ['Decoder', 'Masking', 'attach_decoder', 'num_kept']

_MLP_RATIO = 4.0


def num_kept(num_tokens: int, mask_ratio: float) -> int:
    """Tokens that the encoder sees: ``int(num_tokens * (1 - mask_ratio))``, truncated as in MaskDiT's code."""
    return int(num_tokens * (1 - mask_ratio))


class Masking:
    """What block list, decoder and objective read: the kept tokens of the following training forwards.

    ``kept``: ascending int64 ids ``[B, K]``; None masks nothing. Evaluation never masks.
    """

    kept: Tensor | None = None


class _TakeKept:
    """Forward pre-hook of the encoder's first block: while training with kept tokens armed, it sees those only."""

    def __init__(self, masking: Masking) -> None:
        self.masking = masking  # an attribute, no closure: a copy of the model copies it with the decoder's

    def __call__(self, block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not block.training or self.masking.kept is None:
            return None
        return (take_kept(args[0], self.masking.kept), *args[1:])  # [B, N, D] -> [B, K, D]


def _conditioned(part: DiTBlock | FinalLayer, condition_size: int) -> nn.Module:
    """A block or head of width E whose shifts, scales and gates come from a condition of width D."""
    outputs = part.adaLN_modulation[1].out_features
    part.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(condition_size, outputs))  # type: ignore[arg-type]
    return part


class Decoder(nn.Module):
    """From the encoder's tokens to patches of the whole grid (MaskDiT, arXiv 2306.09305, section 3).

    It stands where DiT's head stood, under ``final_layer``, and is called like it. ``grid_size`` counts tokens along
    one side, ``encoder_size`` is D, ``hidden_size`` E, ``patch_values`` O. ``ValueError`` if these do not fit together.
    """

    training_only = ('mask_token',)
    """Parameters that sampling does not need."""

    def __init__(
        self,
        *,
        grid_size: int,
        encoder_size: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        patch_values: int,
        masking: Masking,
    ) -> None:
        super().__init__()
        for name, value in (('hidden_size', hidden_size), ('depth', depth), ('num_heads', num_heads)):
            if value < 1:
                raise ValueError(f'decoder_{name}: {value} must be at least 1')
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(
                f'decoder_hidden_size: {hidden_size} must divide by 4 (positions) and by the {num_heads} heads'
            )
        self.masking, self.grid_size = masking, grid_size
        self.settings = {'depth': depth, 'hidden_size': hidden_size, 'num_heads': num_heads}
        self.bridge = FinalLayer(encoder_size, hidden_size)  # a norm modulated by the condition, then a linear layer
        self.mask_token = nn.Parameter(torch.empty(hidden_size))
        # A parameter that is never trained, as DiT's own positions.
        self.positions = nn.Parameter(torch.empty(grid_size**2, hidden_size), requires_grad=False)
        blocks = (DiTBlock(hidden_size, num_heads, _MLP_RATIO) for _ in range(depth))
        self.blocks = nn.ModuleList(_conditioned(block, encoder_size) for block in blocks)
        self.head = _conditioned(FinalLayer(hidden_size, patch_values), encoder_size)
        self.register_load_state_dict_pre_hook(_refuse_weights_without_decoder)

    def forward(self, x_BKD: Tensor, condition_BD: Tensor) -> Tensor:
        """The encoder's tokens (all N in evaluation) to patches ``[B, N, O]``."""
        x = self.bridge(x_BKD, condition_BD)
        kept_BK = self.masking.kept if self.training else None
        if kept_BK is not None:  # [B, K, E] -> [B, N, E], mask tokens between
            x = put_back(self.mask_token.to(x.dtype).expand(x.shape[0], self.grid_size**2, -1), x, kept_BK)
        elif self.training:
            # Without a masked token nothing reads it, and DDP waits for a gradient of every parameter.
            x = x + 0.0 * self.mask_token
        x = x + self.positions
        for block in self.blocks:
            x = block(x, condition_BD)
        return self.head(x, condition_BD)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """The published start: blocks are the identity, bridge and head give 0, the mask token is N(0, 0.02^2).

        Keyed by the seed and each parameter's name, so that the global generator is left alone and all ranks agree.
        """
        random = KeyedRandom(seed, 0, [0])
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            nn.init.zeros_(module.bias)
            if name.endswith('adaLN_modulation.1') or name in ('bridge.linear', 'head.linear'):
                nn.init.zeros_(module.weight)
            else:  # Xavier, uniform
                bound = (6 / sum(module.weight.shape)) ** 0.5
                uniform = random.uniform(f'maskdit/{name}', *module.weight.shape)[0]
                module.weight.copy_((2 * uniform - 1) * bound)
        self.mask_token.copy_(0.02 * random.normal('maskdit/mask_token', *self.mask_token.shape)[0])
        self.positions.copy_(sincos_positions(self.positions.shape[1], self.grid_size))


def attach_decoder(denoiser: nn.Module | None, *, depth: int, hidden_size: int, num_heads: int, seed: int) -> Masking:
    """Make a MaskDiT of a ``DiT``, in place: its own head is gone, since no output would depend on it.

    ``depth``, ``hidden_size`` and ``num_heads`` are those of the decoder; ``seed`` decides its first weights. Applied
    again with the same settings it returns the masking that is there. ``ValueError`` if the network is no fresh DiT,
    predicts a variance, or has a decoder of another size, or the sizes do not fit together.
    """
    if not isinstance(denoiser, DiT):
        kind = 'nothing' if denoiser is None else f'a {type(denoiser).__name__}'
        raise ValueError(f'the encoder must be a tread_composer.models.DiT in `model.denoiser`; here is {kind}')
    if denoiser.out_channels != denoiser.in_channels:
        raise ValueError('the decoder predicts one channel for each of the latents: set model.learn_sigma to false')
    settings = {'depth': depth, 'hidden_size': hidden_size, 'num_heads': num_heads}
    head: nn.Module = denoiser.final_layer
    if isinstance(head, Decoder):
        if head.settings != settings:
            raise ValueError(f'the model has a decoder already, of other sizes: {head.settings} there, {settings} now')
        return head.masking
    if type(denoiser.blocks) is not nn.ModuleList:  # routed, say
        raise ValueError(f'its block list is a {type(denoiser.blocks).__name__} already; give a fresh model')
    masking, like = Masking(), denoiser.pos_embed
    with torch.device('meta'):  # shapes alone: torch's own start would draw from the global generator
        decoder = Decoder(
            grid_size=denoiser.latent_size // denoiser.patch_size,
            encoder_size=denoiser.hidden_size,
            patch_values=denoiser.patch_size**2 * denoiser.in_channels,
            masking=masking,
            **settings,
        )
    decoder.to(like.dtype).to_empty(device=like.device)
    if like.device.type != 'meta':
        decoder.initialise(seed)
    denoiser.final_layer = decoder.train(denoiser.training)  # type: ignore[assignment]
    # Before the hooks of others, which see what the block sees.
    denoiser.blocks[0].register_forward_pre_hook(_TakeKept(masking), prepend=True)
    return masking


def _refuse_weights_without_decoder(decoder: nn.Module, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
    # Composer loads a whole checkpoint without asking for all keys, and torch tells a hook nothing of `strict`.
    if f'{prefix}mask_token' not in state_dict:
        raise ResumeError(
            f'MaskDiT: the weights hold no decoder ({prefix}mask_token is missing): they were trained without MaskDiT. '
            'Take MaskDiT out to go on with them; to start its encoder from them, load them into the DiT before '
            'MaskDiT adds the decoder'
        )
