"""The typed tree of a run: what a YAML file may say, section by section.

Sections that choose between kinds have a ``name``; the arguments of another kind are errors.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union

from pydantic import BeforeValidator, Field, InstanceOf, WithJsonSchema, create_model

from tread_composer.config.components import Component
from tread_composer.config.document import dump_yaml
from tread_composer.config.schema import Strict, plain, signature_fields
from tread_composer.config.trainer_settings import BUILT_BY_US, TrainerSettings
from tread_composer.models import BACKBONES, LatentTransformer
from tread_composer.routing import Route

__all__ = [
    'Config',
    'DDPMObjective',
    'CosMapTimes',
    'DigitsData',
    'EDMObjective',
    'FlowMatchingObjective',
    'KLAutoencoder',
    'LatentsData',
    'LogitNormalTimes',
    'MinSNRWeighting',
    'ModeTimes',
    'ModelSection',
    'PerChannelNormalization',
    'PixelsAutoencoder',
    'UniformTimes',
]

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Above0 = Annotated[float, Field(gt=0)]
OneOrPerChannel = float | Annotated[list[float], Field(min_length=1)]
ComponentField = Annotated[InstanceOf[Component], WithJsonSchema({'type': 'object'})]


class DigitsData(Strict):
    """The scikit-learn digits, converted to MDS; made on the spot if the folder is not there."""

    name: Literal['digits'] = 'digits'
    local: str
    num_workers: Count = 0
    shuffle_seed: Count | None = None
    """Seed of the order of the samples; the run's seed if null."""


class LatentsData(Strict):
    """Latents of images, written by ``streaming_data/``."""

    name: Literal['latents'] = 'latents'
    local: str
    """Folder with one data set a split."""
    train_split: Annotated[str, Field(min_length=1)] = 'train'
    eval_split: Annotated[str, Field(min_length=1)] | None = 'val'
    """null trains without evaluation."""
    remote: str | None = None
    kind: Literal['pixels', 'samples', 'moments'] | None = None
    """This and the next three: what the data must say of themselves; null takes what they say."""
    channels: Positive | None = None
    latent_size: Positive | None = None
    num_classes: Count | None = None
    mirror: bool | None = None
    """Take the latents of the mirrored image half of the time; null does so where the data have them."""
    in_memory: bool = False
    """Hold the training split in RAM, one copy a node."""
    num_workers: Count | None = None
    """Reading processes per rank; null is 2, with ``remote`` 8. Training from memory uses none, evaluation does."""
    shuffle_seed: Count | None = None
    """Seed of the order of the samples; the run's seed if null."""
    cache_limit: Positive | str | None = None
    """Bytes kept on the local disk, as a number or such as ``200gb``; needs ``remote``."""
    predownload: Positive | None = None
    num_canonical_nodes: Positive = 1
    """Paths through the shards that the order is made of; see ``data.latents.LatentDataset``."""
    validate_hash: str | None = None
    download_retry: Count = 2
    download_timeout: Above0 = 60.0


class PixelsAutoencoder(Strict):
    """None: the data are pixels."""

    name: Literal['pixels'] = 'pixels'


class KLAutoencoder(Strict):
    """A diffusers ``AutoencoderKL``."""

    name: Literal['kl'] = 'kl'
    path: str
    """A folder, a hub id such as ``stabilityai/sd-vae-ft-ema``, or one file of the original latent-diffusion layout."""
    id: str | None = None
    """What the manifest of the data calls it; ``path`` if null."""
    subfolder: str | None = None
    revision: str | None = None
    other_weights: bool = False
    """Decode with weights that are not those of the data, such as a fine-tuned decoder."""


class ModelSection(Strict):
    """Base of the sections of networks: a published size by ``preset``, or its sizes one by one, and settings."""

    backbone: ClassVar[type[LatentTransformer]]
    size_names: ClassVar[tuple[str, ...]] = ()
    """What a preset decides; without one, all of them are to be given."""
    name: str
    preset: str | None = None

    def arguments(self) -> dict[str, Any]:
        """The network's constructor arguments but for those that the data decide (latent size, channels, classes)."""
        sizes = {name: getattr(self, name) for name in self.size_names}
        if self.preset is not None:
            sizes = dict(self.backbone.presets[self.preset])
        settings = [name for name in type(self).model_fields if name not in (*_NO_ARGUMENTS, *self.size_names)]
        return {**sizes, **{name: getattr(self, name) for name in settings}}


