"""What a latents data set says about itself: ``manifest.json`` beside ``index.json``, for writers, reader and checks.

Which autoencoder, which of its outputs, which crop and how many classes cannot be seen in the shards; guessing any of
them wrong costs image quality without an error. So a data set without a manifest, or with one that says more or less
than this file knows, is refused.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tread_composer.core.errors import UserError
from tread_composer.data.columns import Kind
from tread_composer.io.files import write_atomically

__all__ = [
    'FORMAT_VERSION', 'MANIFEST_NAME', 'LatentFacts', 'Manifest', 'Scaling', 'contradictions', 'read_class_names',
]  # fmt: skip

FORMAT_VERSION = 1
MANIFEST_NAME = 'manifest.json'

_Count = Annotated[int, Field(ge=1)]


class _Latents(BaseModel):
    model_config = ConfigDict(extra='forbid', strict=True, frozen=True, allow_inf_nan=False)

    channels: _Count  # of the latent that the model sees
    latent_height: _Count
    latent_width: _Count
    num_classes: Annotated[int, Field(ge=0)]  # 0 for data without labels
    class_names: tuple[str, ...]
    autoencoder: str | None  # a hub id or a name; None for pixels

    @model_validator(mode='after')
    def _classes_agree(self) -> '_Latents':
        if len(self.class_names) != self.num_classes:
            raise ValueError(f'class_names has {len(self.class_names)} entries for num_classes={self.num_classes}')
        return self

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)`` of the latent that the model sees."""
        return (self.channels, self.latent_height, self.latent_width)

    @property
    def sizes(self) -> dict[str, int]:
        """What a backbone is built for."""
        return {'channels': self.channels, 'latent_size': self.latent_height, 'num_classes': self.num_classes}


class LatentFacts(_Latents):
    """What a trained model has to know of its data: some of a manifest, and for imported weights all that is known.

    Null or empty is "not known". For ``builders.build_model``, the exported files and the importer.
    """

    autoencoder_hash: str | None = None
    resolution: _Count | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    num_samples: _Count | None = None
    source: str | None = None

    @property
    def auto_scaling(self) -> 'Scaling':
        """What ``latent_scale: auto`` means; ``UserError`` where the statistics of the data are not known."""
        if not self.mean:
            raise UserError('latent_scale: auto: nothing is known of the training data; give a number')
        return Scaling.measured(self.mean, self.std)

    @classmethod
    def of(cls, manifest: 'Manifest') -> 'LatentFacts':
        """What a manifest says of these."""
        return cls(**{name: getattr(manifest, name) for name in cls.model_fields})


class Scaling(BaseModel):
    """What ``latent_scale: auto`` means: ``latents = (raw - shift) * scale``, one number or one for each channel."""

    model_config = ConfigDict(extra='forbid', strict=True, frozen=True, allow_inf_nan=False)

    source: str  # `measured`, or for which autoencoder it is published
    scale: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)]
    shift: Annotated[tuple[float, ...], Field(min_length=1)]

    @classmethod
    def measured(cls, mean: Sequence[float], std: Sequence[float], strength: float = 1.0) -> 'Scaling':
        """Each channel to mean 0 and the standard deviation ``strength``."""
        # Statistics may differ in the last bits between machines; those must not tell two runs apart.
        scale = tuple(float(f'{strength / value:.6g}') for value in std)
        return cls(source='measured', scale=scale, shift=tuple(float(f'{value:.6g}') for value in mean))


