"""Sections of the configuration that the builders read: which data, and how latents are normalized."""

import re
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, MinLen
from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from tread_composer.core.bounds import AtLeast1, Positive, Seed, Workers

__all__ = ['DATA', 'NORMALIZATIONS', 'Count', 'DigitsData', 'LatentsData', 'Name', 'RunName', 'PerChannelNormalization']

Count = Annotated[int, Ge(0)]
Name = Annotated[str, MinLen(1)]
_RUN_NAME = re.compile(r'[\w][\w .,+=@~^()#:-]{0,199}')


def _run_name(value: str) -> str:
    if _RUN_NAME.fullmatch(value) and len(value.encode()) <= 200:
        return value
    text = '{value} names a folder: at most 200 letters, digits, spaces and -_.,+=@~^()#:, a letter or digit first'
    raise PydanticCustomError('rule', text, {'value': repr(value[:60])})


RunName = Annotated[str, AfterValidator(_run_name)]


@dataclass(frozen=True)
class DigitsData:
    """The scikit-learn digits, converted to MDS; made on the spot if the folder is not there.

    Args:
        local: Folder of the shards.
        num_workers: Reading processes per rank.
        shuffle_seed: Seed of the order of the samples; the run's seed if null.
    """

    name: ClassVar[Literal['digits']] = 'digits'

    local: str
    num_workers: Workers = 0
    shuffle_seed: Seed | None = None


@dataclass(frozen=True)
class LatentsData:
    """Latents of images, written by ``streaming_data/``.

    Args:
        local: Folder with one data set a split.
        train_split: Name of the sub-folder to train on.
        eval_split: null trains without evaluation.
        remote: URI to stream from, such as ``s3://bucket/imagenet256``; ``local`` is then the cache.
        kind: This and the next three: what the data must say of themselves; null takes what they say.
        channels: Channels of the latents.
        latent_size: Side of the latents in pixels.
        num_classes: Number of classes; 0 is unconditional.
        mirror: Take the latents of the mirrored image half of the time; null does so where the data have them.
        in_memory: Without effect, for files of earlier versions: local shards are read from the page cache, which
            ranks share.
        num_workers: Reading processes per rank; null is 2, with ``remote`` 8.
        shuffle_seed: Seed of the order of the samples; the run's seed if null.
        cache_limit: Bytes kept on the local disk, as a number or such as ``200gb``; needs ``remote``.
        predownload: Samples fetched ahead per worker; needs ``remote``.
        num_canonical_nodes: Paths through the shards that the order is made of; see ``data.latents.LatentDataset``.
        validate_hash: Hash to check of each shard that is read, such as ``xxh64``.
        download_retry: Attempts to fetch a shard.
        download_timeout: Seconds before a download counts as failed.
    """

    name: ClassVar[Literal['latents']] = 'latents'

    local: str
    train_split: Name = 'train'
    eval_split: Name | None = 'val'
    remote: str | None = None
    kind: Literal['pixels', 'samples', 'moments'] | None = None
    channels: AtLeast1 | None = None
    latent_size: AtLeast1 | None = None
    num_classes: Count | None = None
    mirror: bool | None = None
    in_memory: bool = False
    num_workers: Workers | None = None
    shuffle_seed: Seed | None = None
    cache_limit: AtLeast1 | str | None = None
    predownload: AtLeast1 | None = None
    num_canonical_nodes: AtLeast1 = 1
    validate_hash: str | None = None
    download_retry: AtLeast1 = 2
    download_timeout: Positive = 60.0


@dataclass(frozen=True)
class PerChannelNormalization:
    """Each channel to mean 0 and one standard deviation, from what the manifest of the training data says.

    Args:
        std: The standard deviation that the network sees: the latent strength.
    """

    name: ClassVar[Literal['per_channel']] = 'per_channel'

    std: Positive = 1.0


DATA = {'digits': DigitsData, 'latents': LatentsData}
NORMALIZATIONS = {'per_channel': PerChannelNormalization}