_NO_ARGUMENTS = ('name', 'preset', 'attention')
_OF_THE_DATA = ('latent_size', 'in_channels', 'num_classes')


def _model_section(name: str, backbone: type[LatentTransformer]) -> type[ModelSection]:
    """The constructor of a backbone as its section. All sizes and ratios of a network are above 0."""
    presets = backbone.presets
    size_names = tuple(next(iter(presets.values()), {}))
    fields, _ = signature_fields(backbone, skip=_OF_THE_DATA)
    fields = {key: ({int: Positive, float: Above0}.get(kind, kind), default) for key, (kind, default) in fields.items()}
    fields |= dict.fromkeys(size_names, (Positive | None, None))  # a preset may say it
    named = Literal[tuple(presets)] | None if presets else None  # type: ignore[valid-type]
    fields = {'name': (Literal[name], name), 'preset': (named, None), **fields}
    if backbone.attentions:
        fields['attention'] = (Literal[backbone.attentions], 'sdpa')  # chosen where the device is known
    section = create_model(f'{backbone.__name__}Model', __base__=ModelSection, __doc__=backbone.__doc__, **fields)
    section.backbone, section.size_names = backbone, size_names
    return section


_MODELS = tuple(_model_section(name, backbone) for name, backbone in BACKBONES.items())


def _named(section: Any) -> Any:
    """A ``model`` without a name is a DiT: there was no other when such files were written."""
    return {'name': 'dit', **section} if isinstance(section, dict) else section


if TYPE_CHECKING:
    AnyModel = ModelSection
else:
    AnyModel = Annotated[Union[_MODELS], Field(discriminator='name'), BeforeValidator(_named)]  # noqa: UP007


class UniformTimes(Strict):
    """All training times alike."""

    name: Literal['uniform'] = 'uniform'


class LogitNormalTimes(Strict):
    """More of the middle: ``logit(t) ~ N(mean, std^2)``."""

    name: Literal['logit_normal'] = 'logit_normal'
    mean: float = 0.0
    std: Above0 = 1.0


class ModeTimes(Strict):
    """SD3's mode sampling: more of the middle above 0, more of both ends below."""

    name: Literal['mode'] = 'mode'
    scale: Annotated[float, Field(ge=-1, le=2 / (math.pi - 2))] = 1.29


class CosMapTimes(Strict):
    """SD3's CosMap."""

    name: Literal['cosmap'] = 'cosmap'


class MinSNRWeighting(Strict):
    """Min-SNR-gamma: the weight of the data's error stops to grow at a signal-to-noise ratio of ``gamma``."""

    name: Literal['min_snr'] = 'min_snr'
    gamma: Above0 = 5.0


class FlowMatchingObjective(Strict):
    """Velocity of the straight line between data and noise."""

    name: Literal['flow_matching'] = 'flow_matching'
    time_distribution: UniformTimes | LogitNormalTimes | ModeTimes | CosMapTimes = Field(
        default=LogitNormalTimes(), discriminator='name'
    )
    time_shift: Above0 = 1.0
    """Moves the training times: above 1 towards noise (SD3, eq. 23, with t = 1 at the noise)."""
    sampling_shift: Above0 = 1.0
    """Likewise the times of sampling."""
    weighting: MinSNRWeighting | None = None
    direction_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of FasterDiT's velocity-direction loss beside the squared error; the paper takes 1."""
    direction_patch: Positive = 1
    """Side of the square of pixels whose values are one direction; 1 is the paper's, one channel needs more."""


class PerChannelNormalization(Strict):
    """Each channel to mean 0 and one standard deviation, from what the manifest of the training data says."""

    name: Literal['per_channel'] = 'per_channel'
    std: Above0 = 1.0
    """The standard deviation that the network sees: the latent strength."""


