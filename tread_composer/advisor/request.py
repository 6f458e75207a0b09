"""What ``inspect`` was asked for."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Lt

from tread_composer.core.errors import UserError
from tread_composer.core.options import Device, Flag, Weights, check_request

__all__ = ['InspectRequest']


@dataclass(frozen=True)
class InspectRequest:
    """What to look at.

    Args:
        path: A run's folder (its latest checkpoint), a checkpoint in one, or an exported .safetensors.
        data: Folder of other latents than those of the run's evaluation split.
        times: From 0, data, to 1, noise.
        count: Latents to look at.
        weights: Which weights.
        batch_size: Latents in one call of the network; changes memory and nothing else.
        device: Where to compute (a GPU if there is one).

    Raises:
        UserError: A number is out of range, or a time stands twice.
    """

    path: Annotated[str, Flag('RUN')]
    data: str | None = None
    times: tuple[Annotated[float, Gt(0), Lt(1)], ...] = (0.2, 0.5, 0.8)
    count: Annotated[int, Flag('--count', '--samples')] = 64
    weights: Weights = 'ema'
    batch_size: Annotated[int, Ge(1)] = 16
    device: Device | None = None

    def __post_init__(self) -> None:
        check_request(self)
        twice = [time for time in self.times if self.times.count(time) > 1]
        if twice or not self.times:
            raise UserError(f'--times: {twice[0]} is given twice' if twice else '--times: give at least one')
