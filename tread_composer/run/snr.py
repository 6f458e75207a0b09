"""What signal-to-noise ratios runs train on, drawn: ``python -m tread_composer snr yamls/x.yaml [other.yaml ...]``.

The mathematics is in ``tread_composer.objectives.snr``; here the strength of the latents comes from the data's own
statistics, as each configuration scales them.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tread_composer.builders.run_data import planned_manifest
from tread_composer.config import Config
from tread_composer.core.errors import UserError
from tread_composer.data.manifest import Manifest
from tread_composer.io.files import write_atomically
from tread_composer.io.table import text_table
from tread_composer.objectives.snr import SNRDistribution

__all__ = ['RECOMMENDED', 'SNRCurve', 'draw_snr', 'format_snr', 'latent_std', 'make_snr']

# FasterDiT's best setting is a density whose mean is 0 dB for data of standard deviation 1: what moves it is the std.
_BEST_STD, _KEPT_STD = 0.70, 0.82
RECOMMENDED = 20 * math.log10(_BEST_STD), 20 * math.log10(_KEPT_STD)
"""Where the mean of the density should lie, in dB: that of FasterDiT's best setting (arXiv 2410.10356, section 4)."""

_EDGE = 0.05  # dB
_FORMATS = ('.png', '.jpg', '.jpeg', '.webp', '.svg', '.pdf')

_RECOMMENDATION = (
    f"FasterDiT's best setting (linear path, lognorm(0, 1), latent std {_BEST_STD:.2f} to {_KEPT_STD:.2f}; "
    f'SD-VAE latents of ImageNet-256) has its mean at {RECOMMENDED[0]:.1f} to {RECOMMENDED[1]:.1f} dB'
)


@dataclass(frozen=True)
class SNRCurve:
    """The density of one configuration."""

    name: str  # of the run
    objective: str
    data_std: float  # standard deviation of the latents as the network sees them
    source: str  # where that number comes from, in words
    distribution: SNRDistribution  # density and figures in dB


def make_snr(config: Config, std: float | None = None) -> SNRCurve:
    """The SNR density of a configuration.

    ``std`` is that of the latents as the network sees them; None takes it from the data's manifest.

    Raises:
        UserError: There are no data to take it from, or the objective does not say what it trains on.
    """
    if std is None:
        manifest = planned_manifest(config)
        if manifest is None:
            raise UserError(
                f'data.local: {config.data.local!r} holds no manifest of its data, so the strength of the latents is '
                'not known; give it with --std (SD-VAE latents times 0.18215: about 0.82), or convert the data'
            )
        std, source = latent_std(config, manifest), 'from the manifest'
    else:
        source = 'from --std, not from data'
    objective = config.objective.instance
    if not hasattr(objective, 'snr'):
        raise UserError(
            f'objective.name: {config.objective.name} does not say what signal-to-noise ratios it trains on: it has no '
            'method snr(data_std)'
        )
    return SNRCurve(config.run_name, objective.name, std, source, objective.snr(std))


def latent_std(config: Config, manifest: Manifest) -> float:
    """Standard deviation of all values of the latents together, scaled and shifted as the network sees them.

    That is of one distribution over all channels: channels whose means differ add to it.
    """
    config = config.normalized(manifest)
    for name, value in (('latent_scale', config.latent_scale), ('latent_shift', config.latent_shift)):
        if isinstance(value, list) and len(value) != manifest.channels:
            raise UserError(
                f'{name}: {len(value)} numbers for {manifest.channels} channels; give one, or one for each channel'
            )
    scale = np.asarray(config.latent_scale)
    means = (np.asarray(manifest.mean) - np.asarray(config.latent_shift)) * scale
    variances = (np.asarray(manifest.std) * scale) ** 2
    # Over all channels together: within each, and between their means.
    return float(np.sqrt((variances + (means - means.mean()) ** 2).mean()))


def format_snr(curves: Sequence[SNRCurve], picture: str) -> str:
    """The figures as a table for a terminal."""
    head = ('run', 'objective', 'latent std', 'mean', 'std', '5 %', '50 %', '95 %', 'mean in the band')
    rows = []
    for curve in curves:
        distribution = curve.distribution
        figures = [f'{value:.1f}' for value in (distribution.mean, distribution.std, *distribution.quantiles)]
        strength = f'{curve.data_std:.3f} ({curve.source})'
        rows.append((curve.name, curve.objective, strength, *figures, _verdict(distribution.mean)))
    table = text_table(head, rows, 'lllrrrrrl')
    return '\n'.join(
        ['Density of the signal-to-noise ratio over a training run, in dB', '', table, '', _RECOMMENDATION + '.',
         f'Drawn in {picture}.']
    )  # fmt: skip


def _verdict(mean: float) -> str:
    low, high = RECOMMENDED
    # The paper's numbers have two digits, and so have statistics of latents: the band is not sharper than this.
    if mean < low - _EDGE:
        return f'{low - mean:.1f} dB below: less noise or stronger latents move it there'
    if mean > high + _EDGE:
        return f'{mean - high:.1f} dB above: more noise or weaker latents move it there'
    return 'yes'


def draw_snr(curves: Sequence[SNRCurve], path: str | Path) -> None:
    """Write the densities as the picture that the path's suffix names, whole or not at all."""
    suffix = Path(path).suffix.lower()
    if suffix not in _FORMATS:
        raise UserError(f'--out: {str(path)!r} names no picture that can be drawn; let it end in {", ".join(_FORMATS)}')
    from matplotlib.figure import Figure  # takes a second: not before there is something to draw

    figure = Figure(figsize=(9, 5.4 + 0.2 * len(curves)), layout='constrained')
    axes = figure.add_subplot()
    band = f'{RECOMMENDED[0]:.1f} to {RECOMMENDED[1]:.1f} dB'
    setting = f'linear path, lognorm(0, 1), latent std {_BEST_STD:.2f} to {_KEPT_STD:.2f}'
    label = f"recommended for the mean: {band} (FasterDiT's best setting on SD-VAE latents: {setting})"
    axes.axvspan(*RECOMMENDED, color='0.8', label=label)
    for curve in curves:
        distribution = curve.distribution
        text = f'{curve.name}: {curve.objective}, latent std {curve.data_std:.2f} {curve.source}; '
        text += f'mean {distribution.mean:.1f} dB'
        (line,) = axes.plot(distribution.decibels.numpy(), distribution.density.numpy(), label=text)
        axes.axvline(distribution.mean, color=line.get_color(), linestyle=':', linewidth=1)
    axes.set_xlim(
        min(curve.distribution.quantiles[0] for curve in curves) - 20,
        max(curve.distribution.quantiles[2] for curve in curves) + 20,
    )
    axes.set_ylim(bottom=0)
    axes.set_xlabel('signal-to-noise ratio in dB: 20 lg(latent std x alpha / sigma); right is clean')
    axes.set_ylabel('share of training per dB')
    axes.set_title('What signal-to-noise ratios each run trains on; dotted: means')
    figure.legend(fontsize='small', loc='outside lower center')
    picture = io.BytesIO()
    figure.savefig(picture, format=suffix.removeprefix('.'), dpi=120)
    try:
        write_atomically(path, picture.getvalue())
    except OSError as error:
        raise UserError(f'--out: {str(path)!r} cannot be written: {error}') from None
