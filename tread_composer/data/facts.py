"""What a trained model has to know of its data: less than a manifest says, and for imported weights all that is known.

For ``builders.build_model``, the exported files and the importer.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tread_composer.data.manifest import Manifest

__all__ = ['LatentFacts']

_Count = Annotated[int, Field(ge=1)]


class LatentFacts(BaseModel):
    """Facts of the training data, as a manifest has them (see ``Manifest``); null or empty is "not known".

    Attributes:
        channels: Channels of the latent that the model sees.
        latent_height: Its height.
        latent_width: Its width.
        num_classes: 0 for a model without labels.
        class_names: One for each class.
        autoencoder: Which autoencoder; None for pixels.
        autoencoder_hash: Hash of its weights; None for pixels, or where nobody has said it.
        resolution: Side of the image in pixels.
        mean: Mean of each channel of the raw latents.
        std: Standard deviation of each channel.
        num_samples: Samples of the training data.
        source: Where the images come from, in words.
    """

    model_config = ConfigDict(extra='forbid', strict=True, frozen=True, allow_inf_nan=False)

    channels: _Count
    latent_height: _Count
    latent_width: _Count
    num_classes: Annotated[int, Field(ge=0)]
    class_names: tuple[str, ...]
    autoencoder: str | None
    autoencoder_hash: str | None = None
    resolution: _Count | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    num_samples: _Count | None = None
    source: str | None = None

    @model_validator(mode='after')
    def _fields_agree(self) -> 'LatentFacts':
        if len(self.class_names) != self.num_classes:
            raise ValueError(f'class_names has {len(self.class_names)} entries for num_classes={self.num_classes}')
        return self

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)`` of the latent that the model sees."""
        return (self.channels, self.latent_height, self.latent_width)

    @classmethod
    def of(cls, manifest: Manifest) -> 'LatentFacts':
        """What a manifest says of these."""
        return cls(**{name: getattr(manifest, name) for name in cls.model_fields})
