"""From YAML files and the command line to one plain tree that remembers where each value was written.

Only text becomes a tree here (`extends:`, `key=value`, interpolation); what the values may be is not known yet.
"""

import copy
import math
import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

from tread_composer.config.errors import ConfigError, Path, Problem, dotted, refuse
from tread_composer.config.registry import TABLES
from tread_composer.core.masking import MASK, keep_secret

__all__ = ['Document', 'document_of', 'dump_yaml', 'kind_of', 'mapped', 'parse_yaml', 'read_document']

_COMMAND_LINE = 'command line'
_MAX_BYTES = 2**20
_MAX_VALUES = 100_000

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
            key, fault = self.construct_object(key_node, deep=True), None
            if not isinstance(key, str):
                fault = 'is not text; write it in quotes'
            elif key in seen:
                fault = 'is written twice; keep one of the two'
            if fault is not None:
                text = f'the key {key!r} {fault}'
                raise yaml.constructor.ConstructorError(None, None, text, key_node.start_mark)
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
    problems: list[Problem] = field(default_factory=list)
    references: dict[Path, str] = field(default_factory=dict)
    """What was written for values that come from the environment and are nobody else's business."""

    def source_of(self, path: Path) -> str:
        """The file (or the command line) that the value at ``path``, or the nearest one around it, comes from."""
        around = (self.sources.get(path[:length]) for length in range(len(path), 0, -1))
        return next((source for source in around if source is not None), self.main)

    def merge(self, child: dict[str, Any], source: str, base: dict[str, Any] | None = None, path: Path = ()) -> None:
        """Lay ``child`` over ``base``, the tree itself if None: mappings key by key, anything else as a whole."""
        base = self.data if base is None else base
        for key, value in child.items():
            key_path, in_table = (*path, key), len(path) == 1 and path[0] in TABLES
            if value is None and in_table and key not in base:
                text = 'null removes an inherited entry, but none is inherited; for default arguments write'
                self.problems.append(Problem(key_path, f'{text} {key}: {{}}', source=source))
                continue
            if isinstance(value, dict):
                present = base.get(key)
                # Arguments of one `name` mean nothing to another: a change of name starts afresh.
                if not isinstance(present, dict) or value.get('name', present.get('name')) != present.get('name'):
                    self._forget(key_path)
                    base[key] = {}
                self.sources[key_path] = source
                self.merge(value, source, base[key], key_path)
                continue
            self._forget(key_path)
            if value is None and in_table:
                del base[key]
            else:
                base[key] = {} if value is None and not path and key in TABLES else copy.deepcopy(value)
                self.sources[key_path] = source

    def resolved(self, overrides: Sequence[str]) -> 'Document':
        """Itself under ``key=value`` overrides, with each ``${...}`` replaced by its value.

        ``ConfigError`` tells all problems of merging and overrides, or all of interpolations.
        """
        faults = ((override, self._override(override)) for override in overrides)
        self.problems += [
            Problem((), f'{override}: {fault}', source=_COMMAND_LINE) for override, fault in faults if fault is not None
        ]
        if not self.problems:
            self._interpolate()
        refuse(self.problems, self.source_of)
        return self

    def _forget(self, path: Path) -> None:
        self.sources = {entry: source for entry, source in self.sources.items() if entry[: len(path)] != path}

    def _override(self, override: str) -> str | None:
        key, equals, text = override.partition('=')
        if not equals or not _KEY.fullmatch(key):
            return 'is not of the form key=value, for example optimizer.lr=1.0e-4 or algorithms.tread=null'
        if not text.strip():
            return f'has no value; write {key}=null for nothing'
        if key.split('.')[0] == 'extends':
            return 'extends can only be written in a file'
        try:
            value = parse_yaml(text)
        except yaml.YAMLError as error:
            return f'the value is not YAML: {_yaml_text(error, text)}'
        node: Any = self.data
        path: list[Any] = []
        for part in key.split('.'):
            if path:
                if isinstance(node, dict) and node.get(path[-1]) is None:
                    node[path[-1]] = {}
                node = node[path[-1]]
            if isinstance(node, list) and not (part.isdecimal() and int(part) < len(node)):
                return f'{dotted(tuple(path))} is a list of {len(node)}; {part!r} is not a position in it'
            if not isinstance(node, (dict, list)):
                return f'{dotted(tuple(path))} is {node!r}, which holds no {part!r}'
            path.append(int(part) if isinstance(node, list) else part)
        if isinstance(node, list):
            node[path[-1]] = value
            self.sources[tuple(path)] = _COMMAND_LINE
            return None
        if path[-1] == 'name' and len(path) > 1 and node.get('name', value) != value:
            self._forget(tuple(path[:-1]))  # as in a file: another name starts the section afresh
            node.clear()
        self.merge({path[-1]: value}, _COMMAND_LINE, node, tuple(path[:-1]))
        return None

    def _interpolate(self) -> None:
        values: dict[Path, Any] = {}
        mapped(self.data, values.setdefault)  # which changes nothing
        texts = [(path, text) for path, text in values.items() if isinstance(text, str)]
        for path, text in texts:
            if '\0' in text:
                fault = f'{text!r} holds a NUL character, which no name or path may; remove it'
                self.problems.append(Problem(path, fault))
        leaves = [(path, text) for path, text in texts if '${' in text or text == '???']
        for path, text in leaves:
            # Grammar first and leaf by leaf: OmegaConf does not say where in a tree a malformed text stands.
            try:
                OmegaConf.create({'value': text})
            except OmegaConfBaseException as error:
                fault = f'{text!r} is not an interpolation: {_first_line(error)}; write ${{key}}'
                self.problems.append(Problem(path, fault))
        if self.problems:
            return
        config = OmegaConf.create(self.data)
        for path, text in leaves:
            node: Any = config
            try:
                for part in path:
                    node = node[part]
            except MissingMandatoryValue:
                fault = "'???' stands for a value that you must give, here or as key=value"
                self.problems.append(Problem(path, fault))
            except OmegaConfBaseException as error:
                remedy = 'correct the expression'
                if isinstance(error, InterpolationKeyError):
                    remedy = 'write the full dotted path from the root of the tree'
                elif 'oc.env' in text:
                    remedy = 'set it, or give a default: ${oc.env:NAME,value}'
                self.problems.append(Problem(path, f'{text!r}: {_first_line(error)}; {remedy}'))
            # Addresses of servers, and tokens. Other settings decide or name the run: every record shows them.
            if '${oc.env:' in text and (path[0] in ('loggers', 'callbacks') or path == ('data', 'remote')):
                self.references[path] = text
                if isinstance(node, str):
                    keep_secret(node)
        if not self.problems:
            self.data = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]


