"""From YAML files and the command line to one plain tree that remembers where each value was written.

Only text becomes a tree here (`extends:`, `key=value`, interpolation); what the values may be is not known yet.
"""

import copy
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

from tread_composer.config.errors import ConfigError, Path, Problem

__all__ = ['COMMAND_LINE', 'Document', 'document_of', 'dump_yaml', 'read_document']

COMMAND_LINE = 'command line'
TABLES = ('algorithms', 'callbacks', 'loggers')  # name -> arguments; null removes an inherited entry

_KEY = re.compile(r'[A-Za-z_][\w-]*(\.[\w-]+)*')
_SCALARS = {
    # YAML 1.2's core types, except that `400_000` is an integer. YAML 1.1 would read `1e-4` as text, `on` as true and
    # `1:30` as ninety.
    'null': (r'~|null|Null|NULL|', '~nN'),
    'bool': (r'true|True|TRUE|false|False|FALSE', 'tTfF'),
    'int': (r'[-+]?(?:0|[1-9][0-9_]*)', '-+0123456789'),
    'float': (
        r'[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)',
        '-+0123456789.',
    ),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping, refused if a key stands in it twice or is no text."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f'the key {key!r} is not text; write it in quotes', key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f'the key {key!r} is written twice; keep one of the two', key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        # An empty value is null; it has no first character, which the resolver writes as ''.
        _first_characters = [*_first, ''] if _tag == 'null' else list(_first)
        _class.add_implicit_resolver(f'tag:yaml.org,2002:{_tag}', re.compile(rf'^(?:{_pattern})$'), _first_characters)


@dataclass
class Document:
    """A resolved tree of plain values, and the file that each of them was written in."""

    main: str
    data: dict[str, Any] = field(default_factory=dict)
    sources: dict[Path, str] = field(default_factory=dict)

    def source_of(self, path: Path) -> str:
        """The file (or the command line) that the value at ``path``, or the nearest one around it, comes from."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.sources:
                return self.sources[path[:length]]
        return self.main

    def written(self, path: Path) -> Any:
        """The value at ``path``; None if there is none."""
        node: Any = self.data
        for part in path:
            try:
                node = node[part]
            except (KeyError, IndexError, TypeError):
                return None
        return node


def read_document(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Document:
    """Read a file with all that it extends, apply overrides, resolve interpolations.

    Raises:
        ConfigError: A file cannot be read or is no YAML mapping, ``extends`` goes round in circles, an override has no
            ``key=value`` form, an interpolation has no value. All problems of one stage are told together.
    """
    document = Document(main=os.fspath(path))
    problems: list[Problem] = []
    for name, tree in _chain(document.main):
        try:
            _merge(document, document.data, tree, name, (), problems)
        except RecursionError:
            raise _failure(name, 'an anchor (&name) contains itself; write the value out') from None
    return _overridden(document, overrides, problems)


def document_of(tree: dict[str, Any], main: str, overrides: Sequence[str] = ()) -> Document:
    """A tree that is resolved already, under overrides: its texts stand for themselves, and it extends nothing.

    Args:
        tree: Plain values, as ``Config.to_dict`` gives them; not changed.
        main: What to call it in messages.
        overrides: As for ``read_document``.

    Raises:
        ConfigError: As ``read_document``.
    """
    return _overridden(Document(main=main, data=_escaped(copy.deepcopy(tree))), overrides, [])


def _overridden(document: Document, overrides: Sequence[str], problems: list[Problem]) -> Document:
    for override in overrides:
        _override(document, override, problems)
    if not problems:
        problems = _interpolate(document)
    if problems:
        raise ConfigError.from_problems(problems, document.source_of)
    return document


def dump_yaml(tree: dict[str, Any]) -> str:
    """YAML text that ``read_document`` reads back as the same tree."""
    return yaml.dump(_escaped(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _escaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return value.replace('${', '\\${') if isinstance(value, str) else value


def _chain(main: str) -> list[tuple[str, dict[str, Any]]]:
    """The files from the remotest base to ``main``, with their trees."""
    chain: list[tuple[str, dict[str, Any]]] = []
    seen: list[str] = []
    name, said_by = main, ''
    while True:
        if os.path.realpath(name) in seen:
            circle = ' -> '.join([*(file for file, _ in chain), name])
            raise _failure(said_by, f'extends: goes round in circles: {circle}; one of these files must extend nothing')
        seen.append(os.path.realpath(name))
        tree = _read_file(name, said_by)
        chain.append((name, tree))
        if 'extends' not in tree:
            return chain[::-1]
        base = tree.pop('extends')
        if not isinstance(base, str) or not base:
            raise _failure(name, f'extends: {base!r} is not a file name; write a path relative to this file')
        name, said_by = os.path.normpath(os.path.join(os.path.dirname(name), base)), name


def _read_file(name: str, said_by: str) -> dict[str, Any]:
    try:
        with open(name, encoding='utf-8') as file:
            return _parse_mapping(name, file.read())
    except (OSError, UnicodeDecodeError) as error:
        reason = 'there is no such file' if isinstance(error, FileNotFoundError) else f'cannot be read ({error})'
        if said_by:
            text = f'extends: {name}: {reason}; the path is relative to the file that says it'
            raise _failure(said_by, text) from None
        raise _failure(name, f'{reason}; give the path of a YAML file') from None


def _parse_mapping(name: str, text: str) -> dict[str, Any]:
    try:
        tree = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise _failure(name, _yaml_text(error, text)) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise _failure(name, f'holds a {type(tree).__name__}; a configuration is a mapping of `key: value` lines')
    return tree


def _yaml_text(error: yaml.YAMLError, text: str) -> str:
    mark = getattr(error, 'problem_mark', None)
    problem = getattr(error, 'problem', None) or str(error).splitlines()[0]
    position = f'line {mark.line + 1}, column {mark.column + 1}: ' if mark else ''
    line = text.splitlines()[mark.line] if mark and mark.line < len(text.splitlines()) else ''
    hint = '; inside { } or [ ] write an interpolation in quotes' if '${' in line else ''
    return f'{position}{problem}{hint}'


def _failure(source: str, text: str) -> ConfigError:
    return ConfigError.from_problems([Problem((), text, source=source)])


def _merge(
    document: Document, base: dict[str, Any], child: dict[str, Any], source: str, path: Path, problems: list[Problem]
) -> None:
    """Lay ``child`` over ``base``: mappings key by key, anything else as a whole."""
    for key, value in child.items():
        key_path = (*path, key)
        if value is None and len(path) == 1 and path[0] in TABLES:
            if key not in base:
                text = (
                    f'null removes an inherited entry, but none is inherited; for default arguments write {key}: {{}}'
                )
                problems.append(Problem(key_path, text, source=source))
            else:
                _forget(document, key_path)
                del base[key]
        elif isinstance(value, dict):
            # Arguments of one `name` mean nothing to another: a change of name starts afresh.
            if not isinstance(base.get(key), dict) or value.get('name', base[key].get('name')) != base[key].get('name'):
                _forget(document, key_path)
                base[key] = {}
            document.sources[key_path] = source
            _merge(document, base[key], value, source, key_path, problems)
        else:
            _forget(document, key_path)
            base[key] = {} if value is None and not path and key in TABLES else copy.deepcopy(value)
            document.sources[key_path] = source


def _forget(document: Document, path: Path) -> None:
    for entry in [entry for entry in document.sources if entry[: len(path)] == path]:
        del document.sources[entry]


def _override(document: Document, override: str, problems: list[Problem]) -> None:
    key, equals, text = override.partition('=')

    def refuse(reason: str) -> None:
        problems.append(Problem((), f'{override}: {reason}', source=COMMAND_LINE))

    if not equals or not _KEY.fullmatch(key):
        return refuse('is not of the form key=value, for example optimizer.lr=1.0e-4 or algorithms.tread=null')
    if not text.strip():
        return refuse(f'has no value; write {key}=null for nothing')
    if key.split('.')[0] == 'extends':
        return refuse('extends can only be written in a file')
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        return refuse(f'the value is not YAML: {_yaml_text(error, text)}')
    node: Any = document.data
    parts: list[str | int] = list(key.split('.'))
    for index, part in enumerate(parts):
        key_path = tuple(parts[:index])
        if isinstance(node, list):
            if not str(part).isdigit() or int(part) >= len(node):
                return refuse(
                    f'{".".join(map(str, key_path))} is a list of {len(node)}; {part!r} is not a position in it'
                )
            part = parts[index] = int(part)
        elif not isinstance(node, dict):
            return refuse(f'{".".join(map(str, key_path))} is {node!r}, which holds no {part!r}')
        if index == len(parts) - 1:
            break
        if isinstance(node, dict) and node.get(part) is None:
            node[part] = {}
        node = node[part]  # type: ignore[index]
    if isinstance(node, list):
        node[parts[-1]] = value  # type: ignore[index]
        document.sources[tuple(parts)] = COMMAND_LINE
    else:
        if parts[-1] == 'name' and len(parts) > 1 and node.get('name', value) != value:
            _forget(document, tuple(parts[:-1]))  # as in a file: another name starts the section afresh
            node.clear()
        _merge(document, node, {str(parts[-1]): value}, COMMAND_LINE, tuple(parts[:-1]), problems)
    return None


def _interpolate(document: Document) -> list[Problem]:
    """Replace each ``${...}`` by its value."""
    leaves = [(path, text) for path, text in _texts(document.data) if '${' in text or text == '???']
    problems = []
    for path, text in leaves:
        # Grammar first and leaf by leaf: OmegaConf does not say where in a tree a malformed text stands.
        try:
            OmegaConf.create({'value': text})
        except OmegaConfBaseException as error:
            problems.append(Problem(path, f'{text!r} is not an interpolation: {_first_line(error)}; write ${{key}}'))
    if problems:
        return problems
    config = OmegaConf.create(document.data)
    for path, text in leaves:
        node: Any = config
        try:
            for part in path:
                node = node[part]
        except MissingMandatoryValue:
            problems.append(Problem(path, "'???' stands for a value that you must give, here or as key=value"))
        except InterpolationKeyError as error:
            remedy = 'write the full dotted path from the root of the tree'
            problems.append(Problem(path, f'{text!r}: {_first_line(error)}; {remedy}'))
        except OmegaConfBaseException as error:
            remedy = 'set it, or give a default: ${oc.env:NAME,value}' if 'oc.env' in text else 'correct the expression'
            problems.append(Problem(path, f'{text!r}: {_first_line(error)}; {remedy}'))
    if not problems:
        document.data = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    return problems


def _texts(node: Any, path: Path = ()) -> Iterator[tuple[Path, str]]:
    if isinstance(node, str):
        yield path, node
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _texts(value, (*path, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _texts(value, (*path, index))


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()[0]
    return text.partition('raised while resolving interpolation: ')[2].strip('"') or text
