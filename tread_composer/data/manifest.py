"""What a latents data set says about itself: ``manifest.json`` beside ``index.json``, for writers, reader and checks.

Which autoencoder, which of its outputs, which crop and how many classes cannot be seen in the shards; guessing any of
them wrong costs image quality without an error. So a data set without a manifest, or with one that says more or less
than this file knows, is refused.
"""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tread_composer.core.errors import UserError
from tread_composer.data.columns import Kind, stored_shape
from tread_composer.io.files import whole_file

__all__ = ['FORMAT_VERSION', 'MANIFEST_NAME', 'Manifest']

FORMAT_VERSION = 1
MANIFEST_NAME = 'manifest.json'

_Count = Annotated[int, Field(ge=1)]


class Manifest(BaseModel):
    """The manifest of one split. Frozen; every field is required, none may be added.

    Attributes:
        format_version: Version of this description, 1.
        kind: ``'pixels'`` (no autoencoder), ``'samples'`` (one draw of the posterior) or ``'moments'`` (mean and
            log-variance, ``2 * channels`` stored).
        autoencoder: Which autoencoder: a hub id or a name; None for pixels.
        autoencoder_hash: Hash of its weights, as ``KL.weight_hash()`` gives it; None for pixels.
        channels: Channels of the latent that the model sees.
        latent_height: Its height.
        latent_width: Its width.
        resolution: Side of the image in pixels.
        crop: ``'none'`` or ``'center'``.
        mirrored: Whether the latents of the mirrored images are stored too.
        num_samples: Rows in the shards.
        num_classes: 0 for data without labels.
        class_names: One for each class.
        mean: Mean of each channel of the raw latents (for moments: of draws from the posterior).
        std: Standard deviation of each channel, likewise.
        permutation_seed: Seed of the one permutation before writing; None if the source order was kept.
        tool_version: Version of the tool that wrote the data.
        source: Where the images come from, in words.
    """

    model_config = ConfigDict(extra='forbid', strict=True, frozen=True, allow_inf_nan=False)

    format_version: Literal[1] = Field(description='1')
    kind: Kind
    autoencoder: str | None
    autoencoder_hash: str | None
    channels: _Count
    latent_height: _Count
    latent_width: _Count
    resolution: _Count
    crop: Literal['none', 'center']
    mirrored: bool
    num_samples: _Count
    num_classes: Annotated[int, Field(ge=0)]
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[Annotated[float, Field(gt=0)], ...]
    permutation_seed: Annotated[int, Field(ge=0)] | None
    tool_version: str
    source: str

    @model_validator(mode='after')
    def _fields_agree(self) -> 'Manifest':
        for name in ('mean', 'std'):
            if len(getattr(self, name)) != self.channels:
                raise ValueError(f'{name} has {len(getattr(self, name))} entries for {self.channels} channels')
        if len(self.class_names) != self.num_classes:
            raise ValueError(f'class_names has {len(self.class_names)} entries for num_classes={self.num_classes}')
        for name in ('autoencoder', 'autoencoder_hash'):
            if (getattr(self, name) is None) != (self.kind == 'pixels'):
                raise ValueError(
                    f'{name}={getattr(self, name)!r} with kind={self.kind!r}: null for pixels, else a text'
                )
        return self

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)`` of the latent that the model sees."""
        return (self.channels, self.latent_height, self.latent_width)

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)`` of an array in the shards."""
        return stored_shape(self.kind, self.latent_shape)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> 'Manifest':
        """Read ``folder/manifest.json``.

        Raises:
            UserError: No such file, or not exactly what this class describes; names the file, the key and the rule.
        """
        path = Path(folder) / MANIFEST_NAME
        try:
            text = path.read_bytes()  # pydantic complains of bytes that are no text, too
        except FileNotFoundError as error:
            raise UserError(
                f'{path}: no such file. A latents data set carries one beside index.json; '
                f'give the folder of one split, or prepare the data with a tool of this project'
            ) from error
        return cls.parse(text, f'{path}', 'Prepare the data again, or correct this file')

    @classmethod
    def parse(cls, text: str | bytes, source: str, remedy: str) -> 'Manifest':
        """Read a manifest's JSON text that lies elsewhere.

        Args:
            text: The JSON.
            source: What to call it in the message.
            remedy: What to do about a wrong one.

        Raises:
            UserError: Not exactly what this class describes; names the source, the key and the rule.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise UserError(f'{source}: {_in_words(error)}. {remedy}') from error

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``folder/manifest.json`` atomically: after a crash the old file or the new one is there, never half."""
        with whole_file(Path(folder) / MANIFEST_NAME) as unfinished:
            unfinished.write_text(self.model_dump_json(indent=2) + '\n', encoding='utf-8')


def _in_words(error: ValidationError) -> str:
    """The first three complaints of pydantic, each as key, value and rule."""
    words = []
    for item in error.errors()[:3]:
        key = '.'.join(str(part) for part in item['loc'])
        message = item['msg'].removeprefix('Value error, ')
        if item['type'] == 'missing':
            words.append(f'{key}: missing, every key is required')
        elif item['type'] == 'extra_forbidden':
            words.append(f'{key}: unknown key. Known: {", ".join(Manifest.model_fields)}')
        elif not key:
            words.append(message)
        else:
            words.append(f'{key}: {item["input"]!r} is not allowed: {message}')
    return '; '.join(words)
