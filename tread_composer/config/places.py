"""Names and places of checkpoints: placeholders that Composer fills in, and addresses of object stores."""

import string
from collections.abc import Iterator

from composer.utils import parse_uri
from composer.utils.file_helpers import BACKEND_TO_OBJECT_STORE_FACTORY

from tread_composer.config.errors import Problem
from tread_composer.config.tree import Config

__all__ = ['place_problems']

_STORES = (*BACKEND_TO_OBJECT_STORE_FACTORY, 'dbfs')
_OF_RANKS = ('rank', 'local_rank', 'world_size', 'local_world_size', 'node_rank')
_OF_TIME = ('epoch', 'batch', 'batch_in_epoch', 'sample', 'sample_in_epoch', 'token', 'token_in_epoch', 'total_wct',
            'epoch_wct', 'batch_wct')  # fmt: skip
# A folder is one for the whole run: what is resumed, compared and sampled lies in it.
_PLACEHOLDERS = {
    'save_folder': ('run_name',),
    'save_filename': ('run_name', *_OF_RANKS, *_OF_TIME),
    'save_latest_filename': ('run_name', *_OF_RANKS),
    'load_path': ('run_name', *_OF_RANKS),
}


def place_problems(config: Config) -> Iterator[Problem]:
    """What is wrong with where checkpoints go and come from, as far as the words tell."""
    for name, placeholders in _PLACEHOLDERS.items():
        text = getattr(config, name)
        if text is not None:
            fault = _placeholder_fault(text, placeholders) or (_address_fault(text) if 'filename' not in name else None)
            if fault is not None:
                yield Problem((name,), f'{text!r} {fault}')
    if config.save_folder is None:
        return
    latest = config.save_latest_filename
    if latest is not None and '/' in latest:
        yield Problem(('save_latest_filename',), f'{latest!r} must be a name within save_folder, without folders')
    text = 'is no name to find the newest whole checkpoint by; it must hold ba{batch}, without folders'
    name = config.save_filename
    if 'ba{batch}' not in name or '/' in name or not name.endswith('.pt'):
        yield Problem(('save_filename',), f'{name!r} {text} and end in .pt, uncompressed')
    prefix = getattr(config.fsdp, 'sharded_ckpt_prefix_dir', None)  # FSDP1's
    if prefix is not None and ('ba{batch}' not in prefix or '/' in prefix):
        yield Problem(('parallelism_config', 'fsdp', 'sharded_ckpt_prefix_dir'), f'{prefix!r} {text}')


def _placeholder_fault(text: str, placeholders: tuple[str, ...]) -> str | None:
    shown = ', '.join(f'{{{name}}}' for name in placeholders)
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    except ValueError as error:
        return f'has a brace that is no placeholder ({error}); known are {shown}'
    unfilled = [f'{{{name}}}' for name in names if name not in placeholders]
    return f'has {", ".join(unfilled)}, which nobody fills in; known are {shown}' if unfilled else None


def _address_fault(text: str) -> str | None:
    if not text.strip():
        return 'is empty; write null for none'
    if '://' not in text:
        return None
    store, bucket, _ = parse_uri(text)
    if store not in _STORES:
        return f'is at no store that Composer knows: {", ".join(f"{name}://" for name in _STORES)}, or a path'
    return None if bucket else f'names no bucket; write {store}://bucket/folder'
