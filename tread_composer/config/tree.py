"""The typed tree of a run: what a YAML file may say, section by section.

Sections that choose between kinds have a ``name``; the arguments of another kind are errors.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, InstanceOf, WithJsonSchema

from tread_composer.callbacks.update_guard import OnNonfinite
from tread_composer.config.components import Component
from tread_composer.config.document import dump_yaml
from tread_composer.config.registry import resolve
from tread_composer.config.schema import Strict, plain
from tread_composer.config.trainer_settings import BUILT_BY_US, TrainerSettings
from tread_composer.routing import Route
from tread_composer.routing.tokens import AlwaysKeep

__all__ = ['Config', 'DigitsData', 'LatentsData', 'PerChannelNormalization', 'backbone_arguments']

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Above0 = Annotated[float, Field(gt=0)]
OneOrPerChannel = float | Annotated[list[float], Field(min_length=1)]
ComponentField = Annotated[InstanceOf[Component], WithJsonSchema({'type': 'object'})]


class DigitsData(Strict):
    """The scikit-learn digits, converted to MDS; made on the spot if the folder is not there."""

    name: Literal['digits'] = 'digits'
    local: str
    """Folder of the shards."""
    num_workers: Count = 0
    """Reading processes per rank."""
    shuffle_seed: Count | None = None
    """Seed of the order of the samples; the run's seed if null."""


class LatentsData(Strict):
    """Latents of images, written by ``streaming_data/``."""

    name: Literal['latents'] = 'latents'
    local: str
    """Folder with one data set a split."""
    train_split: Annotated[str, Field(min_length=1)] = 'train'
    """Name of the sub-folder to train on."""
    eval_split: Annotated[str, Field(min_length=1)] | None = 'val'
    """null trains without evaluation."""
    remote: str | None = None
    """URI to stream from, such as ``s3://bucket/imagenet256``; ``local`` is then the cache."""
    kind: Literal['pixels', 'samples', 'moments'] | None = None
    """This and the next three: what the data must say of themselves; null takes what they say."""
    channels: Positive | None = None
    """Channels of the latents."""
    latent_size: Positive | None = None
    """Side of the latents in pixels."""
    num_classes: Count | None = None
    """Number of classes; 0 is unconditional."""
    mirror: bool | None = None
    """Take the latents of the mirrored image half of the time; null does so where the data have them."""
    in_memory: bool = False
    """Without effect, for files of earlier versions: local shards are read from the page cache, which ranks share."""
    num_workers: Count | None = None
    """Reading processes per rank; null is 2, with ``remote`` 8."""
    shuffle_seed: Count | None = None
    """Seed of the order of the samples; the run's seed if null."""
    cache_limit: Positive | str | None = None
    """Bytes kept on the local disk, as a number or such as ``200gb``; needs ``remote``."""
    predownload: Positive | None = None
    """Samples fetched ahead per worker; needs ``remote``."""
    num_canonical_nodes: Positive = 1
    """Paths through the shards that the order is made of; see ``data.latents.LatentDataset``."""
    validate_hash: str | None = None
    """Hash to check of each shard that is read, such as ``xxh64``."""
    download_retry: Positive = 2
    """Attempts to fetch a shard."""
    download_timeout: Above0 = 60.0
    """Seconds before a download counts as failed."""


class PerChannelNormalization(Strict):
    """Each channel to mean 0 and one standard deviation, from what the manifest of the training data says."""

    name: Literal['per_channel'] = 'per_channel'
    std: Above0 = 1.0
    """The standard deviation that the network sees: the latent strength."""


