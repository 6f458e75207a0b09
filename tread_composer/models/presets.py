"""The published sizes of DiT and LightningDiT, and sizes of Mamba2DiT, as constructor arguments for configurations.

DiT S to XL: arXiv 2212.09748, Table 1. H: the code of MaskDiT, arXiv 2306.09305. LightningDiT: the code of arXiv
2501.01423. Mamba2DiT: ours, none is published; width and depth of the DiT of the same letter.
"""

from collections.abc import Mapping, Sequence

__all__ = ['LIGHTNING_DIT_PRESETS', 'MAMBA2_DIT_PRESETS', 'PRESETS', 'preset']

_SIZES = {
    # name    hidden_size  depth  num_heads
    'DiT-S':  (384,        12,    6),
    'DiT-B':  (768,        12,    12),
    'DiT-L':  (1024,       24,    16),
    'DiT-XL': (1152,       28,    16),
    'DiT-H':  (1280,       32,    16),
}  # fmt: skip

_LIGHTNING_SIZES = {
    # name              hidden_size  depth  num_heads
    'LightningDiT-B':    (768,        12,    12),
    'LightningDiT-L':    (1024,       24,    16),
    'LightningDiT-XL':   (1152,       28,    16),
    'LightningDiT-1p0B': (1536,       24,    24),
    'LightningDiT-1p6B': (1792,       28,    28),
}  # fmt: skip


def _presets(sizes: Mapping[str, tuple[int, int, int]], patch_sizes: Sequence[int]) -> dict[str, dict[str, int]]:
    return {
        f'{name}/{patch_size}': {
            'patch_size': patch_size,
            'hidden_size': hidden_size,
            'depth': depth,
            'num_heads': num_heads,
        }
        for name, (hidden_size, depth, num_heads) in sizes.items()
        for patch_size in patch_sizes
    }


PRESETS = _presets(_SIZES, (2, 4, 8))
LIGHTNING_DIT_PRESETS = _presets(_LIGHTNING_SIZES, (1, 2))
MAMBA2_DIT_PRESETS = {
    f'Mamba2-{name}': {key: value for key, value in sizes.items() if key != 'num_heads'}
    for name, sizes in PRESETS.items()
    if not name.startswith('DiT-H')
}


def preset(name: str) -> dict[str, int]:
    """Constructor arguments of ``DiT`` for a published size such as ``'DiT-XL/2'`` (a fresh dict).

    Raises:
        ValueError: The name is not a published size.
    """
    if name not in PRESETS:
        raise ValueError(f'unknown preset {name!r}; choose one of {", ".join(PRESETS)}')
    return dict(PRESETS[name])
