"""Pickles that hold plain values and numpy's arrays, read without running anything of what else they may name."""

import io
import pickle
from typing import Any

__all__ = ['load_plain']

# What numpy itself writes for an array. A pickle is a program, and may name nothing else here.
_NAMES = {
    ('numpy', 'ndarray'),
    ('numpy', 'dtype'),
    ('numpy._core.multiarray', '_reconstruct'),  # pickle protocols 2 to 4
    ('numpy._core.numeric', '_frombuffer'),  # protocol 5
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = module.replace('numpy.core.', 'numpy._core.')  # as it was called before numpy 2
        if (module, name) not in _NAMES:
            raise ValueError(f'it names {module}.{name}, which an array has no need of')
        return super().find_class(module, name)


def load_plain(data: bytes) -> Any:
    """What was pickled; texts of Python 2 are bytes. ``ValueError`` if it is damaged or names anything but arrays."""
    try:
        return _Unpickler(io.BytesIO(data), encoding='bytes').load()
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(str(error) or repr(error)) from error
