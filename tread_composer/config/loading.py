"""``load_config``: files and overrides in, a checked ``Config`` out."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from tread_composer.config.checks import joint_problems
from tread_composer.config.components import Component, check_component, check_section
from tread_composer.config.document import Document, document_of, read_document
from tread_composer.config.errors import Problem, refuse
from tread_composer.config.registry import PARTS, TABLES, part_names
from tread_composer.config.tree import Config
from tread_composer.config.validation import check, shown
from tread_composer.core import launch
from tread_composer.core.named import is_reference

__all__ = ['load_config', 'restore_config']

_HELD = ('data', 'latent_normalization')  # as the object itself: nothing but its settings is asked
_REMEDIES = {
    'optimizer': 'without it Composer would silently train with SGD at 0.1; write for example '
    'optimizer: {name: adamw, lr: 1.0e-4}',
    'run_name': 'write a name for the run; its folder and its record are found by it',
    'max_duration': "write for example max_duration: '100ep' or '400000ba'",
}


def load_config(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), *, world_size: int | None = None
) -> Config:
    """Read a run's YAML, and write nothing; one ``ConfigError`` has a line for each thing that is wrong in it.

    Args:
        overrides: ``dotted.key=value`` each, the value in YAML; ``algorithms.tread=null`` removes an entry.
        world_size: Number of ranks that batches must divide among; environment variable ``WORLD_SIZE``, or 1, if None.

    Returns:
        The typed tree, defaults filled in.
    """
    document = read_document(path, overrides)
    config = _validated(document)
    refuse(joint_problems(config, launch.world_size() if world_size is None else world_size), document.source_of)
    return config


def restore_config(
    saved: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = (), *, source: str = ''
) -> Config:
    """The configuration of a run that is over, to use what it has trained; ``ConfigError`` as `load_config`.

    Rules that join its settings with each other and with the machine (ranks, GPUs) were asked when it was trained, and
    are not asked again: its batch need not divide among the ranks that sample.

    Args:
        saved: The run's ``config.yaml``, or the tree that it holds.
        source: What to call the tree in messages.
    """
    if isinstance(saved, Mapping):
        return _validated(document_of(dict(saved), source, overrides))
    return _validated(read_document(saved, overrides))


def _validated(document: Document) -> Config:
    tree: dict[str, Any] = dict(document.data)
    problems: list[Problem] = []
    for table, kind in TABLES.items():
        if isinstance(tree.get(table), dict):
            tree[table], faults = _table(kind, table, tree[table])
            problems += faults
    for section, kind in PARTS.items():
        if tree.get(section) is None:
            tree.pop(section, None)
            continue
        part, faults = check_section(kind, tree[section], (section,))
        tree[section] = part.instance if section in _HELD and not faults else part
        problems += faults
    if tree.get('autoresume') is None:
        tree['autoresume'] = tree.get('save_folder') is not None
    config, faults = check(Config, tree)
    for problem in faults:
        key = str(problem.path[0]) if len(problem.path) == 1 else ''
        tables = [table for table, kind in TABLES.items() if problem.choices and key in part_names(kind)]
        if key in _REMEDIES and tree.get(key) is None:
            problem = Problem(problem.path, f'is missing: {_REMEDIES[key]}')
        elif tables:  # tread.start=3: the name of a part, in want of its table
            text = f"unknown setting. Did you mean '{tables[0]}.{key}'?"
            problem = Problem(problem.path, text, problem.choices)
        problems.append(problem)
    refuse(problems, document.source_of)
    config._references = document.references  # type: ignore[union-attr]
    return config  # type: ignore[return-value]


def _table(kind: str, table: str, entries: dict[str, Any]) -> tuple[dict[str, Component], list[Problem]]:
    components: dict[str, Component] = {}
    problems: list[Problem] = []
    for name, kwargs in entries.items():
        reference = kwargs.get('name') if isinstance(kwargs, dict) and name not in part_names(kind) else None
        if is_reference(reference):  # a part of another package, under a name of the user's choice
            kwargs = {key: value for key, value in kwargs.items() if key != 'name'}
        elif reference is not None:
            text = (
                f'{shown(reference)} is not of the form package.module:Class; a {kind} of ours or Composer is named by '
            )
            problems.append(Problem((table, name, 'name'), f'{text}its key: {table}: {{{reference}: {{...}}}}'))
            continue
        components[name], faults = check_component(kind, reference or name, kwargs, (table, name), (table, name))
        problems += faults
    return components, problems
