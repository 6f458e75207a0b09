"""Small data sets as a conversion writes them: parts in sub-folders, one index, a manifest that is true."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from streaming import MDSWriter
from streaming.base.util import merge_index

from tread_composer.data import Manifest, columns

SAMPLES, CLASSES, SHAPE = 200, 4, (3, 4, 4)

Rows = list[dict[str, Any]]


def make_rows(kind: str = 'moments', mirrored: bool = True, samples: int = SAMPLES) -> Rows:
    """Permuted samples with different statistics in each channel."""
    random = np.random.default_rng(0)
    scale, shift = (np.array(values).reshape(3, 1, 1) for values in ([1, 2, 3], [0, 1, -1]))
    rows = []
    for index in random.permutation(samples):
        row: dict[str, Any] = {'label': int(index) % CLASSES, 'name': f'class{index % CLASSES}/{index}.JPEG'}
        for column in ('latents', 'latents_mirrored')[: 1 + mirrored]:
            mean = random.normal(size=SHAPE) * scale + shift
            arrays = [mean, random.normal(size=SHAPE) - 1] if kind == 'moments' else [mean]
            row[column] = np.concatenate(arrays).astype(np.float16)
        if kind == 'pixels' and mirrored:
            row['latents_mirrored'] = row['latents'][..., ::-1].copy()
        rows.append(row)
    return rows


def make_manifest(rows: Rows, kind: str = 'moments', **changes: Any) -> Manifest:
    stored = np.stack([row[c] for row in rows for c in ('latents', 'latents_mirrored') if c in row]).astype(np.float64)
    mean, rest = stored[:, :3], stored[:, 3:]
    second = mean**2 + (np.exp(rest) if kind == 'moments' else 0)
    first = mean.mean((0, 2, 3))
    facts: dict[str, Any] = {
        'format_version': 1,
        'kind': kind,
        'autoencoder': None if kind == 'pixels' else 'a/b',
        'autoencoder_hash': None if kind == 'pixels' else 'sha256:0',
        'channels': SHAPE[0],
        'latent_height': SHAPE[1],
        'latent_width': SHAPE[2],
        'resolution': 8,
        'crop': 'center',
        'mirrored': 'latents_mirrored' in rows[0],
        'num_samples': len(rows),
        'num_classes': CLASSES,
        'class_names': tuple(f'class{label}' for label in range(CLASSES)),
        'mean': tuple(first.tolist()),
        'std': tuple(np.sqrt(second.mean((0, 2, 3)) - first**2).tolist()),
        'permutation_seed': 0,
        'tool_version': 'test',
        'source': 'a test',
    }
    return Manifest(**{**facts, **changes})


def write_split(
    folder: Path,
    rows: Rows | None = None,
    kind: str = 'moments',
    change: Callable[[Rows], Any] | None = None,
    *,
    parts: int = 2,
    compression: str | None = None,
    hashes: tuple[str, ...] = ('xxh64',),
    size_limit: int = 8000,
    **manifest: Any,
) -> Path:
    """A split. ``change`` alters the rows after the manifest was made of them, so that it is not true any more."""
    rows = make_rows(kind) if rows is None else rows
    described = make_manifest(rows, kind, **manifest)
    if change:
        change(rows)
    columns_ = columns(kind, SHAPE, 'latents_mirrored' in rows[0])
    each = -(-len(rows) // parts)
    for part in range(parts):
        options = {'compression': compression, 'hashes': list(hashes), 'size_limit': size_limit}
        with MDSWriter(out=str(folder / f'{part:05d}'), columns=columns_, **options) as writer:
            for row in rows[part * each : (part + 1) * each]:
                writer.write(row)
    merge_index(str(folder), keep_local=True)
    described.save(folder)
    return folder
