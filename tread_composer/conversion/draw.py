"""A picture of what is in a data set: samples decoded, with their classes under them.

The eye finds what no check does: another autoencoder's latents, wrong class names, a crop that cuts heads off.
Legend: N samples drawn, K stored channels, C latent channels, H x W pixels.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tread_composer.autoencoders import Pixels, Pretrained, to_tiles
from tread_composer.conversion.contents import sound_rows
from tread_composer.core.errors import UserError
from tread_composer.data.checks import check_agreement, check_shards
from tread_composer.data.columns import LABEL, LATENTS, LATENTS_MIRRORED
from tread_composer.data.manifest import Manifest
from tread_composer.data.shards import read_index
from tread_composer.io.files import write_atomically
from tread_composer.io.picture_grid import picture_grid, png_bytes

__all__ = ['draw']

_TILE = 96  # pixels that an image is wide at least, so that there is room for a name
_BATCH = 4  # images that are decoded together


def draw(
    folder: str | Path,
    out: str | Path,
    *,
    autoencoder: Pretrained | None = None,
    count: int = 64,
    mirrored: bool = False,
    seed: int = 0,
    device: str | torch.device = 'cpu',
) -> dict[int, dict[str, Any]]:
    """Decode samples of a split and write them to a PNG as a grid, in the order of their positions.

    Of moments the mean is decoded. Which samples are taken depends on ``seed``, ``count`` and the split's size.

    Args:
        folder: The split's.
        out: The picture; its folder is made if need be.
        autoencoder: That of the data; None for pixels.
        count: How many samples, at least 1; all if the split has fewer.
        mirrored: Draw the mirrored image's latents at the right of each.

    Returns:
        The rows by their position. ``UserError`` for another autoencoder, no mirrored latents, a damaged shard.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f'{folder}: no such folder; give that of a data set, and a split that it has')
    if Path(out).is_dir():
        raise UserError(f'{out}: is a folder; give the name of the picture in it, such as {Path(out, "samples.png")}')
    manifest = Manifest.load(folder)
    check_shards(folder, manifest)
    if mirrored and not manifest.mirrored:
        raise UserError(f'{folder}: holds no latents of mirrored images; leave --mirrored out')
    if manifest.kind == 'pixels' and autoencoder is not None:
        raise UserError(f'{folder}: holds pixels, which no autoencoder decodes; leave --autoencoder out')
    if manifest.kind != 'pixels' and autoencoder is None:
        raise UserError(f'{folder}: holds latents of {manifest.autoencoder}; give it as --autoencoder')
    if autoencoder is not None:
        check_agreement(manifest, channels=autoencoder.channels, autoencoder_hash=autoencoder.weight_hash())
    total = manifest.num_samples
    positions = np.sort(np.random.default_rng(seed).choice(total, min(count, total), replace=False))
    rows: dict[int, dict[str, Any]] = {}
    for shard in read_index(folder):
        inside = positions[(positions >= shard.start) & (positions < shard.start + shard.samples)].tolist()
        if inside:
            contents = sound_rows(shard, [position - shard.start for position in inside])
            rows |= {position: row for position, (_, row) in zip(inside, contents, strict=True)}
    stored_NKHW = torch.from_numpy(
        np.stack([row[column] for row in rows.values() for column in (LATENTS, LATENTS_MIRRORED)[: 1 + mirrored]])
    )
    decode = (autoencoder or Pixels()).decode
    latents_NCHW = stored_NKHW.float()[:, : manifest.channels]
    pixels_NCHW = torch.cat([decode(latents.to(device)).cpu() for latents in latents_NCHW.split(_BATCH)])
    broken = int((~pixels_NCHW.isfinite()).flatten(1).any(1).sum())
    words = [
        *([f'{broken} OF {len(pixels_NCHW)} IMAGES ARE NOT FINITE (shown grey)'] if broken else []),
        f'{folder.name}: {len(rows)} of {total:,} samples, seed {seed}',
        f'{manifest.kind} of {manifest.autoencoder}' if manifest.autoencoder else 'pixels',
        *(['each with its mirror image'] if mirrored else []),
    ]
    tiles_NHW3 = to_tiles(pixels_NCHW)
    views = 1 + mirrored
    height, width = tiles_NHW3.shape[1:3]
    picture = picture_grid(
        tiles_NHW3,
        ', '.join(words),
        columns=max(1, round(math.sqrt(len(rows) * height / (views * width)))),  # about as wide as high
        captions=[(_class_name(int(row[LABEL]), manifest.class_names), f'#{number}') for number, row in rows.items()],
        views=views,
        smallest=_TILE,
    )
    write_atomically(out, png_bytes(picture))
    return rows


def _class_name(label: int, class_names: tuple[str, ...]) -> str:
    if not class_names:
        return 'no classes'
    if not 0 <= label < len(class_names):
        return f'{label}: NO SUCH CLASS'
    return class_names[label] if class_names[label] == str(label) else f'{label}: {class_names[label]}'
