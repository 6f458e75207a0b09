"""The networks that ``step_time.py`` times, each with its optimizer: dense, routed, and a peer.

All see one batch, one objective and one optimizer setting; dense and routed start from equal weights.

Shapes: B samples, C channels, H x W latent pixels, N tokens.
"""

import contextlib
import copy
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from composer.core import Event, State
from composer.loggers import Logger
from composer.utils import get_device
from torch import Tensor, nn

from tread_composer.builders.model import build_model
from tread_composer.builders.trainer import compile_blocks
from tread_composer.config import Config, load_config
from tread_composer.config.tree import backbone_arguments
from tread_composer.core.batch import LABEL_DROPPED, LABELS, NOISE, RAW_LATENTS, SAMPLE_IDS, TIME_QUANTILES
from tread_composer.core.errors import UserError
from tread_composer.core.randomness import KeyedRandom
from tread_composer.data.manifest import LatentFacts
from tread_composer.latent_diffusion import LatentDiffusion
from tread_composer.run.plan import make_plan

__all__ = ['Contender', 'Problem', 'Routed', 'compile_contender', 'make_contenders', 'read_problem']

SEED = 17


@dataclass(frozen=True)
class Problem:
    """What is to be timed.

    Args:
        config: With ``algorithms.tread``.
        facts: Of the latents.
        plan: The figures of ``tread_composer.run.plan``; GMACs per image of the dense and the routed forward pass.
        batch_size: B.
        dtype: ``'fp32'``, or ``'bf16'`` for autocast over float32 weights, as ``precision: amp_bf16`` trains.
        device: Where.
    """

    config: Config
    facts: LatentFacts
    plan: Mapping[str, Any]
    batch_size: int
    dtype: str
    device: torch.device

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """The context of a forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == 'bf16')

    def batch(self) -> dict[str, Tensor]:
        """A batch of noise with all that ``KeyedDraws`` would have put into it; the ids stay on the CPU, as there."""
        random = KeyedRandom(SEED, 0, range(self.batch_size))
        classes = max(self.facts.num_classes, 1)
        entries = {
            RAW_LATENTS: random.normal('latents', *self.facts.latent_shape),
            LABELS: (random.uniform('labels') * classes).long(),
            NOISE: random.normal('noise', *self.facts.latent_shape),
            TIME_QUANTILES: random.uniform('time'),
            LABEL_DROPPED: random.uniform('label dropout') < self.config.label_dropout,
        }
        moved = {name: value.to(self.device) for name, value in entries.items()}
        return {**moved, SAMPLE_IDS: torch.arange(self.batch_size)}


def read_problem(
    yaml: str,
    overrides: Sequence[str],
    *,
    batch_size: int | None,
    tokens: int | None,
    dtype: str,
    device: torch.device,
) -> Problem:
    """Load a recipe; where it has no route, with that of ``Tread()``.

    Args:
        yaml: The recipe.
        overrides: ``key=value`` texts.
        batch_size: Samples of a step; the recipe's microbatch, or else its whole batch, if None.
        tokens: Tokens of a sample; the recipe's if None.
        dtype: See ``Problem``.
        device: See ``Problem``.

    Raises:
        UserError: The recipe is wrong, or cannot be timed.
    """
    overrides, config = list(overrides), load_config(yaml, overrides, world_size=1)
    if 'tread' not in config.algorithms:
        overrides.append('algorithms.tread={}')
    if batch_size is None:
        micro = config.device_train_microbatch_size
        batch_size = micro if isinstance(micro, int) else config.global_train_batch_size
    overrides += [f'global_train_batch_size={batch_size}', f'device_train_microbatch_size={batch_size}']
    if tokens is not None:
        overrides.append(f'data.latent_size={_latent_size(config, tokens)}')
    config = load_config(yaml, overrides, world_size=1)
    if 'maskdit' in config.algorithms:
        raise UserError(
            f'{yaml}: algorithms.maskdit: only dense and routed steps are timed; add algorithms.maskdit=null'
        )
    plan = make_plan(config, 1, memory=False)
    channels, size, classes = plan['channels'], plan['latent_size'], plan['num_classes']
    # Statistics of the data matter to nobody here: the latents are noise of mean 0 and deviation 1.
    facts = LatentFacts(
        channels=channels,
        latent_height=size,
        latent_width=size,
        num_classes=classes,
        class_names=tuple(map(str, range(classes))),
        autoencoder=None,
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
    )
    return Problem(config, facts, plan, batch_size, dtype, device)


def _latent_size(config: Config, tokens: int) -> int:
    side, patch = math.isqrt(tokens), backbone_arguments(config.model).get('patch_size')
    if config.data.name != 'latents' or patch is None:
        raise UserError(f'--tokens: the data of {config.run_name!r} have a fixed size; choose a recipe with latents')
    if side * side != tokens:
        raise UserError(f'--tokens: {tokens} is no square; latents are square grids of tokens: 64, 256, 1024, ...')
    return side * patch


class Contender:
    """A network in training on one batch.

    Args:
        name: What rows call it.
        model: With its objective.
        problem: What to train it on.
        gmacs: Multiply-adds of a training forward for one image, in 10^9; None if not counted.
        optimizer: Of the model, where another contender trains it too; by default made as the recipe says.
    """

    def __init__(
        self,
        name: str,
        model: LatentDiffusion,
        problem: Problem,
        gmacs: float | None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.name, self.problem, self.gmacs = name, problem, gmacs
        self.model = model.to(problem.device).train()
        self.network: nn.Module = self.model  # what runs a batch: the model, or DistributedDataParallel around it
        self.batch = problem.batch()
        self.optimizer: torch.optim.Optimizer = (
            optimizer or problem.config.optimizer.build(self.model.parameters())
        )  # fmt: skip

    @property
    def step_flops(self) -> float | None:
        """FLOPs of a step: two for a multiply-add, and a backward pass is two forward passes."""
        return None if self.gmacs is None else 6e9 * self.gmacs * self.problem.batch_size

    def given(self) -> Mapping[str, Tensor]:
        """The batch of the next forward pass."""
        return self.batch

    def finished(self) -> None:
        """Called when the forward and the backward pass are done."""

    def loss(self) -> Tensor:
        """A forward pass."""
        batch = self.given()
        with self.problem.precision():
            loss = self.model.loss(self.network(batch), batch)
        return loss['total'] if isinstance(loss, Mapping) else loss

    def step(self, mark: Callable[[], Any]) -> tuple[Any, Any, Any]:
        """Train one step; marks at its begin, between the backward pass and the optimizer, and at its end."""
        begin = mark()
        self.loss().backward()
        self.finished()
        middle = mark()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return begin, middle, mark()

    def held_bytes(self) -> int:
        """Weights, buffers and the optimizer's moments: what stays on the device between two steps."""
        moments = [value for entry in self.optimizer.state.values() for value in entry.values()]
        tensors = [*self.model.parameters(), *self.model.buffers(), *moments]
        return sum(value.nbytes for value in tensors if isinstance(value, Tensor))