def read_document(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Document:
    """Read a file with all that it extends, apply overrides, resolve interpolations.

    ``ConfigError`` if a file cannot be read or is no YAML mapping, ``extends`` goes round in circles, an override has
    no ``key=value`` form, an interpolation has no value. All problems of one stage are told together.
    """
    document = Document(main=os.fspath(path))
    for name, tree in _chain(document.main):
        document.merge(tree, name)
    return document.resolved(overrides)


def document_of(tree: dict[str, Any], main: str, overrides: Sequence[str] = ()) -> Document:
    """A tree that is resolved already, under overrides: its texts stand for themselves, and it extends nothing.

    ``main`` is what to call it in messages; otherwise as ``read_document``.
    """
    return Document(main=main, data=mapped(tree, _escaped)).resolved(overrides)


def dump_yaml(tree: dict[str, Any], references: Mapping[Path, str] | None = None) -> str:
    """YAML text that ``read_document`` reads back as the same tree.

    At the places of ``references`` it has the reference in place of the value; where the variable is not set when it
    is read, it stands for ``***``.
    """
    texts = {
        path: re.sub(r'\$\{oc\.env:(\w+)\}', rf"${{oc.env:\1,'{MASK}'}}", text)
        for path, text in (references or {}).items()
    }
    tree = mapped(tree, lambda path, value: texts.get(path, _escaped(path, value)))
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def mapped(node: Any, change: Callable[[Path, Any], Any], path: Path = ()) -> Any:
    """A copy of the tree; ``change`` gets the place of each value and the value, those that hold others first."""
    node = change(path, node)
    if isinstance(node, dict):
        return {key: mapped(item, change, (*path, key)) for key, item in node.items()}
    if isinstance(node, list):
        return [mapped(item, change, (*path, index)) for index, item in enumerate(node)]
    return node


def _escaped(path: Path, value: Any) -> Any:
    return value.replace('${', '\\${') if isinstance(value, str) else value


def _chain(main: str) -> list[tuple[str, dict[str, Any]]]:
    """The files from the remotest base to ``main``, with their trees."""
    chain: list[tuple[str, dict[str, Any]]] = []
    name, child = main, ''
    while True:
        if os.path.realpath(name) in [os.path.realpath(file) for file, _ in chain]:
            way = ' -> '.join([*(file for file, _ in chain), name])
            raise ConfigError(f'{child}: extends: goes round in circles: {way}; one of these files must extend nothing')
        tree = _read_file(name, child)
        chain.append((name, tree))
        if 'extends' not in tree:
            return chain[::-1]
        base = tree.pop('extends')
        if not isinstance(base, str) or not base:
            raise ConfigError(f'{name}: extends: {base!r} is not a file name; write a path relative to this file')
        name, child = os.path.normpath(os.path.join(os.path.dirname(name), base)), name


def _read_file(name: str, child: str) -> dict[str, Any]:
    """The tree in a file; ``child`` is the file that extends it."""
    text = ''
    try:
        status = os.stat(name)
        # Reading a pipe or a device may never end.
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES:
            raise OSError(f'not a regular file of at most {_MAX_BYTES:,} bytes')
        with open(name, encoding='utf-8') as file:
            text = file.read()
        tree = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f'{name}: {_yaml_text(error, text)}') from None
    except (OSError, UnicodeDecodeError) as error:
        reason = 'there is no such file' if isinstance(error, FileNotFoundError) else f'cannot be read ({error})'
        if child:
            fault = f'extends: {name}: {reason}; the path is relative to the file that says it'
            raise ConfigError(f'{child}: {fault}') from None
        raise ConfigError(f'{name}: {reason}; give the path of a YAML file') from None
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f'{name}: holds a {type(tree).__name__}; a configuration is a mapping of `key: value` lines')
    return tree or {}


