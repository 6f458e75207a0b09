"""Checks before training that a data set is whole and is the one that the run was written for."""

import os
from pathlib import Path
from typing import Any

from streaming.base.storage.download import CloudDownloader

from tread_composer.core.errors import UserError
from tread_composer.data.columns import columns
from tread_composer.data.manifest import MANIFEST_NAME, Manifest
from tread_composer.data.shards import file_faults, read_index
from tread_composer.io.files import whole_file

__all__ = ['check_agreement', 'check_shards', 'fetch_descriptions']

_REMEDY = 'copy or prepare the data again'


def check_shards(
    folder: str | os.PathLike[str], manifest: Manifest, *, remote: bool = False, hashes: bool = False
) -> None:
    """Compare the shards with ``index.json`` and the index with the manifest. Reads no shard unless ``hashes``.

    Args:
        folder: One split, which ``manifest`` describes.
        remote: The shards are fetched from elsewhere: check the index only, ``folder`` may lack any of them.
        hashes: Also read every shard and compare its hash: the only way to find flipped bytes.

    Raises:
        UserError: The first thing that is wrong; names the file, what was expected and what was found.
    """
    path = Path(folder) / 'index.json'
    shards = read_index(Path(folder))
    expected = columns(manifest.kind, manifest.latent_shape, manifest.mirrored)
    for number, shard in enumerate(shards):
        if shard.encodings != expected:
            raise UserError(
                f'{path}: columns of shard {number} are {shard.encodings}, the manifest describes {expected}; {_REMEDY}'
            )
        if remote:
            continue
        # Of the two forms that the index may know, raw and compressed, the first that is there must be right.
        form = next((form for form in shard.forms if (shard.folder / form.basename).is_file()), None)
        if form is None:
            raise UserError(f'{shard.path}: this shard is missing; {_REMEDY}')
        file = shard.folder / form.basename
        for fault in file_faults(file, form, file.stat().st_size, file.read_bytes() if hashes else None):
            raise UserError(f'{fault}; {_REMEDY}')
    total = sum(shard.samples for shard in shards)
    if total != manifest.num_samples:
        raise UserError(f'{path}: {total} samples, but the manifest has num_samples={manifest.num_samples}; {_REMEDY}')


def fetch_descriptions(remote: str, folder: str | os.PathLike[str]) -> None:
    """Bring ``manifest.json`` and ``index.json`` of a split from where its shards are, if they are not in ``folder``.

    Raises:
        UserError: One of them cannot be fetched.
    """
    for name in (MANIFEST_NAME, 'index.json'):
        path = Path(folder) / name
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with whole_file(path) as unfinished:
                unfinished.unlink()  # streaming would take it for fetched
                url = f'{remote}/{name}'
                CloudDownloader.get(url).download(url, str(unfinished), timeout=60)
        except Exception as error:
            raise UserError(f'data.remote: {remote}/{name} cannot be fetched: {error}') from error


def check_agreement(manifest: Manifest, **expected: Any) -> None:
    """Refuse data that contradict what a run expects. None means: the run does not say.

    Args:
        **expected: ``kind``, ``channels``, ``num_classes`` (0 for a run without labels) and ``autoencoder_hash`` as in
            a manifest, ``autoencoder`` too, but ``'pixels'`` for none, and ``latent_size``: height and width.

    Raises:
        UserError: Lists every contradiction with both values and the remedy.
    """
    stored = {
        **manifest.model_dump(),
        'autoencoder': manifest.autoencoder or 'pixels',
        'latent_size': (manifest.latent_height, manifest.latent_width),
    }
    lines = [
        f'  {key}: the run expects {value!r}, the data have {stored[key]!r}; {_AGREEMENT_REMEDIES[key]}'
        for key, value in expected.items()
        if value not in (None, stored[key])
    ]
    if lines:
        raise UserError('\n'.join([f'the data ({manifest.source}) do not fit this run:', *lines]))


_AGREEMENT_REMEDIES = {
    'kind': 'moments are sampled when they are read, samples and pixels are not: correct the setting',
    'autoencoder': 'latents of one autoencoder mean nothing to another: name the one of the data, or encode again',
    'autoencoder_hash': 'same name but other weights (a fine-tuned decoder?): use the weights of the data',
    'channels': 'if the data have twice as many, they are moments (means and log-variances) described as samples',
    'latent_size': 'set the model up for the size of the data, or encode at another resolution',
    'num_classes': 'take the number from the data; 0 trains without labels',
}