class Manifest(_Latents):
    """The manifest of one split. Frozen; no field may be added, and only those are optional that older data lack."""

    autoencoder_hash: str | None  # of its weights, as `weight_hash()` gives it; None for pixels
    resolution: _Count  # side of the image in pixels
    mean: tuple[float, ...]  # of each channel of the raw latents (for moments: of draws from the posterior)
    std: tuple[Annotated[float, Field(gt=0)], ...]  # standard deviation, likewise
    num_samples: _Count  # rows in the shards
    source: str  # where the images come from, in words
    format_version: Literal[1]
    kind: Kind  # `pixels` (no autoencoder), `samples` (one draw of the posterior) or `moments` (mean, log-variance)
    crop: Literal['none', 'center']
    mirrored: bool  # whether the latents of the mirrored images are stored too
    permutation_seed: Annotated[int, Field(ge=0)] | None  # of the one permutation before writing; None for none
    tool_version: str  # of the tool that wrote the data
    scaling: Scaling | None = None  # what training takes for `latent_scale: auto`; without it, what was measured
    background: str | None = None  # the colour below transparent images; `stored`: their own, as in data without this

    @model_validator(mode='after')
    def _fields_agree(self) -> 'Manifest':
        for name in ('mean', 'std'):
            if len(getattr(self, name)) != self.channels:
                raise ValueError(f'{name} has {len(getattr(self, name))} entries for {self.channels} channels')
        for name in ('scale', 'shift') if self.scaling is not None else ():
            if len(getattr(self.scaling, name)) not in (1, self.channels):
                raise ValueError(f'scaling.{name}: one number, or one for each of {self.channels} channels')
        for name in ('autoencoder', 'autoencoder_hash'):
            if (getattr(self, name) is None) != (self.kind == 'pixels'):
                raise ValueError(
                    f'{name}={getattr(self, name)!r} with kind={self.kind!r}: null for pixels, else a text'
                )
        return self

    @property
    def auto_scaling(self) -> Scaling:
        """What training takes for ``latent_scale: auto``."""
        return self.scaling or Scaling.measured(self.mean, self.std)

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
        """Read a manifest's JSON text from elsewhere; a ``UserError`` names ``source``, key, rule and ``remedy``."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise UserError(f'{source}: {_in_words(error)}. {remedy}') from error

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``folder/manifest.json`` atomically: after a crash the old file or the new one is there, never half."""
        write_atomically(Path(folder) / MANIFEST_NAME, f'{self.model_dump_json(indent=2)}\n'.encode())


def contradictions(facts: Mapping[Path, Mapping[str, Any]]) -> list[str]:
    """A line for each fact in which a place is not like the first that says it; None and absence say nothing."""
    lines: list[str] = []
    for key in dict.fromkeys(key for values in facts.values() for key in values):
        answers = [(place, values[key]) for place, values in facts.items() if values.get(key) is not None]
        for place, value in answers[1:]:
            if value != answers[0][1]:
                texts = [repr(answers[0][1]), repr(value)]  # of a thousand class names, show those that differ
                begin = max(0, len(os.path.commonprefix(texts)) - 50)  # noqa: RUF071 - letter by letter
                first, second = (f'{"..." if begin else ""}{text[begin : begin + 100]}' for text in texts)
                lines.append(f'{key}: {first} in {answers[0][0]}, {second} in {place}')
    return lines


def read_class_names(path: Path, unique: bool = True) -> tuple[str, ...]:
    """Class names in label order, from a text with one a line or a ``.json`` list of texts.

    Not ``unique``: names for people, of which ImageNet has two cranes.

    Raises:
        UserError: It cannot be read, or has no name, an empty one, one that is no text or one that occurs twice.
    """
    try:
        text = path.read_text(encoding='utf-8')
        names = json.loads(text) if path.suffix == '.json' else [line.strip() for line in text.splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f'--class-names {path}: cannot be read: {error}') from error
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(f'--class-names {path}: no list of texts; give one name a class, in the order of labels')
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if unique and repeated:
        raise UserError(f'--class-names {path}: {", ".join(repeated[:5])}: more than once; give each name once')
    return tuple(names)


def _in_words(error: ValidationError) -> str:
    """The first three complaints of pydantic, each as key, value and rule."""
    words = []
    # The version first: of a manifest of another one nothing else is certain.
    for item in sorted(error.errors(), key=lambda item: item['loc'] != ('format_version',))[:3]:
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
