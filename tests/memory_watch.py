"""A callback named in a YAML: the bytes of a rank's tensors at the fullest moment of its second step."""

import gc
import itertools
import os
from pathlib import Path

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def live_bytes() -> int:
    """Of the storages of all tensors that Python can reach."""
    gc.collect()
    tensors = [value for value in gc.get_objects() if isinstance(value, Tensor)]
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    storages = (tensor.untyped_storage() for tensor in local)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}.values())


class MemoryWatch(Callback):
    """Counts what lives, and follows allocations from there by torch's profiler.

    From the Trainer's begin on, since Python cannot reach DDP's buckets; sharding gives memory back unseen by the
    profiler, and has no buckets. Writes ``peak<rank>`` into the folder that MEMORY_WATCH names.
    """

    def init(self, state: State, logger: Logger) -> None:
        self.bytes = live_bytes()
        self._watch()

    def batch_start(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch == 1:  # the optimizer has its state now
            self.bytes += sum(self._changes())
            if any(isinstance(parameter, DTensor) for parameter in state.model.parameters()):
                self.bytes = live_bytes()
            self._watch()

    def batch_end(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch == 2:
            peak = self.bytes + max(itertools.accumulate(self._changes()))
            Path(os.environ['MEMORY_WATCH'], f'peak{dist.get_global_rank()}').write_text(str(peak))

    def _watch(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        self.profiler = torch.profiler.profile(activities=activities, profile_memory=True)
        self.profiler.start()

    def _changes(self) -> list[int]:
        self.profiler.stop()
        # The table of torch's profiler has sums of memory by operator; single changes are in its results alone.
        events = self.profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
        return [size for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == '[memory]')]
