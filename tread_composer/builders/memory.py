"""Memory of a training step, found by taking one whose tensors have no storage (fake tensors): bytes are only counted.

Shapes: B samples, C channels, S x S latent pixels.
"""

import contextlib
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tread_composer.algorithms.rules import num_averages
from tread_composer.builders.cost import Savers, run_with_shapes
from tread_composer.config import Config

__all__ = ['kept_copies', 'step_memory']

_GIB = 2**30
# GiB that torch finds on a 4090, an A100, an A100 or H100, and an H200, by the GB in their names.
_CARDS = {24: 23.5, 40: 39.4, 80: 79.1, 141: 139.8}
_FOR_STEPS = 0.92  # of a card: CUDA's context, the libraries' workspaces and the allocator's gaps take the rest


def kept_copies(config: Config) -> tuple[int, int]:
    """Copies of the trainable weights in float32 that a run keeps beside them: the optimizer's, and averages."""
    weight = nn.Parameter(torch.zeros(2, 3))
    weight.grad = torch.zeros_like(weight)
    optimizer = config.optimizer.build([weight])
    try:
        optimizer.step()  # most make their state in the first step
        state = optimizer.state[weight].values()
        moments = sum(isinstance(value, Tensor) and value.shape == weight.shape for value in state)
    except Exception:  # `capturable` on a CPU, or one that wants a closure: as most of them, it is taken for Adam's kin
        moments = 2
    return moments, sum(num_averages(part.instance) for part in config.algorithms.values())


def step_memory(
    config: Config, denoiser: nn.Module, facts: Mapping[str, Any], savers: Savers, ranks: int, microbatch: int
) -> tuple[dict[str, float], dict[int, int]]:
    """GiB on one device at the fullest moment of a step, and what it is made of.

    Args:
        config: Its precision, optimizer, averages, sharding and recomputation count. With ``amp_*`` operators are
            those of a GPU, as far as they decide memory (float32 layer norms, fused attention, the optimizer's copies).
        denoiser: On the meta device, with all that its algorithms add to it; not to be used for anything else later.
        facts: ``channels`` and ``latent_size``.
        savers: Algorithms that save work in training.
        ranks: Under DDP each has everything and a second copy of the gradients (its buckets); under FSDP a share, and
            the weights and gradients of two blocks at a time.
        microbatch: Samples that one rank takes forward at once.

    Returns:
        ``weights``, ``gradients``, ``optimizer`` (its state), ``average``, ``activations`` (with all temporaries of
        forward and backward), ``communication`` and ``total``, which is less than their sum where gradients come only
        as activations go. Without ``compile``, which needs less.

        And the largest microbatch of a card with 24, 40, 80 and 141 GB: activations are linear in it.
    """
    of_gpu = (config.precision_name or 'fp32').startswith('amp')
    shards = 1
    if config.fsdp is not None:
        degree = getattr(config.fsdp, 'data_parallel_shard_degree', -1)  # FSDP1's, for replicas of shards
        shards = degree if degree > 0 else ranks
    weights = sum(tensor.nbytes for tensor in (*denoiser.parameters(), *denoiser.buffers()))
    trained = sum(p.nbytes for p in denoiser.parameters() if p.requires_grad)
    blocks = [module for module in denoiser.modules() if isinstance(module, getattr(denoiser, 'block_class', ()))]
    of_blocks = [sum(p.nbytes for p in block.parameters()) for block in blocks]
    gathered = weights - sum(of_blocks) + 4 * max(of_blocks, default=0)  # two blocks, their weights and gradients
    sizes = microbatch, 2 * microbatch
    (with_gradients, activations), (_, of_twice) = _activations(config, denoiser, facts, savers, sizes, of_gpu, shards)
    moments, averages = kept_copies(config)
    # torch's default on a GPU is to treat all tensors at once, with a temporary as large as the weights.
    at_once = of_gpu and not (config.optimizer.kwargs.get('fused') or config.optimizer.kwargs.get('foreach') is False)
    communication = (gathered if shards > 1 else trained) if ranks > 1 else 0
    held = (weights + trained * (moments + averages)) / shards
    gradients = trained / shards
    accumulates = microbatch * ranks < config.global_train_batch_size
    full = held + gradients + communication  # with the gradients of earlier microbatches
    in_network = communication + (activations + gradients if accumulates else with_gradients)
    in_optimizer = gradients * (1 + at_once) + communication * (shards == 1)
    parts = {
        'weights': weights / shards,
        'gradients': gradients,
        'optimizer': trained * moments / shards,
        'average': trained * averages / shards,
        'activations': activations,
        'communication': communication,
        'total': held + max(in_network, in_optimizer),
    }
    of_sample = (of_twice - activations) / microbatch
    rest = full + activations - of_sample * microbatch
    fits = {card: max(0, int((size * _GIB * _FOR_STEPS - rest) / of_sample)) for card, size in _CARDS.items()}
    return {name: size / _GIB for name, size in parts.items()}, fits


