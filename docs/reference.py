"""Write ``docs/configuration_reference.md``: every setting of a YAML file, read from the constructors themselves.

Run it after a change of a constructor or of its docstring: ``python docs/reference.py``.
"""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from composer import Trainer
from pydantic.fields import FieldInfo

from tread_composer.config.components import component_schema
from tread_composer.config.registry import KINDS, part_names, resolve
from tread_composer.config.tree import Config
from tread_composer.core.options import argument_docs

PAGE = Path(__file__).parent / 'configuration_reference.md'
HEAD = """# Reference of the configuration

Made by `python docs/reference.py` from the constructors and their docstrings; a test holds it equal to what that
prints. Do not edit it. How they fit together: [configuration.md](configuration.md). Times are time strings of Composer
(`200ba`, `80ep`, `0.92dur`). Torch's optimizers take the arguments that your torch documents; arguments of Composer's
parts are explained in
[Composer's documentation](https://docs.mosaicml.com/projects/composer/en/stable/).
"""


def reference() -> str:
    """The whole page."""
    sections = [HEAD, *_config(), *(line for kind in KINDS for line in _kind(kind))]
    return '\n'.join(sections).rstrip() + '\n'


def _config() -> Iterator[str]:
    ours = {name: entry for name, entry in Config.model_fields.items() if name in Config.__annotations__}
    yield '## Top level\n'
    yield from _table(ours, _attribute_docs(Config))
    keywords = {name: entry for name, entry in Config.model_fields.items() if name not in Config.__annotations__}
    yield "\n## Keywords of Composer's Trainer\n"
    yield from _table(keywords, argument_docs(Trainer))


def _kind(kind: str) -> Iterator[str]:
    names = part_names(kind)
    ours = [name for name in names if resolve(kind, name).__module__.startswith('tread_composer.')]
    others = [name for name in names if name not in ours]
    for name in ours:
        target = resolve(kind, name)
        yield f'\n## {kind} `{name}`\n\n{_summary(target)}\n'
        yield from _table(component_schema(kind, name).model_fields, argument_docs(target))
    if not others:
        return
    yield f"\n## {kind}: Composer's and torch's\n\n| name | arguments and defaults |\n|---|---|"
    for name in others:
        is_torch = resolve(kind, name).__module__.startswith('torch.')
        yield f'| `{name}` | {"as torch documents them" if is_torch else _signature(kind, name)} |'


def _signature(kind: str, name: str) -> str:
    try:
        fields = component_schema(kind, name).model_fields
    except ImportError as error:
        return f'needs a package: {error}'
    return ', '.join(f'`{key}` {_default(entry)}' for key, entry in fields.items()) or 'none'


def _table(fields: dict[str, FieldInfo], docs: dict[str, str]) -> Iterator[str]:
    if not fields:
        yield 'No settings.'
        return
    yield '| key | default | purpose |\n|---|---|---|'
    for name, entry in fields.items():
        yield f'| `{name}` | {_default(entry)} | {_cell(docs.get(name, ""))} |'


def _default(entry: FieldInfo) -> str:
    if entry.is_required():
        return 'required'
    value = entry.default
    if hasattr(value, 'to_plain'):
        return f'`{value.name}`'
    if hasattr(value, 'value'):  # an enumeration, written as its value
        value = value.value
    if value is None or isinstance(value, bool):
        return '`null`' if value is None else f'`{str(value).lower()}`'
    return f'`{value}`' if isinstance(value, (int, float, str, list, tuple, dict)) else 'its own'


def _summary(target: Any) -> str:
    return ' '.join((inspect.getdoc(target) or '').split('\n\n')[0].replace('``', '`').split())


def _attribute_docs(target: type) -> dict[str, str]:
    """Field -> the string below it in the source."""
    source = inspect.getsource(target)
    return dict(re.findall(r'^    (\w+): .*\n    """(.*?)"""', source, re.MULTILINE))


def _cell(text: str) -> str:
    text = re.sub(r':\w+:`[~.]*([^`]+)`', r'`\1`', ' '.join(text.split()))
    return text.replace('``', '`').replace('|', '\\|').strip()


if __name__ == '__main__':
    PAGE.write_text(reference())
