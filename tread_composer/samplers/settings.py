"""``SamplingSettings``: all that decides an image besides weights, label and seed."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from tread_composer import samplers
from tread_composer.core.bounds import Steps
from tread_composer.core.options import Checked, Flag, GuidedChannels

if TYPE_CHECKING:
    from tread_composer.routing import Route
    from tread_composer.samplers.guidance.provider import GuidanceProvider

__all__ = ['SamplingSettings']

_GUIDED_ONLY = ('guidance_interval', 'guided_channels')  # without effect where nothing is guided


@dataclass(frozen=True)
class SamplingSettings(Checked):
    """How images are drawn: the sampling part of an evaluation protocol.

    Args:
        sampler: Name of a sampler, e.g. ``euler``, ``ddim``, ``sde`` (``samplers.SAMPLERS``).
        num_steps: Steps of the sampler; without effect on ``dopri5``, which chooses its own.
        sampler_settings: Its further settings, e.g. ``S_churn=40``, ``eta=1``, ``rtol=1e-5``, ``last_step_kind=none``.
        guidance: Where the weak prediction comes from, e.g. ``sparse``, ``auto`` (``samplers.GUIDANCE``). By default
            ``none``, or ``classifier_free`` with a scale other than 1.
        guidance_scale: ``weak + guidance_scale * (strong - weak)``; 1 is no guidance.
        guidance_interval: Guide only where ``low < time <= high`` (low 0: at 0 too), in the time of the objective's
            sampling equation: t for flow matching, the noise level for EDM and DDPM. Everywhere by default.
            (Kynkaanniemi et al. 2024, arXiv 2404.07724.)
        guided_channels: ``first3`` does not guide the fourth latent channel, as in DiT's scripts.
        guidance_settings: Further settings of this guidance, e.g. ``weak_rate=0.8``; absent ones keep their defaults.

    Raises:
        ValueError: A value is out of range, or belongs to another kind of guidance.
    """

    sampler: str = 'heun'
    num_steps: Annotated[Steps, Flag('--steps')] = 50
    sampler_settings: Mapping[str, float | str] = field(default_factory=dict)
    guidance: str = ''
    # Below 0 the result lies on the far side of the weak prediction, which is no guidance of any paper.
    guidance_scale: Annotated[float, Ge(0)] = 1.0
    guidance_interval: Annotated[tuple[float, float] | None, Flag(metavar='LOW:HIGH')] = None
    guided_channels: GuidedChannels = 'all'
    guidance_settings: Annotated[
        Mapping[str, Any], Flag(entries=('strong_rate', 'weak_rate', 'rate_schedule', 'weak_label'))
    ] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ('sampler_settings', 'guidance_settings'):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f'{name}: {getattr(self, name)!r} must be a mapping of names to values')
        for name, value in self.sampler_settings.items():
            # What each of them takes is the sampler's to say: `check_sampler`.
            if not _is_number(value) and not isinstance(value, str):
                raise ValueError(f'sampler_settings: {name}={value!r} must be a finite number; leave it out otherwise')
        # A frozen dataclass: what is made canonical here is set past its guard.
        if not self.guidance:
            object.__setattr__(self, 'guidance', samplers.default_guidance(self.guidance_scale))
        # Tolerances decide an adaptive sampler's steps as the number does a grid's: a protocol always has them.
        object.__setattr__(self, 'sampler_settings', {**(self._adaptive or {}), **self.sampler_settings})
        if self.guidance_interval is not None:
            object.__setattr__(self, 'guidance_interval', self._interval())
        if self.guidance == 'none':
            self._check_unguided()
        defaults = samplers.guidance_defaults(self.guidance)
        for name, value in self.guidance_settings.items():
            if name not in defaults:
                raise ValueError(self._misplaced(name, value))
        object.__setattr__(self, 'guidance_settings', {**defaults, **self.guidance_settings})
        _ = self.provider  # made now, so that it checks its settings

    @cached_property
    def provider(self) -> 'GuidanceProvider | None':
        """What gives the weak prediction; None without guidance."""
        return None if self.guidance == 'none' else samplers.guidance_named(self.guidance)(**self.guidance_settings)

    @cached_property
    def _adaptive(self) -> dict[str, Any] | None:
        return samplers.adaptive_settings(self.sampler)

    @property
    def is_adaptive(self) -> bool:
        """Whether the sampler chooses its steps, and ``num_steps`` has no effect."""
        return self._adaptive is not None

    @property
    def grid_steps(self) -> int:
        """Steps of the objective's grid: ``num_steps``, or the fewest that have all the ends of an adaptive sampler."""
        return 2 if self.is_adaptive else self.num_steps

    @property
    def in_words(self) -> str:
        """Sampler and steps, for people."""
        if not self.is_adaptive:
            return f'{self.sampler} {self.num_steps} steps'
        return ' '.join([self.sampler, *(f'{name}={value}' for name, value in self.sampler_settings.items())])

    @property
    def guides(self) -> bool:
        """Whether any prediction can differ from the plain conditional one."""
        low, high = self.guidance_interval or (0.0, math.inf)
        # Scale 1 is the strong prediction; (low, low] is empty.
        return self.provider is not None and self.guidance_scale != 1 and low < high

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, without nesting; what has no effect on this kind of guidance is left out."""
        skipped = ['guidance_settings', *(_GUIDED_ONLY if self.provider is None else ())]
        skipped += ['num_steps'] if self.is_adaptive else []
        tree = {name: value for name, value in dataclasses.asdict(self).items() if name not in skipped}
        if tree.get('guidance_interval') is not None:
            tree['guidance_interval'] = list(tree['guidance_interval'])  # JSON has no tuples
        return {**tree, **self.guidance_settings}

    def protocol(self, routes: 'Sequence[Route]' = ()) -> dict[str, Any]:
        """``to_dict`` and what else decides the images of a model with these routes, for the protocol of a number."""
        # Which blocks are routed, for example, decides sparse guidance.
        return {**self.to_dict(), **(self.provider.protocol_facts(routes) if self.provider else {})}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> 'SamplingSettings':
        """The settings that ``to_dict`` wrote; what is absent has its default.

        Raises:
            ValueError: A key is unknown or a value not allowed.
        """
        field_names = {entry.name for entry in dataclasses.fields(cls)}
        # Flat, as ``to_dict`` writes it: what is no field is a setting of the guidance.
        of_guidance = {name: value for name, value in tree.items() if name not in field_names}
        allowed = dict.fromkeys([*cls.names(), *samplers.guidance_defaults(tree.get('guidance', 'none'))])
        foreign = sorted(of_guidance.keys() - allowed.keys())
        if foreign:
            raise ValueError(f'sampling: {", ".join(foreign)}: unknown; known are {", ".join(allowed)}')
        fields = {name: value for name, value in tree.items() if name in field_names}
        settings = {**tree.get('guidance_settings', {}), **of_guidance}
        return cls(**{'guidance': 'none', **fields, 'guidance_settings': settings})

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The keys that ``to_dict`` may have, of all kinds of guidance of this project."""
        field_names = [entry.name for entry in dataclasses.fields(cls) if entry.name != 'guidance_settings']
        of_guidance = [name for kind in samplers.GUIDANCE for name in samplers.guidance_defaults(kind)]
        return tuple(dict.fromkeys([*field_names, *of_guidance]))

    def _interval(self) -> tuple[float, float]:
        interval: Any = self.guidance_interval
        ends = tuple(interval) if isinstance(interval, Iterable) else (interval,)
        if len(ends) != 2 or not all(_is_number(end) for end in ends) or not 0 <= ends[0] <= ends[1]:
            raise ValueError(f'guidance_interval: {ends} must be two times, 0 <= low <= high (0 is data)')
        return float(ends[0]), float(ends[1])

    def _check_unguided(self) -> None:
        if self.guidance_scale != 1:
            raise ValueError(
                f"guidance_scale: {self.guidance_scale} says how far to guide, but guidance is 'none'; set guidance to "
                f'{_either(list(samplers.GUIDANCE))}, or leave the scale at 1'
            )
        for name in _GUIDED_ONLY:
            value = getattr(self, name)
            if value != getattr(type(self), name):  # a dataclass keeps plain defaults as class attributes
                raise ValueError(f"{name}: {value!r} has no effect with guidance 'none'; it belongs to guidance")

    def _misplaced(self, name: str, value: object) -> str:
        owners = [kind for kind in samplers.GUIDANCE if name in samplers.guidance_defaults(kind)]
        if not owners:
            has = ', '.join(samplers.guidance_defaults(self.guidance)) or 'none'
            return f'guidance_settings: {name}: guidance {self.guidance!r} has no such setting; it has {has}'
        return (
            f'{name}: {value!r} has no effect with guidance {self.guidance!r}; it belongs to guidance {_either(owners)}'
        )


def _either(names: Sequence[str]) -> str:
    *names_before, final = (repr(name) for name in names)
    return f'{", ".join(names_before)} or {final}' if names_before else final


def _is_number(value: object) -> bool:
    # True is an int in Python, and JSON has neither inf nor nan.
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
