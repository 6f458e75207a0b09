"""The words of ``python -m tread_composer sample``; torch is imported only once they are right."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tread_composer.core.errors import UserError
from tread_composer.core.named import is_reference

if TYPE_CHECKING:
    from tread_composer.sample.request import SamplesRequest
    from tread_composer.samplers import SamplingSettings

__all__ = [
    'WEIGHTS',
    'OrReference',
    'add_arguments',
    'add_sampling',
    'add_weak',
    'interval',
    'pair',
    'pairs_of',
    'request_of',
    'sampling_of',
]


class _Weights(tuple[str, ...]):
    """``argparse`` shows what is in it, and takes any width."""

    def __contains__(self, word: object) -> bool:
        return super().__contains__(word) or (isinstance(word, str) and word.startswith('posthoc:'))


class OrReference(tuple[str, ...]):
    """``argparse`` shows what is in it, and takes ``package.module:Class`` as well."""

    def __contains__(self, word: object) -> bool:
        return super().__contains__(word) or is_reference(word)


WEIGHTS = _Weights(('ema', 'raw', 'posthoc:WIDTH'))
"""Choices of ``--weights`` for a trained run."""

# Settings of guidance that have a flag of their own; --guidance-settings takes those of any kind.
_OF_GUIDANCE = ('strong_rate', 'weak_rate', 'rate_schedule', 'weak_label')


def pair(text: str) -> tuple[float, float] | None:
    """Two numbers with a colon between them; None for the word ``none``.

    Raises:
        ValueError: The text is neither.
    """
    if text == 'none':
        return None
    low, colon, high = text.partition(':')
    if not colon:
        raise ValueError(text)
    return float(low), float(high)


def interval(text: str) -> tuple[float, float] | None:
    """An interval of times, for ``argparse``."""
    try:
        return pair(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} is no interval; write LOW:HIGH, or none') from None


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """The options of how an image is drawn."""
    add = parser.add_argument
    add('--sampler', default='heun', metavar='NAME', help='e.g. euler, ddim, sde (%(default)s)')
    add('--steps', type=int, default=50, help='of the sampler (%(default)s)')
    add('--sampler-settings', nargs='+', default=[], metavar='KEY=VALUE', help='e.g. S_churn=40, eta=1, last_step=0.04')
    add('--guidance', metavar='KIND', help='e.g. sparse, auto (none; with --guidance-scale: classifier_free)')
    add('--guidance-scale', type=float, help='weak + scale x (strong - weak); 1 is none')
    add('--guidance-interval', type=interval, metavar='LOW:HIGH',
        help='guide where LOW < time <= HIGH: t of flow matching, noise level otherwise')  # fmt: skip
    add('--guided-channels', choices=('all', 'first3'), default='all', help="first3: as DiT's scripts do")
    add('--guidance-settings', nargs='+', default=[], metavar='KEY=VALUE', help='of this kind, e.g. weak_rate=0.8')
    add('--strong-rate', type=float,
        help='sparse: share of tokens that skip the routed blocks in the strong branch (0.5)')  # fmt: skip
    add('--weak-rate', type=float, help='the same in the weak branch (0.9)')
    add('--rate-schedule', choices=('constant', 'cosine'), help='of both rates (constant)')
    add('--weak-label', choices=('same', 'null'), help='null: no class in the weak branch (same)')


def add_weak(parser: argparse._ActionsContainer) -> None:
    """The options of the second network."""
    add = parser.add_argument
    add('--weak', metavar='PATH', help='second network, for guidance that takes one, e.g. an early checkpoint')
    add('--weak-weights', choices=WEIGHTS, default='ema', help='of --weak (%(default)s)')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All options of the command."""
    add = parser.add_argument
    add('path', help='a run folder, a checkpoint in one, or an exported .safetensors')
    add('overrides', nargs='*', default=[], metavar='autoencoder.key=value', help='e.g. autoencoder.path=/data/vae')
    add('--out', required=True, help='folder of the images; the same command goes on where it was interrupted')
    add('--weights', choices=WEIGHTS, default='ema', help='(%(default)s)')
    add('--classes', nargs='+', type=int, metavar='CLASS', help='(all)')
    add('--per-class', type=int, metavar='N', help='images of each class')
    add('--count', type=int, metavar='N', help='images in all, classes in turn (64)')
    add('--labels-file', metavar='FILE', help='one label for each image, as text')
    add('--seed', type=int, default=0, help='of the first image; the next ones count on (%(default)s)')
    add_sampling(parser)
    add_weak(parser)
    add('--format', nargs='+', choices=('png', 'npz', 'mds'), default=['png'], help='npz: as in ADM (png)')
    add('--batch-size', type=int, default=64, help='images drawn together (%(default)s)')
    add('--device', choices=('cuda', 'cpu'), help='(a GPU if there is one)')
    add('--decode-dtype', choices=('float32', 'bfloat16'), default='float32', help='of the autoencoder (%(default)s)')


def sampling_of(options: argparse.Namespace) -> 'SamplingSettings':
    """The settings that the words of ``add_sampling`` mean.

    Raises:
        UserError: They contradict each other.
    """
    from tread_composer.samplers import SamplingSettings, default_guidance, sampler_named

    scale = options.guidance_scale
    guidance = options.guidance or default_guidance(scale)
    if scale is None and guidance != 'none':
        raise UserError(f'--guidance {guidance} needs a --guidance-scale, for example 1.5')
    of_guidance = pairs_of(options.guidance_settings, '--guidance-settings')
    of_guidance |= {name: getattr(options, name) for name in _OF_GUIDANCE if getattr(options, name) is not None}
    try:
        sampler_named(options.sampler)  # refused before anything is loaded
    except ValueError as error:
        raise UserError(f'--sampler: {error}') from None
    try:
        return SamplingSettings(
            sampler=options.sampler,
            num_steps=options.steps,
            sampler_settings=pairs_of(options.sampler_settings, '--sampler-settings'),
            guidance=guidance,
            guidance_scale=1.0 if scale is None else scale,
            guidance_interval=options.guidance_interval,
            guided_channels=options.guided_channels,
            guidance_settings=of_guidance,
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def request_of(options: argparse.Namespace) -> 'SamplesRequest':
    """What the words of ``add_arguments`` ask for.

    Raises:
        UserError: They contradict each other.
    """
    from tread_composer.sample.request import SamplesRequest

    return SamplesRequest(
        path=options.path,
        out=Path(options.out),
        weights=options.weights,
        sampling=sampling_of(options),
        weak=options.weak,
        weak_weights=options.weak_weights,
        classes=None if options.classes is None else tuple(options.classes),
        per_class=options.per_class,
        count=options.count,
        labels_file=options.labels_file,
        seed=options.seed,
        formats=tuple(options.format),
        batch_size=options.batch_size,
        device=options.device,
        decode_dtype=options.decode_dtype,
        overrides=pairs_of(options.overrides, 'settings'),
    )


def pairs_of(words: Sequence[str], what: str) -> dict[str, Any]:
    """``key=value`` words as keys and values of YAML.

    Args:
        words: As written.
        what: What to call them in the message.

    Raises:
        UserError: One of them has no ``=``.
    """
    wrong = [word for word in words if '=' not in word]
    if wrong:
        raise UserError(f'{what}: {wrong[0]!r} is not of the form key=value')
    return {key: yaml.safe_load(value) for key, _, value in (word.partition('=') for word in words)}
