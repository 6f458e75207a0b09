"""The configuration of a run: strict YAML in, a typed and resolved tree out."""

from tread_composer.config.checks import check_files, check_machine
from tread_composer.config.components import Component
from tread_composer.config.errors import ConfigError
from tread_composer.config.loading import load_config, restore_config
from tread_composer.config.registry import list_parts, part_names
from tread_composer.config.tree import Config, json_schema

__all__ = [
    'Component', 'Config', 'ConfigError', 'check_files', 'check_machine', 'json_schema', 'list_parts', 'load_config',
    'part_names', 'restore_config',
]  # fmt: skip
