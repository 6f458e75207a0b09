"""Names and encodings of the columns of a latents data set, for whoever writes shards and whoever reads them.

Every sample is one row: the raw latents with a fixed shape and type (so that a shard holds no pickled objects and a
row of the wrong shape is refused by the writer), the label and the name of the source.
Legend: C channels, H x W latent pixels.
"""

from collections.abc import Sequence
from typing import Literal

__all__ = ['KINDS', 'LABEL', 'LATENTS', 'LATENTS_MIRRORED', 'NAME', 'Kind', 'columns', 'stored_shape']

Kind = Literal['pixels', 'samples', 'moments']
KINDS: tuple[str, ...] = ('pixels', 'samples', 'moments')

LATENTS = 'latents'
LATENTS_MIRRORED = 'latents_mirrored'  # of the mirrored image: a latent itself cannot be mirrored
LABEL = 'label'
NAME = 'name'


def stored_shape(kind: str, shape: Sequence[int]) -> tuple[int, int, int]:
    """Shape of a stored array for a latent of ``shape`` ``(C, H, W)``: moments hold mean and log-variance, 2C channels.

    Raises:
        ValueError: Unknown kind, or a shape that is not three positive numbers.
    """
    if kind not in KINDS:
        raise ValueError(f'kind={kind!r} is not known; choose one of {", ".join(KINDS)}')
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f'shape={tuple(shape)} must be three positive numbers: channels, height, width')
    channels, height, width = shape
    return (2 * channels if kind == 'moments' else channels, height, width)


def columns(kind: str, shape: Sequence[int], mirrored: bool = False) -> dict[str, str]:
    """Column name -> MDS encoding, as ``streaming.MDSWriter(columns=...)`` wants it; arguments as ``stored_shape``.

    ``mirrored``: the latents of the mirrored image are stored as well.
    """
    # MDS has no bfloat16; half precision keeps a 256-pixel ImageNet of moments at 21 GB.
    array = 'ndarray:float16:' + ','.join(str(size) for size in stored_shape(kind, shape))
    latents = [LATENTS, LATENTS_MIRRORED] if mirrored else [LATENTS]
    return dict.fromkeys(latents, array) | {LABEL: 'int64', NAME: 'str'}
