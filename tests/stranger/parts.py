"""One part of each kind, written against the protocols alone: no class here comes from ``tread_composer``.

Shapes: B samples, C channels, H x W latent pixels, N tokens of 2 x 2 pixels, D width.
"""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from composer.core import Algorithm, Callback, Event, State, Time
from composer.loggers import Logger
from torch import Tensor, nn

from tread_composer.metrics.metric import Figure, Quantity


class StraightLine:
    """Velocity along the straight line from data to noise; the loss is a power of its absolute error."""

    name = 'straight_line'
    prediction = 'the velocity noise - data'
    time_convention = '0 is data, 1 is noise; the network is given the time itself'
    learned_variance = False

    def __init__(self, power: float = 2.0) -> None:
        if power < 1:
            raise ValueError(f'power: {power} is below 1')
        self.power = power

    def time_grid(self) -> Mapping[str, Any]:
        return {}

    def target(self) -> Mapping[str, Any]:
        return {}

    def check_latents(self, latent_shape: Sequence[int]) -> None:
        del latent_shape

    def noised(self, latents_BCHW: Tensor, noise_BCHW: Tensor, time: float) -> tuple[Tensor, float]:
        return (1 - time) * latents_BCHW + time * noise_BCHW, time

    def noise_level(self, time: float) -> float:
        return time / (1 - time)

    def __call__(
        self, denoiser: Any, latents_BCHW: Tensor, labels_B: Tensor, noise_BCHW: Tensor, quantiles_B: Tensor
    ) -> dict[str, Tensor]:
        t_B = quantiles_B.float()
        t = t_B.view(-1, 1, 1, 1)
        velocity = denoiser((1 - t) * latents_BCHW + t * noise_BCHW, t_B, labels_B)
        error = (velocity - (noise_BCHW - latents_BCHW)).abs()
        return {'loss': error.pow(self.power).flatten(1).mean(1), 'mse': error.square().flatten(1).mean(1)}

    def drift(self, denoiser: Any, labels_B: Tensor) -> Any:
        return lambda x, time: denoiser(x.float(), time.float().expand(len(x)), labels_B).double()

    def sampling_times(self, num_steps: int) -> Tensor:
        return torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)

    def prior(self, noise_BCHW: Tensor) -> Tensor:
        return noise_BCHW.double()