class EDMObjective(Strict):
    """Preconditioned denoiser (Karras et al. 2022)."""

    name: Literal['edm'] = 'edm'
    P_mean: float = -1.2
    P_std: Above0 = 1.2
    sigma_data: Above0 = 0.5
    sigma_min: Above0 = 0.002
    sigma_max: Above0 = 80.0
    rho: Above0 = 7.0


class DDPMObjective(Strict):
    """Noise at discrete timesteps, and the variance of the reverse steps (DiT's own recipe)."""

    name: Literal['ddpm'] = 'ddpm'
    num_timesteps: Annotated[int, Field(ge=2)] = 1000
    beta_start: Above0 = 1e-4
    """This and the next: first and last beta of the linear schedule."""
    beta_end: Above0 = 0.02
    schedule: Literal['linear', 'cosine'] = 'linear'
    learned_variance: bool = True
    """Needs ``model.learn_sigma: true``; without it sampling takes the variance of the forward steps."""
    weighting: MinSNRWeighting | None = None


class Config(TrainerSettings):
    """A whole run. Keywords of the Trainer stand beside the sections, under Composer's names."""

    run_name: Annotated[str, Field(min_length=1)]
    seed: Count = 17
    global_train_batch_size: Positive
    global_eval_batch_size: Positive
    data: DigitsData | LatentsData = Field(discriminator='name')
    autoencoder: PixelsAutoencoder | KLAutoencoder = Field(discriminator='name')
    model: AnyModel
    objective: FlowMatchingObjective | EDMObjective | DDPMObjective = Field(discriminator='name')
    latent_scale: OneOrPerChannel = 1.0
    latent_shift: OneOrPerChannel = 0.0
    latent_normalization: PerChannelNormalization | None = None
    """Instead of numbers for the two above: ``normalized`` puts them there."""
    label_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    compile: bool = False
    optimizer: ComponentField
    scheduler: ComponentField = Component('scheduler', 'constant')
    algorithms: dict[str, ComponentField] = Field(default={})
    callbacks: dict[str, ComponentField] = Field(default={})
    loggers: dict[str, ComponentField] = Field(default={})

    def routes(self) -> list[Route]:
        """The routes of ``algorithms.tread``; none where it is absent.

        Raises:
            ValueError: A value of a route is out of range.
        """
        tread = self.algorithms.get('tread')
        if tread is None:
            return []
        single = {key: tread.kwargs[key] for key in ('start', 'end', 'selection_rate') if key in tread.kwargs}
        return [Route(**route) for route in tread.kwargs.get('routes') or [single]]

    def always_keep(self) -> int:
        """How many first positions never skip (``algorithms.tread.always_keep``)."""
        tread = self.algorithms.get('tread')
        return 0 if tread is None else tread.kwargs.get('always_keep', 0)

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
            'latent_scale': [float(f'{self.latent_normalization.std / one:.6g}') for one in std],
            'latent_shift': [float(f'{one:.6g}') for one in mean],
        }
        return self.model_copy(update={**numbers, 'latent_normalization': None})

    def trainer_arguments(self) -> dict[str, Any]:
        """The keywords for ``composer.Trainer``, defaults included, but for the objects that the builders make."""
        names = [name for name in TrainerSettings.model_fields if name not in BUILT_BY_US]
        values = {name: getattr(self, name) for name in ('run_name', 'seed', *names)}
        return {name: plain(value) for name, value in values.items()}

    def to_dict(self) -> dict[str, Any]:
        """The resolved run as plain values, defaults included; loading it again gives an equal ``Config``."""
        own = [name for name in type(self).model_fields if name not in TrainerSettings.model_fields]
        tree: dict[str, Any] = {}
        for name in (*own, *TrainerSettings.model_fields):
            value = getattr(self, name)
            if value is None and type(self).model_fields[name].default is None:
                continue
            tree[name] = _tree_of(value)
        return tree

    def to_yaml(self) -> str:
        """``to_dict`` as YAML text."""
        return dump_yaml(self.to_dict())


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