class _LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators have made and that are still alive, and the most at one time.

    Args:
        weights: They were there before and do not count. Of what they get as gradients ``peak`` counts the share that
            one of so many ``shards`` keeps, ``peak_beside_gradients`` nothing.
    """

    def __init__(self, weights: Sequence[Tensor], shards: int) -> None:
        super().__init__()
        self._shards = shards
        self.bytes = self.gradients = self.peak = self.peak_beside_gradients = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in weights}
        for tensor in weights:
            if tensor.requires_grad:
                tensor.register_post_accumulate_grad_hook(self._note_gradient)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return results

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:  # a view, or written in place
            return
        self._known.add(storage._cdata)
        weakref.finalize(storage, self._end, storage._cdata, storage.nbytes())
        self.bytes += storage.nbytes()
        beside = self.bytes - self.gradients
        self.peak = max(self.peak, beside + self.gradients // self._shards)
        self.peak_beside_gradients = max(self.peak_beside_gradients, beside)

    def _note_gradient(self, weight: Tensor) -> None:
        self.gradients += weight.nbytes

    def _end(self, known: int, size: int) -> None:
        self._known.discard(known)
        self.bytes -= size


class _NormsOfGpu(TorchFunctionMode):
    """Layer norms in float32, as autocast has them on a GPU; on the CPU it does not."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.layer_norm:
            return func(*args, **kwargs)
        with torch.autocast('cpu', enabled=False):
            return func(*tree_map(_wide, args), **tree_map(_wide, kwargs))


def _wide(value: object) -> object:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _activations(
    config: Config,
    denoiser: nn.Module,
    facts: Mapping[str, Any],
    savers: Savers,
    microbatches: Sequence[int],
    of_gpu: bool,
    shards: int,
) -> list[tuple[int, int]]:
    """Bytes that forward and backward need at once beside the weights: with their gradients, and without."""
    peaks = []
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):  # the meta weights are no fakes
        warnings.simplefilter('ignore')  # kernels of the CPU warn of dtypes that those of a GPU take
        network: Any = denoiser.to_empty(device='cpu')
        units = getattr(network, 'activation_checkpointing_fn', None)  # without it Composer recomputes nothing
        if units is not None and getattr(config.fsdp, 'activation_checkpointing', False):
            apply_activation_checkpointing(network, check_fn=units)
        for size in microbatches:
            live = _LiveBytes([*network.parameters(), *network.buffers()], shards)
            with _NormsOfGpu() if of_gpu else contextlib.nullcontext(), live:
                with torch.autocast('cpu', torch.bfloat16, enabled=of_gpu):
                    prediction = run_with_shapes(network, facts, savers, size)
                    loss = prediction.float().square().mean()
                loss.backward()
                network.zero_grad()
                del prediction, loss
            peaks.append((live.peak, live.peak_beside_gradients))
    return peaks
