"""The typed tree of a run: what a YAML file may say, section by section.

Sections that choose between kinds have a ``name``; the arguments of another kind are errors.
"""

import dataclasses
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import InstanceOf, PrivateAttr, SkipValidation, WithJsonSchema

from tread_composer.callbacks.update_guard import OnNonfinite
from tread_composer.config.components import Component, component_schema
from tread_composer.config.document import dump_yaml, mapped
from tread_composer.config.errors import Path
from tread_composer.config.registry import PARTS, TABLES, part_names, resolve
from tread_composer.config.schema import part_kind, plain
from tread_composer.config.sections import DigitsData, LatentsData, PerChannelNormalization, RunName
from tread_composer.config.trainer_settings import TrainerSettings
from tread_composer.core.bounds import AtLeast1, Positive, Seed
from tread_composer.core.masking import MASK, without_password
from tread_composer.data.manifest import LatentFacts, Manifest, Scaling
from tread_composer.routing import Route
from tread_composer.routing.tokens import AlwaysKeep

__all__ = ['Config', 'backbone_arguments', 'json_schema']

_SECTION = WithJsonSchema({'type': 'object'})
_Shift = Annotated[float, Ge(-1e6), Le(1e6)]
ComponentField = Annotated[InstanceOf[Component], _SECTION]
# A part of another package; what arguments it takes is not looked up for an editor.
_REFERENCE = {'type': 'object', 'properties': {'name': {'type': 'string', 'pattern': ':'}}, 'required': ['name']}


class Config(TrainerSettings):
    """A whole run. Keywords of the Trainer stand beside the sections, under Composer's names."""

    run_name: RunName
    """Identifies the run: its folder, its MLflow run, its checkpoints."""
    seed: Seed = 17
    """Of weights, batches, noise, times, routes and label dropout."""
    global_train_batch_size: AtLeast1
    """Samples per step over all ranks; must be a multiple of the ranks."""
    global_eval_batch_size: AtLeast1
    """Samples per evaluation step over all ranks."""
    data: Annotated[DigitsData | LatentsData, SkipValidation, _SECTION]
    """What is trained on."""
    autoencoder: ComponentField
    """What made the latents and decodes samples."""
    model: ComponentField
    """The network; ``dit`` without a name."""
    objective: ComponentField
    """What the network learns."""
    latent_scale: Positive | Annotated[list[Positive], MinLen(1)] | Literal['auto'] = 1.0
    """``latents = (raw - shift) * scale``; one number or one per channel; ``auto``: both from the data's manifest."""
    latent_shift: _Shift | Annotated[list[_Shift], MinLen(1)] = 0.0
    """As ``latent_scale``."""
    latent_normalization: Annotated[PerChannelNormalization | None, SkipValidation, _SECTION] = None
    """Instead of numbers for the two above: computed from the training data's manifest."""
    label_dropout: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Share of labels replaced by the null label in training, for classifier-free guidance."""
    compile: bool = False
    """``torch.compile``: the whole model in one process, each block in several."""
    on_nonfinite: OnNonfinite = 'stop'
    """What to do with a batch whose gradient is not finite; see ``callbacks.update_guard``."""
    spike_factor: Annotated[float, Gt(1)] | None = None
    """A gradient norm above this multiple of the running median counts as not finite; null accepts any."""
    save_in_background: bool = False
    """Training waits only until a checkpoint is copied to the memory of the host; a thread writes it."""
    optimizer: ComponentField
    """By name, with the constructor's own arguments."""
    scheduler: ComponentField = Component('scheduler', 'constant')
    """Of the learning rate."""
    algorithms: dict[str, ComponentField] = {}  # noqa: RUF012 - pydantic copies it
    """Name to arguments."""
    callbacks: dict[str, ComponentField] = {}  # noqa: RUF012 - pydantic copies it
    """Name to arguments."""
    loggers: dict[str, ComponentField] = {}  # noqa: RUF012 - pydantic copies it
    """Name to arguments."""

    _references: dict[Path, str] = PrivateAttr(default_factory=dict)

    @property
    def precision_name(self) -> str | None:
        """``precision`` as YAML has it."""
        return getattr(self.precision, 'value', self.precision)

    @property
    def fsdp(self) -> Any:
        """The section ``parallelism_config.fsdp``; None in a run that shards nothing."""
        return getattr(self.parallelism_config, 'fsdp', None)

    def routes(self) -> tuple[Route, ...]:
        """The routes of all algorithms that have some; none of a dense run."""
        routes = (route for part in self.algorithms.values() for route in getattr(part.instance, 'routes', ()))
        return tuple(route for route in routes if isinstance(route, Route))

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

    @property
    def scaled_by_data(self) -> bool:
        """Whether scale and shift of the latents are yet to be taken from the training data."""
        return self.latent_normalization is not None or self.latent_scale == 'auto'

    def normalized(self, data: Manifest | LatentFacts) -> 'Config':
        """The configuration with ``auto`` and ``latent_normalization`` turned into numbers; itself if there is neither.

        A run keeps the numbers (``config.yaml``), so that resuming and evaluating do not depend on the training data,
        whose description this takes.
        """
        if not self.scaled_by_data:
            return self
        if self.latent_normalization is not None:
            scaling = Scaling.measured(data.mean, data.std, self.latent_normalization.std)
        else:
            scaling = data.auto_scaling
        numbers = {'latent_scale': list(scaling.scale), 'latent_shift': list(scaling.shift)}
        if scaling.source != 'measured':  # one number for all channels
            numbers = {name: values[0] if len(values) == 1 else values for name, values in numbers.items()}
        return self.model_copy(update={**numbers, 'latent_normalization': None})

    def trainer_arguments(self) -> dict[str, Any]:
        """The keywords for ``composer.Trainer``, defaults included, but for the objects that the builders make."""
        return {name: plain(getattr(self, name)) for name in ('run_name', 'seed', *TrainerSettings.model_fields)}

    def to_dict(self) -> dict[str, Any]:
        """The resolved run as plain values, defaults included; loading it again gives an equal ``Config``.

        Without secrets: passwords in addresses, and what loggers and callbacks take from the environment, are ``***``.
        """
        sections = [name for name in type(self).model_fields if name not in TrainerSettings.model_fields]
        tree: dict[str, Any] = {}
        for name in (*sections, *TrainerSettings.model_fields):
            value = getattr(self, name)
            if value is None and type(self).model_fields[name].default is None:
                continue
            tree[name] = _tree_of(value)

        def shown(path: Path, value: Any) -> Any:
            if path in self._references:
                return MASK
            return without_password(value) if isinstance(value, str) else value

        return mapped(tree, shown)

    def to_yaml(self) -> str:
        """``to_dict`` as YAML text, which names the variable of the environment in place of a secret."""
        return dump_yaml(self.to_dict(), self._references)