class Config(TrainerSettings):
    """A whole run. Keywords of the Trainer stand beside the sections, under Composer's names."""

    run_name: Annotated[str, Field(min_length=1)]
    """Identifies the run: its folder, its MLflow run, its checkpoints."""
    seed: Count = 17
    """Of weights, batches, noise, times, routes and label dropout."""
    global_train_batch_size: Positive
    """Samples per step over all ranks; must be a multiple of the ranks."""
    global_eval_batch_size: Positive
    """Samples per evaluation step over all ranks."""
    data: DigitsData | LatentsData = Field(discriminator='name')
    """What is trained on; see the two sections below."""
    autoencoder: ComponentField
    """What made the latents and decodes samples."""
    model: ComponentField
    """The network; ``dit`` without a name."""
    objective: ComponentField
    """What the network learns."""
    latent_scale: OneOrPerChannel = 1.0
    """``latents = (raw - shift) * scale``; one number or one per channel."""
    latent_shift: OneOrPerChannel = 0.0
    """As ``latent_scale``."""
    latent_normalization: PerChannelNormalization | None = None
    """Instead of numbers for the two above: computed from the training data's manifest."""
    label_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of labels replaced by the null label in training, for classifier-free guidance."""
    compile: bool = False
    """``torch.compile``: the whole model in one process, each block in several."""
    on_nonfinite: OnNonfinite = 'stop'
    """What to do with a batch whose gradient is not finite; see ``callbacks.update_guard``."""
    spike_factor: Annotated[float, Field(gt=1)] | None = None
    """A gradient norm above this multiple of the running median counts as not finite; null accepts any."""
    optimizer: ComponentField
    """By name, with the constructor's own arguments."""
    scheduler: ComponentField = Component('scheduler', 'constant')
    """Of the learning rate."""
    algorithms: dict[str, ComponentField] = Field(default={})
    """Name to arguments."""
    callbacks: dict[str, ComponentField] = Field(default={})
    """Name to arguments."""
    loggers: dict[str, ComponentField] = Field(default={})
    """Name to arguments."""

    def routes(self) -> list[Route]:
        """The routes of all algorithms that have some."""
        routes = (route for part in self.algorithms.values() for route in getattr(part.instance, 'routes', ()))
        return [route for route in routes if isinstance(route, Route)]

    def always_keep(self) -> AlwaysKeep:
        """How many positions never skip, leading or leading and trailing; 0 if no algorithm has such a setting."""
        values = (getattr(part.instance, 'always_keep', None) for part in self.algorithms.values())
        return next((value for value in values if value is not None), 0)

    def depth(self) -> int | None:
        """Number of blocks, where the network's arguments decide it."""
        return backbone_arguments(self.model).get('depth')

    def token_arguments(self) -> tuple[str, ...]:
        """Arguments of the network's blocks that have one row for each token."""
        return tuple(getattr(resolve('backbone', self.model.name), 'token_arguments', ()))

    def normalized(self, mean: Sequence[float], std: Sequence[float]) -> 'Config':
        """The configuration with ``latent_normalization`` turned into numbers; itself if there is none.

        A run keeps the numbers (``config.yaml``), so that resuming and evaluating do not depend on the manifest.

        Args:
            mean: Of each channel of the raw latents.
            std: Of each channel.
        """
        if self.latent_normalization is None:
            return self
        # Statistics may differ in the last bits between machines; those must not tell two runs apart.
        numbers = {
            'latent_scale': [float(f'{self.latent_normalization.std / value:.6g}') for value in std],
            'latent_shift': [float(f'{value:.6g}') for value in mean],
        }
        return self.model_copy(update={**numbers, 'latent_normalization': None})

    def trainer_arguments(self) -> dict[str, Any]:
        """The keywords for ``composer.Trainer``, defaults included, but for the objects that the builders make."""
        names = [name for name in TrainerSettings.model_fields if name not in BUILT_BY_US]
        values = {name: getattr(self, name) for name in ('run_name', 'seed', *names)}
        return {name: plain(value) for name, value in values.items()}

    def to_dict(self) -> dict[str, Any]:
        """The resolved run as plain values, defaults included; loading it again gives an equal ``Config``."""
        sections = [name for name in type(self).model_fields if name not in TrainerSettings.model_fields]
        tree: dict[str, Any] = {}
        for name in (*sections, *TrainerSettings.model_fields):
            value = getattr(self, name)
            if value is None and type(self).model_fields[name].default is None:
                continue
            tree[name] = _tree_of(value)
        return tree

    def to_yaml(self) -> str:
        """``to_dict`` as YAML text."""
        return dump_yaml(self.to_dict())


def backbone_arguments(model: Component) -> dict[str, Any]:
    """A network's constructor arguments but for those that the data decide (latent size, channels, classes).

    Args:
        model: The component; a ``preset`` stands for the sizes that it decides.
    """
    # The implementation of attention is chosen where the device is known (``use_attention``).
    arguments = {key: value for key, value in model.kwargs.items() if key not in ('preset', 'attention')}
    preset = model.kwargs.get('preset')
    return {**arguments, **resolve('backbone', model.name).presets[preset]} if preset else arguments  # type: ignore[attr-defined]


def _tree_of(value: Any) -> Any:
    if isinstance(value, Component):
        return {'name': value.name, **value.to_plain()}
    if isinstance(value, dict) and all(isinstance(item, Component) for item in value.values()):
        return {name: item.to_plain() for name, item in value.items()}
    if isinstance(value, Strict) and 'name' in type(value).model_fields:
        fields = type(value).model_fields
        kept = {name: getattr(value, name) for name in fields}
        return {
            name: _tree_of(item) for name, item in kept.items() if item is not None or fields[name].default is not None
        }
    return plain(value)
