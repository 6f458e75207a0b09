"""Arrays out of pickles, without running them.

MaskDiT's webdataset holds each latent as ``pickle.dumps(array)``, and a pickle is a program: unpickled as usual, it may
call anything. Here its few names stand for inert records, and the array is made from those records' plain values.
"""

import functools
import io
import pickle
from typing import Any

import numpy as np

__all__ = ['array_from_pickle']

# What numpy writes for an array: pickle protocols 2 to 4, then protocol 5; each with numpy's old and new module names.
_NAMES = {
    ('numpy', 'ndarray'): 'array',
    ('numpy', 'dtype'): 'type',
    ('numpy.core.multiarray', '_reconstruct'): 'array',
    ('numpy._core.multiarray', '_reconstruct'): 'array',
    ('numpy.core.numeric', '_frombuffer'): 'buffer',
    ('numpy._core.numeric', '_frombuffer'): 'buffer',
}


class _Record:
    """Remembers what it stands for, what it is called with and what state it is given; does nothing."""

    def __init__(self, kind: str, *arguments: Any) -> None:
        self.kind, self.arguments = kind, arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise ValueError(f'it names {module}.{name}, which an array has no need of')
        return functools.partial(_Record, _NAMES[module, name])


def array_from_pickle(data: bytes) -> np.ndarray:
    """The floating-point array that was pickled.

    Raises:
        ValueError: Anything else, or anything more, is in there. Nothing of it has run.
    """
    try:
        content = _Unpickler(io.BytesIO(data)).load()
        if not isinstance(content, _Record):
            raise ValueError(f'it holds a {type(content).__name__}, not an array')
        if content.kind == 'array':
            _, shape, kind, fortran, buffer = content.state
            order = 'F' if fortran else 'C'
        else:
            buffer, kind, shape, order = content.arguments
        name, byte_order = kind.arguments[0], kind.state[1]
        if name not in ('f2', 'f4', 'f8') or byte_order not in ('<', '>') or order not in ('C', 'F'):
            raise ValueError(f'an array of {name!r} values')
        return np.frombuffer(bytes(buffer), np.dtype(byte_order + name)).reshape(shape, order=order)
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(f'not a pickled array of floats: {error}') from error