class Routed(Contender):
    """The network with the recipe's ``Tread``, which draws as it does in a ``Trainer``: by its events."""

    def __init__(self, model: LatentDiffusion, problem: Problem) -> None:
        super().__init__('routed', model, problem, problem.plan['gmacs_routed'])
        self.tread = problem.config.algorithms['tread'].build()
        device = get_device('gpu' if problem.device.type == 'cuda' else 'cpu')
        self.state = State(model=model, rank_zero_seed=SEED, run_name='step_time', device=device)
        self.logger = Logger(self.state)
        self._event(Event.INIT)

    def given(self) -> Mapping[str, Tensor]:
        """Each step draws another route for every sample."""
        self.state.batch = dict(self.batch)
        for event in (Event.BATCH_START, Event.BEFORE_TRAIN_BATCH, Event.BEFORE_FORWARD):
            self._event(event)
        return self.state.batch

    def finished(self) -> None:
        """As the Trainer says it."""
        for event in (Event.AFTER_FORWARD, Event.AFTER_BACKWARD):
            self._event(event)
        self.state.timestamp = self.state.timestamp.to_next_batch(samples=self.problem.batch_size)

    def _event(self, event: Event) -> None:
        self.tread.apply(event, self.state, self.logger)


class FirstChannels(nn.Module):
    """A network that also predicts variances, without them."""

    def __init__(self, network: nn.Module, channels: int) -> None:
        super().__init__()
        self.network, self.channels = network, channels

    def forward(self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor) -> Tensor:
        """The first C channels."""
        return self.network(x_BCHW, t_B, labels_B)[:, : self.channels]


def make_contenders(problem: Problem, peers: Sequence[str] = (), *, one_network: bool = False) -> list[Contender]:
    """Dense, routed and the peers.

    Args:
        problem: What to time.
        peers: ``package.module:callable`` each; called without arguments it returns a network of (x, t, y).
        one_network: Dense and routed steps train the same weights, which then need to fit into memory once only.
            Between the steps of the routed contender its route is off.
    """
    torch.manual_seed(SEED)
    model = build_model(problem.config, problem.facts)
    fill_zeros(model)
    dense_model = model if one_network else copy.deepcopy(model)
    routed = Routed(model, problem)
    dense = Contender(
        'dense', dense_model, problem, problem.plan['gmacs_dense'], routed.optimizer if one_network else None
    )
    return [dense, routed, *(_peer(name, problem) for name in peers)]


def fill_zeros(model: nn.Module) -> None:
    """Small random weights for those that start at zero (adaLN-Zero).

    Behind a gate that is zero all gradients are zero too, and a GPU multiplies zeros faster.
    """
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)


def _peer(name: str, problem: Problem) -> Contender:
    module, _, attribute = name.partition(':')
    try:
        network = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f'--peer: {name!r}: {error}; give package.module:callable') from error
    fill_zeros(network)
    config, facts = problem.config, problem.facts
    model = LatentDiffusion(
        FirstChannels(network, facts.channels),
        config.objective.instance,
        latent_shape=facts.latent_shape,
        num_classes=facts.num_classes,
        label_dropout=config.label_dropout,
    )
    return Contender(name, model, problem, None)


def compile_contender(contender: Contender, how: str, **settings: Any) -> None:
    """Compile in place: each block (``'blocks'``; a peer names its own by ``fsdp_wrap_fn``), or all in one."""
    denoiser = contender.model.denoiser
    network = denoiser.network if isinstance(denoiser, FirstChannels) else denoiser
    if how == 'blocks' and hasattr(network, 'fsdp_wrap_fn'):
        compile_blocks(network, **settings)
    else:
        contender.model.compile(**settings)
