"""What averages of the weights share: which weights, under which names, and the part of each that this rank holds.

Data parallelism keeps whole parameters on each rank, FSDP2 a DTensor, FSDP1 a piece of each parameter's values in a
row. An average must be kept beside whatever there is, and must be saved so that any other of them can take it over.
"""

import dataclasses
from collections.abc import Iterator

import torch
import torch.distributed as torch_dist
from composer.core import State
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp._runtime_utils import _reshard as _reshard_fsdp1
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from tread_composer.core.errors import UserError

__all__ = ['Shard', 'refuse_hidden_weights', 'shards_of']

_WRAPPERS = ('_fsdp_wrapped_module.', '_checkpoint_wrapped_module.', '_orig_mod.')


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Where FSDP1's piece of a parameter lies in the whole, whose values stand in one row."""

    shape: torch.Size
    start: int
    group: torch_dist.ProcessGroup


@dataclasses.dataclass(frozen=True)
class Shard:
    """The part of one parameter that this rank holds: all of it, unless FSDP shards the model."""

    parameter: nn.Parameter
    _piece: _Piece | None = None

    @property
    def trainable(self) -> bool:
        """Whether the parameter takes a gradient at this moment."""
        return self.parameter.requires_grad

    @property
    def local(self) -> Tensor:
        """This rank's values, without gradient. They are the parameter's own memory: writing here trains or swaps."""
        with torch.no_grad():
            parameter = self.parameter.detach()
            return parameter.to_local() if isinstance(parameter, DTensor) else parameter

    @torch.no_grad()
    def whole(self, local: Tensor) -> Tensor:
        """The full tensor ``[*parameter's shape]`` on the CPU. All ranks must ask at once: their parts are gathered.

        Args:
            local: Of the shape of ``local``, on its device: another value for each of its entries.
        """
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
    """All parameters under the names that they have in the unwrapped model, those without gradient too.

    To be asked anew at each event: FSDP leaves the outermost module gathered after a forward pass without backward
    (an evaluation). Its copy would be used in the next forward pass whatever is written to the shards, so it is
    dropped here.
    """
    model = model.module if isinstance(model, DistributedDataParallel) else model
    for module in model.modules():
        _drop_gathered_copy(module)
    pieces = dict(_fsdp1_pieces(model))
    named = {}
    for name, parameter in model.named_parameters():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, '')
        named[name] = Shard(parameter, pieces.get(id(parameter)))
    return named


def refuse_hidden_weights(algorithm: object, state: State) -> None:
    """For ``Event.INIT``: sharding that leaves no parameter by its own name, or saves another rank's state.

    Raises:
        UserError: ``parallelism_config`` does such a thing.
    """
    name, fsdp = type(algorithm).__name__, state.fsdp_config
    if state.tp_config is not None:
        raise UserError(
            f'{name} cannot average under tensor parallelism: Composer shards those weights a second time with FSDP1, '
            f'and no rank then knows its part of a parameter. Take tp out of parallelism_config, or {name} out'
        )
    if fsdp is not None and not fsdp.use_orig_params:
        raise UserError(
            f'{name} cannot average with parallelism_config.fsdp.use_orig_params: false, where FSDP1 joins the '
            f'parameters of a block into one without their names. Set it to true, which is the default'
        )
    if fsdp is not None and fsdp.save_planner is not None:
        raise UserError(
            f'{name} gives its average to rank 0 to save, and a save_planner in parallelism_config.fsdp may take what '
            f'another rank has in its place. Take it out'
        )


def _drop_gathered_copy(module: nn.Module) -> None:
    if isinstance(module, FSDPModule):
        module.reshard()
    elif isinstance(module, FullyShardedDataParallel):
        # FSDP1 has no public call for it.
        handle = module._handle
        if handle is None or not handle.uses_sharded_strategy or not hasattr(handle.flat_param, '_full_param_padded'):
            return  # nothing of its own, nothing sharded, or no forward pass yet
        if not handle.needs_unshard():
            _reshard_fsdp1(module, handle, True)


def _fsdp1_pieces(model: nn.Module) -> Iterator[tuple[int, _Piece]]:
    """For each parameter that FSDP1 has sharded, by its id. Only FSDP's own book-keeping knows the whole's shape."""
    for module in model.modules():
        if not isinstance(module, FullyShardedDataParallel) or module._handle is None:
            continue
        if not module._handle.uses_sharded_strategy:
            continue
        flat, group = module._handle.flat_param, module.process_group
        assert flat._params is not None and group is not None
        for parameter, shape, info in zip(flat._params, flat._shapes, flat._shard_param_infos, strict=True):
            start = info.intra_param_start_idx or 0  # None where this rank holds nothing of it
            yield id(parameter), _Piece(shape, start, group)
