"""What averages of the weights share: which weights, under which names, and the part of each that this rank holds.

Data parallelism keeps whole parameters on each rank, FSDP2 a DTensor, FSDP1 a piece of each parameter's values in a
row. An average must be kept beside whatever there is, and must be saved so that any other of them can take it over.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as torch_dist
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp._runtime_utils import _reshard as _reshard_fsdp1
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from tread_composer.algorithms.base import AlgorithmBase
from tread_composer.core.errors import ResumeError, UserError

__all__ = ['Averages', 'AveragingAlgorithm', 'Shard', 'shards_of']

_WRAPPERS = ('_fsdp_wrapped_module.', '_checkpoint_wrapped_module.', '_orig_mod.')


class _Piece(NamedTuple):
    """Where FSDP1's piece of a parameter lies in the whole, whose values stand in one row."""

    shape: torch.Size  # of the whole
    start: int
    group: torch_dist.ProcessGroup


@dataclasses.dataclass(frozen=True)
class Shard:
    """The part of one parameter that this rank holds: all of it, unless FSDP shards the model."""

    parameter: nn.Parameter
    _piece: _Piece | None = None

    @property
    @torch.no_grad()
    def local(self) -> Tensor:
        """This rank's values, without gradient. They are the parameter's own memory: writing here trains or swaps."""
        parameter = self.parameter.detach()
        return parameter.to_local() if isinstance(parameter, DTensor) else parameter

    @torch.no_grad()
    def whole(self, local: Tensor) -> Tensor:
        """The full tensor on the CPU, of values in place of ``self.local``. All ranks must ask at once."""
        parameter = self.parameter
        if isinstance(parameter, DTensor):
            sharded = DTensor.from_local(
                local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
            )
            local = sharded.full_tensor()
        elif self._piece is not None:
            row = local.new_zeros(self._piece.shape.numel())
            row[self._piece.start : self._piece.start + local.numel()] = local
            torch_dist.all_reduce(row, group=self._piece.group)  # every other rank has zeros there
            local = row.view(self._piece.shape)
        return local.detach().to('cpu', copy=True)

    @torch.no_grad()
    def cut(self, whole: Tensor) -> Tensor:
        """This rank's part of a full tensor, a float32 copy on the parameter's device. Needs no other rank."""
        parameter = self.parameter
        if isinstance(parameter, DTensor):
            value = whole.to(parameter.device, torch.float32)
            # src_data_rank=None: every rank cuts its own copy instead of waiting for rank 0's.
            sharded = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
            return sharded.to_local().clone()
        if self._piece is not None:
            whole = whole.reshape(-1)[self._piece.start : self._piece.start + parameter.numel()]
        return whole.to(parameter.device, torch.float32, copy=True)


def shards_of(model: nn.Module) -> dict[str, Shard]:
    """All parameters under the names that they have in the unwrapped model; asked anew, as they may be exchanged."""
    model = model.module if isinstance(model, DistributedDataParallel) else model
    pieces, named = _fsdp1_pieces(model), {}
    for name, parameter in model.named_parameters():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, '')
        named[name] = Shard(parameter, pieces.get(id(parameter)))
    return named