class Layer(nn.Module):
    """Each token sees itself and the mean of all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(3 * width, width)

    def forward(self, x_BND: Tensor, c_BD: Tensor) -> Tensor:
        mean = x_BND.mean(1, keepdim=True).expand_as(x_BND)
        return x_BND + torch.tanh(self.mix(torch.cat([x_BND, mean, c_BD[:, None].expand_as(x_BND)], dim=2)))


class Mixer(nn.Module):
    """A small network of means over tokens; it says of itself how many tokens it has, and nothing more."""

    def __init__(
        self, *, latent_size: int, in_channels: int, num_classes: int, width: int = 16, num_layers: int = 6
    ) -> None:
        super().__init__()
        self.num_tokens = (latent_size // 2) ** 2
        self.into = nn.Conv2d(in_channels, width, 2, stride=2)
        self.places = nn.Parameter(0.02 * torch.randn(1, self.num_tokens, width))
        self.labels = nn.Embedding(num_classes + 1, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(num_layers))
        self.out = nn.ConvTranspose2d(width, in_channels, 2, stride=2)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor) -> Tensor:
        x = self.into(x_BCHW)
        side = x.shape[-1]
        tokens = x.flatten(2).transpose(1, 2) + self.places
        condition = self.labels(labels_B) + t_B.to(x)[:, None]
        for layer in self.layers:
            tokens = layer(tokens, condition)
        return self.out(tokens.transpose(1, 2).unflatten(2, (side, side)))


class Louder(Algorithm):
    """Scales the loss by ``1 + rate``."""

    made: ClassVar[int] = 0

    def __init__(self, rate: float = 0.1) -> None:
        if rate <= -1:
            raise ValueError(f'rate: {rate} would turn the loss round')
        type(self).made += 1
        self.rate, self.batches = rate, 0
        self.prepared: list[nn.Module] = []

    def problems(self, config: Any) -> Iterator[tuple[str, str]]:
        if self.rate > 1 and config.label_dropout:
            yield 'rate', f'{self.rate} above 1 needs label_dropout 0'

    def prepare(self, model: nn.Module, seed: int) -> None:
        """Adds nothing, but remembers the model, which must be the one in training."""
        del seed
        self.prepared.append(model)

    def match(self, event: Event, state: State) -> bool:
        return event == Event.AFTER_LOSS

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        assert isinstance(state.loss, dict) and self.prepared == [state.model]
        state.loss['total'] = state.loss['total'] * (1 + self.rate)
        self.batches += 1
        logger.log_metrics({'louder/rate': self.rate})

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), 'batches': self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches = state['batches']


class Shallow(Algorithm):
    """Trains without the last ``count`` layers of a ``Mixer`` until ``end_time``, in which a run saves work."""

    def __init__(self, count: int = 2, end_time: str | None = None) -> None:
        self.count, self.end_time = count, end_time
        self.layers: nn.ModuleList | None = None

    def cost_window(self) -> tuple[str | None, str | None]:
        return None, self.end_time

    def tokens_per_block(self, depth: int, num_tokens: int) -> list[int]:
        return [num_tokens] * (depth - self.count) + [0] * self.count

    @contextlib.contextmanager
    def rehearse(self, denoiser: Any, batch_size: int) -> Iterator[None]:
        del batch_size
        layers = denoiser.layers
        denoiser.layers = layers[: -self.count]
        yield
        denoiser.layers = layers

    def match(self, event: Event, state: State) -> bool:
        if event == Event.BEFORE_FORWARD:
            return self.end_time is None or state.timestamp < Time.from_timestring(self.end_time)
        return event == Event.AFTER_BACKWARD and self.layers is not None

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        denoiser: Any = state.model.denoiser
        if event == Event.BEFORE_FORWARD:
            self.layers = denoiser.layers
            denoiser.layers = self.layers[: -self.count]
        else:
            denoiser.layers, self.layers = self.layers, None


class Counter(Callback):
    """Counts the samples of training into ``count.txt``."""

    default_folder: ClassVar[str] = 'counted'

    def __init__(self, words: str = 'samples', folder: str = '.') -> None:
        self.words, self.folder, self.count = words, folder, 0

    def fit_end(self, state: State, logger: Logger) -> None:
        path = Path(self.folder) / 'count.txt'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{self.count} {self.words}')

    def batch_end(self, state: State, logger: Logger) -> None:
        self.count = int(state.timestamp.sample)
        logger.log_metrics({f'counter/{self.words}': self.count})

    def state_dict(self) -> dict[str, Any]:
        return {'count': self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state['count']


def midpoint(equation: Any, x_BCHW: Tensor, times: Tensor, noise: Any, /, *, share: float = 0.5) -> Tensor:
    """One drift to look ahead by a share of the step, one to go."""
    if not 0 < share < 1:
        raise ValueError(f'share: {share} is not between 0 and 1')
    x = x_BCHW.double()
    for start, end in itertools.pairwise(times.double()):
        ahead = x + share * (end - start) * equation.drift(x, start)
        x = x + (end - start) * equation.drift(ahead, start + share * (end - start))
    return x


class Blurred:
    """Guides away from what the network says of an input that is flattened by a share, ``strength``."""

    second_network: ClassVar[bool] = False

    def __init__(self, strength: float = 0.3) -> None:
        if not 0 <= strength <= 1:
            raise ValueError(f'strength: {strength} is not a share')
        self.strength = strength

    def check(self, network: nn.Module, *, num_classes: int, weak: nn.Module | None) -> None:
        del network, num_classes, weak

    def prepare(self, network: nn.Module, *, routes: Sequence[Any], always_keep: Any) -> None:
        del network, routes, always_keep

    def protocol_facts(self, routes: Sequence[Any]) -> dict[str, Any]:
        return {}

    def branches(self, run: Any) -> Any:
        def both(x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
            flat = torch.lerp(x_BCHW, x_BCHW.mean((2, 3), keepdim=True).expand_as(x_BCHW), self.strength)
            return run.denoiser(x_BCHW, t_B, labels_B), run.denoiser(flat, t_B, labels_B)

        return both


class Spread:
    """How far the samples' features scatter, held against those of the reference."""

    name = 'spread'
    quantities = (Quantity('spread', 'higher', 'ratio of standard deviations'),)
    needs_logits = False
    compares_with = 'images'

    def measure(self, samples: Any, reference: Any, device: torch.device) -> list[Figure]:
        ratio = samples.features_ND.std() / reference.features.features_ND.std()
        return [Figure(self.quantities[0], float(ratio), settings={'by': 'a stranger'})]


class Pixels:
    """Features that are the pixels themselves."""

    name = 'pixels'
    resolution = 8
    num_logits = 0

    def identity(self) -> dict[str, str]:
        return {'name': self.name, 'weights_hash': 'none', 'version': '1'}

    def __call__(self, images_B3RR: Tensor) -> tuple[Tensor, None]:
        return images_B3RR[:, 0].flatten(1).cpu().double() / 255, None