def backbone_arguments(model: Component) -> dict[str, Any]:
    """A network's constructor arguments, of its ``preset`` too, but for those that the data decide (``FROM_DATA``)."""
    # The implementation of attention is chosen where the device is known (``use_attention``).
    arguments = {key: value for key, value in model.kwargs.items() if key not in ('preset', 'attention')}
    preset = model.kwargs.get('preset')
    return {**arguments, **resolve('backbone', model.name).presets[preset]} if preset else arguments  # type: ignore[attr-defined]


def _tree_of(value: Any) -> Any:
    if isinstance(value, Component):
        return {'name': value.name, **value.to_plain()}
    if isinstance(value, dict) and all(isinstance(item, Component) for item in value.values()):
        return {name: item.to_plain() for name, item in value.items()}
    if dataclasses.is_dataclass(value):  # a section that is held as the object itself
        items = {entry.name: (getattr(value, entry.name), entry.default) for entry in dataclasses.fields(value)}
        kept = {name: item for name, (item, default) in items.items() if item is not None or default is not None}
        return {'name': value.name, **kept}  # type: ignore[attr-defined]
    return plain(value)


def json_schema() -> dict[str, Any]:
    """The schema. It is a help, not the rule: ``load_config`` checks more, and interpolations (text) are not in it."""
    schema = Config.model_json_schema()
    schema['title'] = 'tread_composer run'
    properties = schema['properties']
    # A file that extends another one may leave anything out.
    schema.pop('required', None)
    properties['extends'] = {'type': 'string', 'description': 'Base file, relative to this one'}
    shared = schema['$defs']
    for table, kind in TABLES.items():
        entries = {name: {'anyOf': [_arguments(kind, name, shared), {'type': 'null'}]} for name in part_names(kind)}
        properties[table] = {'type': 'object', 'properties': entries, 'additionalProperties': _REFERENCE}
    for section, kind in PARTS.items():
        properties[section] = {'oneOf': _options(kind, shared)}
    return schema


def _options(kind: str, shared: dict[str, Any]) -> list[dict[str, Any]]:
    """A section of this kind for each name, and the part of another package."""
    options = []
    for name in part_names(kind):
        schema = _arguments(kind, name, shared)
        schema['properties'] = {'name': {'const': name}, **schema.get('properties', {})}
        options.append({**schema, 'required': ['name', *schema.get('required', [])]})
    return [*options, _REFERENCE]


def _arguments(kind: str, name: str, shared: dict[str, Any]) -> dict[str, Any]:
    try:
        fields = component_schema(kind, name)
    except ImportError:  # a package that this one component needs
        return {'type': 'object'}
    schema = fields.model_json_schema()
    for key, entry in fields.model_fields.items():  # an objective's times and weighting are parts themselves
        part = part_kind(entry.annotation, entry.metadata)
        if part is not None:
            absent = [{'type': 'null'}] if entry.default is None else []
            schema['properties'][key] = {'oneOf': [*_options(part, shared), *absent]}
    # References count from the root of the whole schema.
    shared.update(schema.pop('$defs', {}))
    schema.pop('description', None)
    return schema