def parse_yaml(text: str) -> Any:
    """The one value in a YAML text; ``yaml.YAMLError`` also for one that no file of a run's size holds."""
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        if _expanded(root, {}) > _MAX_VALUES:
            raise yaml.MarkedYAMLError(
                problem=f'its anchors (&name) stand for more than {_MAX_VALUES:,} values, or one contains itself; '
                f'write the values out',
                problem_mark=root.start_mark,
            )
        return loader.construct_document(root)
    except RecursionError:
        raise yaml.YAMLError('lists or mappings are nested hundreds of levels deep') from None
    finally:
        loader.dispose()


def kind_of(text: str) -> str:
    """What YAML reads these characters as where no quotes are around them: int, float, bool, null or str."""
    return _Loader('').resolve(yaml.ScalarNode, text, (True, False)).rpartition(':')[2]


def _expanded(node: yaml.Node, sizes: dict[int, float]) -> float:
    """How many values a node stands for when each alias is replaced by what it names."""
    if id(node) not in sizes:
        sizes[id(node)] = math.inf  # until all within it is known: what is met again before that contains itself
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        items = node.value if isinstance(node, yaml.SequenceNode) else [child for pair in pairs for child in pair]
        sizes[id(node)] = 1 + sum(_expanded(item, sizes) for item in items)
    return sizes[id(node)]


def _yaml_text(error: yaml.YAMLError, text: str) -> str:
    mark = getattr(error, 'problem_mark', None)
    problem = getattr(error, 'problem', None) or str(error).splitlines()[0]
    position = f'line {mark.line + 1}, column {mark.column + 1}: ' if mark else ''
    line = text.splitlines()[mark.line] if mark and mark.line < len(text.splitlines()) else ''
    hint = '; inside { } or [ ] write an interpolation in quotes' if '${' in line else ''
    return f'{position}{problem}{hint}'


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()[0]
    return text.partition('raised while resolving interpolation: ')[2].strip('"') or text
