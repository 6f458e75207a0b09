"""``SamplingSettings``: all that decides an image besides weights, label and seed."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

__all__ = ['GuidedChannels', 'Guidance', 'RateSchedule', 'SamplingSettings', 'WeakLabel']

Guidance = Literal['none', 'classifier_free', 'sparse', 'auto']
GuidedChannels = Literal['all', 'first3']
RateSchedule = Literal['constant', 'cosine']
WeakLabel = Literal['same', 'null']

_CHOICES = {
    'guidance': Guidance,
    'guided_channels': GuidedChannels,
    'rate_schedule': RateSchedule,
    'weak_label': WeakLabel,
}
_SPARSE_ONLY = ('strong_rate', 'weak_rate', 'rate_schedule')
_GUIDED_ONLY = ('guidance_interval', 'guided_channels')


@dataclass(frozen=True)
class SamplingSettings:
    """How images are drawn: the sampling part of an evaluation protocol.

    Args:
        sampler: Name of a sampler (``samplers.check_sampler`` knows which fit an objective).
        num_steps: Its steps.
        sampler_settings: Its further settings, such as ``{'eta': 0.5}`` for ``'ddim'``.
        guidance: What the weak branch is. ``'classifier_free'``: the same network without a class. ``'auto'``: a
            second, weaker network. ``'sparse'``: more tokens skip the routed blocks than in the strong branch; a second
            network may be given as well.
        guidance_scale: ``weak + guidance_scale * (strong - weak)``; 1 is no guidance.
        guidance_interval: ``(low, high)``: guide where ``low < time <= high``, in the time of the objective's sampling
            equation (t of flow matching, the noise level of EDM and DDPM); elsewhere nothing is guided. Everywhere if
            None.
        guided_channels: ``'first3'`` leaves the fourth latent channel as conditional as DiT's scripts do.
        strong_rate: Share of the tokens that skip the routed blocks in the strong branch of sparse guidance.
        weak_rate: The same of the weak branch. (Defaults: the paper's SG_FLOPS.)
        rate_schedule: ``'constant'``; or ``'cosine'``: over the steps the weak branch goes from ``weak_rate`` to 0 and
            the strong one from 0 to ``strong_rate``.
        weak_label: ``'null'`` takes the class away from the weak branch of ``'auto'`` and ``'sparse'``, too.

    Raises:
        ValueError: A value is out of range, or belongs to another kind of guidance.
    """

    sampler: str = 'heun'
    num_steps: int = 50
    sampler_settings: Mapping[str, float] = field(default_factory=dict)
    guidance: Guidance = 'none'
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    guided_channels: GuidedChannels = 'all'
    strong_rate: float = 0.5
    weak_rate: float = 0.9
    rate_schedule: RateSchedule = 'constant'
    weak_label: WeakLabel = 'same'

    def __post_init__(self) -> None:
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f'{name}: {getattr(self, name)!r} is none of {", ".join(get_args(kind))}')
        if isinstance(self.num_steps, bool) or not isinstance(self.num_steps, int) or self.num_steps < 1:
            raise ValueError(f'num_steps: {self.num_steps!r} must be a whole number, at least 1')
        self._check_numbers()
        object.__setattr__(self, 'sampler_settings', dict(self.sampler_settings))
        if self.guidance_interval is not None:
            object.__setattr__(self, 'guidance_interval', self._interval())
        if self.guidance == 'none' and self.guidance_scale != 1:
            raise ValueError(
                f"guidance_scale: {self.guidance_scale} says how far to guide, but guidance is 'none'; set guidance to "
                "'classifier_free', 'sparse' or 'auto', or leave the scale at 1"
            )
        self._refuse_misplaced(_GUIDED_ONLY, self.guidance != 'none', 'guidance')
        self._refuse_misplaced(_SPARSE_ONLY, self.guidance == 'sparse', "guidance 'sparse'")
        self._refuse_misplaced(('weak_label',), self.guidance in ('sparse', 'auto'), "guidance 'sparse' or 'auto'")

    @property
    def guides(self) -> bool:
        """Whether any prediction can differ from the plain conditional one."""
        low, high = self.guidance_interval or (0.0, math.inf)
        return self.guidance != 'none' and self.guidance_scale != 1 and low < high

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; what has no effect on this kind of guidance is left out."""
        skipped = [name for name in _GUIDED_ONLY if self.guidance == 'none']
        skipped += [name for name in _SPARSE_ONLY if self.guidance != 'sparse']
        skipped += [name for name in ('weak_label',) if self.guidance not in ('sparse', 'auto')]
        tree = {name: value for name, value in dataclasses.asdict(self).items() if name not in skipped}
        if tree.get('guidance_interval') is not None:
            tree['guidance_interval'] = list(tree['guidance_interval'])
        return tree

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> 'SamplingSettings':
        """The settings that ``to_dict`` wrote; what is absent has its default.

        Raises:
            ValueError: A key is unknown or a value not allowed.
        """
        known = [entry.name for entry in dataclasses.fields(cls)]
        unknown = sorted(set(tree) - set(known))
        if unknown:
            raise ValueError(f'sampling: {", ".join(unknown)}: unknown; known are {", ".join(known)}')
        return cls(**tree)

    def _check_numbers(self) -> None:
        for name in ('guidance_scale', 'strong_rate', 'weak_rate'):
            if not _is_number(getattr(self, name)):
                raise ValueError(f'{name}={getattr(self, name)!r}: must be a finite number')
        if self.guidance_scale < 0:
            raise ValueError(
                f'guidance_scale={self.guidance_scale}: must be 0 or more; 1 is no guidance, above 1 guides'
            )
        for name in ('strong_rate', 'weak_rate'):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f'{name}: {getattr(self, name)} is not in [0, 1); 0 lets no token skip a block')
        for name, value in self.sampler_settings.items():
            if not _is_number(value):
                raise ValueError(f'sampler_settings: {name}={value!r} must be a finite number; leave it out otherwise')

    def _interval(self) -> tuple[float, float]:
        ends = tuple(self.guidance_interval or ())
        if len(ends) != 2 or not all(_is_number(end) for end in ends) or not 0 <= ends[0] <= ends[1]:
            raise ValueError(f'guidance_interval: {ends} must be two times, 0 <= low <= high (0 is data)')
        return float(ends[0]), float(ends[1])

    def _refuse_misplaced(self, names: tuple[str, ...], used: bool, owner: str) -> None:
        defaults = {entry.name: entry.default for entry in dataclasses.fields(self)}
        for name in names:
            if not used and getattr(self, name) != defaults[name]:
                raise ValueError(
                    f'{name}: {getattr(self, name)!r} has no effect with guidance {self.guidance!r}; it belongs to '
                    f'{owner}'
                )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