class Averages:
    """Float32 averages of the trainable weights, one for each key: of this rank's shards, or as loaded, in full."""

    def __init__(self, owner: str, keys: Iterable[Any]) -> None:
        self.owner, self.keys = owner, tuple(keys)
        self.local: dict[Any, dict[str, Tensor]] = {}  # of this rank's shards, by parameter
        self.loaded: dict[Any, dict[str, Tensor]] = {}  # full tensors from a checkpoint, until training starts
        self.shards: dict[str, Shard] = {}  # of the moment

    def load(self, averages: Mapping[Any, dict[str, Tensor]]) -> None:
        """Take over full tensors; they are laid out like the parameters at the next use."""
        self.local, self.loaded = {}, dict(averages)

    @torch.no_grad()
    def lay_out(self, model: nn.Module) -> None:
        """Find the shards of this moment; begin the averages as copies of the weights, or cut the loaded ones.

        ``ResumeError`` if those are of other parameters than the model has; ``UserError`` if one has thawed since.
        """
        self.shards = shards_of(model)
        trainable = {name: shard for name, shard in self.shards.items() if shard.parameter.requires_grad}
        if self.local:
            thawed = sorted(trainable.keys() - self.local[self.keys[0]].keys())
            if thawed:  # an evaluation would see their raw weights among averaged ones
                raise UserError(
                    f'{self.owner}: {len(thawed)} parameters were frozen when the average began and train by now '
                    f'({", ".join(thawed[:5])}), so it has no average of them. Let all that will be trained require '
                    'gradients from the start, and hold it by a learning rate of 0 meanwhile; or thaw it for a new run '
                    'from the weights alone (load_weights_only: true)'
                )
            return
        if not self.loaded:
            for key in self.keys:
                self.local[key] = {name: shard.local.float().clone() for name, shard in trainable.items()}
            return
        names = self.loaded[self.keys[0]].keys()
        # A layer that is frozen by now stays in the average; one that thaws could not be.
        missing, strange = trainable.keys() - names, names - self.shards.keys()
        if missing or strange:
            raise ResumeError(
                f'{self.owner}: the checkpoint averages other parameters than the model has. Not in the checkpoint: '
                f'{sorted(missing)[:5]}; not in the model: {sorted(strange)[:5]}'
            )
        for key, average in self.loaded.items():
            self.local[key] = {name: self.shards[name].cut(whole) for name, whole in average.items()}
        self.loaded = {}

    @torch.no_grad()
    def update(self, model: nn.Module, shares: Mapping[Any, float]) -> None:
        """``average = (1 - share) * average + share * weights``, with the share of each key."""
        self.lay_out(model)
        for key, average in self.local.items():
            weights = [self.shards[name].local.float() for name in average]
            torch._foreach_lerp_(list(average.values()), weights, shares[key])  # type: ignore[attr-defined]

    def whole(self) -> dict[Any, dict[str, Tensor]]:
        """Full tensors on the CPU of rank 0, none on the others, all of which must ask; as loaded before training."""
        gathered: dict[Any, dict[str, Tensor]] = {key: {} for key in self.local}
        for key, average in self.local.items():
            for name, local in average.items():
                tensor = self.shards[name].whole(local)
                if dist.get_global_rank() == 0:
                    gathered[key][name] = tensor
        return gathered or self.loaded


class AveragingAlgorithm(AlgorithmBase):
    """An algorithm that keeps ``Averages`` of the weights."""

    _averages: Averages

    def _on_init(self, state: State, logger: Logger) -> None:
        """Refuse sharding that leaves no parameter by its own name."""
        super()._on_init(state, logger)
        name = type(self).__name__
        if state.tp_config is not None:
            raise UserError(
                f'{name} cannot average under tensor parallelism: Composer shards those weights a second time with '
                f'FSDP1, and no rank then knows its part of a parameter. Take tp out of parallelism_config, or {name} '
                f'out'
            )
        if state.fsdp_config is not None and not state.fsdp_config.use_orig_params:
            raise UserError(
                f'{name} cannot average with parallelism_config.fsdp.use_orig_params: false, where FSDP1 joins the '
                f'parameters of a block into one without their names. Set it to true, which is the default'
            )

    def _on_fit_start(self, state: State, logger: Logger) -> None:
        self._averages.lay_out(state.model)


def _fsdp1_pieces(model: nn.Module) -> dict[int, _Piece]:
    """For each parameter that FSDP1 has sharded, by its id; what either FSDP holds gathered is dropped on the way.

    FSDP leaves the outermost module gathered after a forward pass without backward (an evaluation). Its copy would be
    used in the next forward pass whatever is written to the shards.
    """
    pieces: dict[int, _Piece] = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
        handle = module._handle if isinstance(module, FullyShardedDataParallel) else None
        if handle is None or not handle.uses_sharded_strategy:
            continue
        flat, group = handle.flat_param, module.process_group
        # FSDP1 has no public call for it, and no copy before the first forward pass.
        if hasattr(flat, '_full_param_padded') and not handle.needs_unshard():
            _reshard_fsdp1(module, handle, True)
        assert flat._params is not None and group is not None
        # Only FSDP's own book-keeping knows the whole's shape.
        for parameter, shape, info in zip(flat._params, flat._shapes, flat._shard_param_infos, strict=True):
            start = info.intra_param_start_idx or 0  # None where this rank holds nothing of it
            pieces[id(parameter)] = _Piece(shape, start, group)  # type: ignore[arg-type]
    return pieces
