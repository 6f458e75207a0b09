"""The published sizes of DiT as constructor arguments, for configurations.

S to XL: arXiv 2212.09748, Table 1. H: the code of MaskDiT, arXiv 2306.09305.
"""

__all__ = ['PRESETS', 'preset']

_SIZES = {
    # name    hidden_size  depth  num_heads
    'DiT-S':  (384,        12,    6),
    'DiT-B':  (768,        12,    12),
    'DiT-L':  (1024,       24,    16),
    'DiT-XL': (1152,       28,    16),
    'DiT-H':  (1280,       32,    16),
}  # fmt: skip

PRESETS: dict[str, dict[str, int]] = {
    f'{name}/{patch_size}': {
        'patch_size': patch_size,
        'hidden_size': hidden_size,
        'depth': depth,
        'num_heads': num_heads,
    }
    for name, (hidden_size, depth, num_heads) in _SIZES.items()
    for patch_size in (2, 4, 8)
}


def preset(name: str) -> dict[str, int]:
    """Constructor arguments of ``DiT`` for a published size such as ``'DiT-XL/2'`` (a fresh dict).

    Raises:
        ValueError: The name is not a published size.
    """
    if name not in PRESETS:
        raise ValueError(f'unknown preset {name!r}; choose one of {", ".join(PRESETS)}')
    return dict(PRESETS[name])
