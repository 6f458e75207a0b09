"""``MaskDiT``: draws the kept tokens of every batch, adds the decoder, and masks the loss."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from composer.core import State, TimeUnit
from composer.loggers import Logger
from composer.utils.module_surgery import update_params_in_optimizer
from torch import nn

from tread_composer.algorithms.base import AlgorithmBase
from tread_composer.algorithms.maskdit.decoder import Masking, attach_decoder, num_kept
from tread_composer.algorithms.maskdit.objective import MaskedEDM
from tread_composer.algorithms.rules import refuse_conflicts
from tread_composer.algorithms.schedule import parse_time, reached
from tread_composer.core.batch import SAMPLE_IDS, UNMASKED_TOKENS
from tread_composer.core.errors import UserError
from tread_composer.core.options import check_bounds
from tread_composer.core.randomness import KeyedRandom
from tread_composer.models import DiT
from tread_composer.objectives import EDM
from tread_composer.routing.tokens import keep_lowest

__all__ = ['MaskDiT']

Unmask = Literal['at_once', 'cosine2', 'cosine3', 'cosine4', 'cosine5', 'cosine6']


class MaskDiT(AlgorithmBase):
    """Train the blocks of a DiT on a random part of the tokens and let a small decoder fill in the others.

    MaskDiT, arXiv 2306.09305. Works on a ``LatentDiffusion`` whose denoiser is a ``DiT`` and whose objective is
    ``EDM``: the reconstruction compares EDM's *denoised latents* with the noisy ones, and is not defined for a network
    that predicts a velocity.

    On ``Event.INIT`` DiT's head ``final_layer`` is replaced by the decoder, the objective becomes its masked form, and
    the optimizer gets the decoder's parameters in place of the head's. The kept tokens are drawn for the whole device
    batch, keyed by (seed, batch, sample). Evaluation and sampling run encoder and decoder on all tokens. What differs
    from the authors' code is in the method card (README.md).

    Logs ``maskdit/mask_ratio`` and ``maskdit/kept_tokens``; the loss's terms as ``loss/train/dsm`` and
    ``loss/train/mae``.

    Args:
        mask_ratio: Share of the tokens that the encoder does not see, in [0, 1). ``int(N * (1 - mask_ratio))`` are
            kept. 0 trains encoder and decoder on all tokens (the paper's unmasking tuning).
        mae_weight: Weight of the reconstruction of masked patches.
        unmask_time: Composer time string from which on tokens are unmasked; never if None. ``'0dur'`` is the whole
            run.
        unmask: How: ``'at_once'``, or ``'cosine<n>'``, where the ratio falls as ``mask_ratio * cos(pi x / 2) ** n``
            with the progress x from ``unmask_time`` (a share of the run) to its end. With ``max_duration`` in epochs
            the progress moves once an epoch.
        decoder_depth: Blocks of the decoder.
        decoder_hidden_size: Width of the decoder.
        decoder_num_heads: Attention heads of a decoder block.

    Raises:
        ValueError: A setting is wrong in itself; on ``Event.INIT``, one that does not fit the model.

    Example:
        ``Trainer(model=model, algorithms=[MaskDiT()], ...)``
    """

    _masking: Masking  # since Event.INIT

    def __init__(
        self,
        mask_ratio: float = 0.5,
        *,
        mae_weight: float = 0.1,
        unmask_time: str | None = None,
        unmask: Unmask = 'at_once',
        decoder_depth: int = 8,
        decoder_hidden_size: int = 512,
        decoder_num_heads: int = 16,
    ) -> None:
        for name, hint, value in (
            ('mask_ratio', float, mask_ratio),
            ('mae_weight', float, mae_weight),
            ('decoder_depth', int, decoder_depth),
            ('decoder_hidden_size', int, decoder_hidden_size),
            ('decoder_num_heads', int, decoder_num_heads),
        ):
            check_bounds(name, hint, value)
        if not 0 <= mask_ratio < 1:
            raise ValueError(f'mask_ratio: {mask_ratio!r} is not in [0, 1); it is the share of tokens that are masked')
        if mae_weight < 0:
            raise ValueError(f'mae_weight: {mae_weight!r} must not be negative; 0 leaves the reconstruction out')
        if unmask not in get_args(Unmask):
            raise ValueError(f'unmask: {unmask!r} is none of {", ".join(get_args(Unmask))}')
        self._from = parse_time(unmask_time, 'unmask_time')
        if self._from is not None and not mask_ratio:
            raise ValueError(f'unmask_time: {unmask_time!r} with mask_ratio 0, which masks nothing; leave it out')
        if unmask != 'at_once' and (self._from is None or self._from.unit != TimeUnit.DURATION or self._from >= 1):
            raise ValueError(
                f'unmask: {unmask!r} runs to the end of training, so unmask_time must be the share of it where that '
                f"begins, such as '0.9dur' ('0dur' for the whole run), not {unmask_time!r}"
            )
        self.mask_ratio, self.mae_weight = float(mask_ratio), float(mae_weight)
        self.unmask_time, self.unmask = unmask_time, unmask
        self.decoder_depth, self.decoder_hidden_size = decoder_depth, decoder_hidden_size
        self.decoder_num_heads = decoder_num_heads
        self._num_tokens = 0
        self._ratio, self._kept = 0.0, 0  # of this batch

    def settings(self) -> dict[str, Any]:
        """What a checkpoint is bound to."""
        names = ('mask_ratio', 'mae_weight', 'unmask_time', 'unmask')
        return {**{name: getattr(self, name) for name in names}, 'decoder': self._decoder()}

    @staticmethod
    def required_on_load() -> bool:
        """True: the checkpoint's weights have a decoder that the model has only with this algorithm."""
        return True

    def problems(self, config: Any) -> Iterator[tuple[str, str]]:
        """What speaks against it in a run with this ``Config``: pairs of a setting ('' for all of it) and a text."""
        if (fault := _objective_fault(config.objective.instance)) is not None:
            yield '', fault
        if config.model.name != 'dit':
            yield (
                '',
                "is defined on a DiT alone (its decoder is made of DiT's blocks and takes the place of DiT's head), "
                f'and model.name is {config.model.name!r}; take model.name: dit, or route tokens instead '
                '(algorithms.tread)',
            )

    def cost_window(self) -> tuple[str | None, str | None]:
        """The whole run, as time strings; ``UserError`` if tokens are unmasked, which changes the cost step by step."""
        if self.unmask_time is not None:
            raise UserError(f'masking changes during the run (unmask_time {self.unmask_time})')
        return None, None

    def tokens_per_block(self, depth: int, num_tokens: int) -> list[int]:
        """How many tokens each block of the encoder sees before any is unmasked."""
        return [num_kept(num_tokens, self.mask_ratio)] * depth

    @property
    def active(self) -> bool:
        """Whether tokens of the batch in hand are masked."""
        return self._kept < self._num_tokens

    def plan_rows(self, plan: Mapping[str, Any]) -> dict[str, str]:
        """What ``plan`` prints of the masking: the tokens that the encoder sees, and when that ends."""
        kept, num_tokens = plan['tokens_per_block'][0], plan['num_tokens']
        text = f'the encoder sees {kept} of {num_tokens} tokens, the decoder all'
        if self.unmask_time is not None:
            manner = 'at once' if self.unmask == 'at_once' else f'by {self.unmask}'
            text += f'; from {self.unmask_time} unmasked {manner}'
        return {'route': 'none', 'masking': text}

    @contextlib.contextmanager
    def rehearse(self, denoiser: Any, batch_size: int) -> Iterator[None]:
        """Add the decoder to a network without values, which keeps it, and mask its training forwards."""
        masking = self._attach(denoiser)
        kept = num_kept(denoiser.num_tokens, self.mask_ratio)
        if kept < denoiser.num_tokens:
            device = next(denoiser.parameters()).device
            masking.kept = torch.zeros(batch_size, kept, dtype=torch.int64, device=device)  # shapes are all that counts
        try:
            yield
        finally:
            masking.kept = None

    def _attach(self, denoiser: Any, seed: int = 0) -> Masking:
        masking = attach_decoder(denoiser, **self._decoder(), seed=seed)
        if num_kept(denoiser.num_tokens, self.mask_ratio) < 1:
            raise ValueError(
                f'mask_ratio: {self.mask_ratio} of {denoiser.num_tokens} tokens leaves none to the encoder; lower it'
            )
        return masking

    def _decoder(self) -> dict[str, int]:
        return {name: getattr(self, f'decoder_{name}') for name in ('depth', 'hidden_size', 'num_heads')}

    def prepare(self, model: nn.Module, seed: int = 0) -> Masking:
        """Add decoder and masked loss to a ``LatentDiffusion``, as on ``Event.INIT``; a second time it does nothing.

        To be called before an optimizer with several parameter groups is made: on ``Event.INIT`` it could not be
        known to which of them the decoder's parameters belong. ``ValueError`` if the model is not as the class says.
        """
        objective: Any = getattr(model, 'objective', None)
        if (fault := _objective_fault(objective)) is not None:
            raise ValueError(fault)
        denoiser: Any = getattr(model, 'denoiser', None)
        masking = self._attach(denoiser, seed)
        model.objective = MaskedEDM.of(objective, masking, self.mae_weight, denoiser.patch_size)  # type: ignore[assignment]
        return masking

    def _on_init(self, state: State, logger: Logger) -> None:
        super()._on_init(state, logger)
        denoiser: Any = getattr(state.model, 'denoiser', None)
        head = list(denoiser.final_layer.parameters()) if isinstance(denoiser, DiT) else []
        try:
            self._masking = self.prepare(state.model, state.rank_zero_seed)
            if state.optimizers:
                decoder = [p for p in denoiser.final_layer.parameters() if p.requires_grad]
                _hand_over(state.optimizers, head, decoder)
        except ValueError as error:
            raise UserError(f'algorithms.maskdit: {error}') from None
        refuse_conflicts(self, state)  # again: the decoder's gates and head start at zero
        self._num_tokens, self._masking.kept = denoiser.num_tokens, None

    def _on_batch_start(self, state: State, logger: Logger) -> None:
        self._ratio = self._mask_ratio_at(state)
        self._kept = num_kept(self._num_tokens, self._ratio)
        if self._kept == self._num_tokens:
            return
        if not isinstance(state.batch, dict) or SAMPLE_IDS not in state.batch:
            raise ValueError(f'MaskDiT: the batch must be a dict with {SAMPLE_IDS!r}, by which its masks are drawn')
        random = KeyedRandom(state.rank_zero_seed, int(state.timestamp.batch), state.batch[SAMPLE_IDS].tolist())
        state.batch[UNMASKED_TOKENS] = keep_lowest(random.uniform('maskdit', self._num_tokens), self._kept)  # [B, K]

    def _on_before_forward(self, state: State, logger: Logger) -> None:
        kept_BK = state.batch.get(UNMASKED_TOKENS)
        self._masking.kept = None if kept_BK is None else state.device.tensor_to_device(kept_BK)

    def _on_after_backward(self, state: State, logger: Logger) -> None:
        # Not earlier: activation checkpointing may run the network again during backward.
        self._masking.kept = None

    def _on_batch_end(self, state: State, logger: Logger) -> None:
        logger.log_metrics({'maskdit/mask_ratio': self._ratio, 'maskdit/kept_tokens': self._kept})

    def _mask_ratio_at(self, state: State) -> float:
        if self._from is None or not reached(self._from, state):
            return self.mask_ratio
        if self.unmask == 'at_once':
            return 0.0
        elapsed = state.get_elapsed_duration()
        assert elapsed is not None  # `reached` has refused a run without an end
        begin = float(self._from.value)
        progress = (elapsed.value - begin) / (1 - begin)
        return self.mask_ratio * math.cos(math.pi / 2 * progress) ** int(self.unmask[-1])  # as in MaskDiT's code


def _objective_fault(objective: object) -> str | None:
    # For the prediction of another objective the paper defines no reconstruction.
    if type(objective) in (EDM, MaskedEDM):
        return None
    name = getattr(objective, 'name', type(objective).__name__)
    return (
        'MaskDiT is defined for the objective edm alone (its reconstruction compares the denoised latents of EDM with '
        f'the noisy ones), and objective.name is {name!r}; take objective={{name: edm}}'
    )


def _hand_over(
    optimizers: Sequence[torch.optim.Optimizer], head: list[nn.Parameter], decoder: list[nn.Parameter]
) -> None:
    """The optimizer trains the decoder in place of the head, in the same group; no-op where it has it already."""
    trained = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group['params']}
    missing = [parameter for parameter in decoder if id(parameter) not in trained]
    if not missing:
        return
    remedy = 'Call MaskDiT(...).prepare(model) first and make the optimizer of the parameters that the model has then'
    if not trained.issuperset(map(id, head)) or len(missing) != len(decoder):
        raise ValueError(f'the optimizer does not train the head of the model, so it is not known how to train the '
                         f'decoder that replaces it. {remedy}')  # fmt: skip
    try:
        update_params_in_optimizer(head, decoder, optimizers)
    except (RuntimeError, NotImplementedError) as error:  # Composer's words for several optimizers, or groups
        text = ' '.join(str(error).split())
        raise ValueError(f'the optimizer cannot take over the parameters of the decoder: {text} {remedy}') from None
