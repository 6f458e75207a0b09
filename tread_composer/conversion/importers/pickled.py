"""Arrays out of pickles, without running them.

MaskDiT's webdataset holds each latent as ``pickle.dumps(array)``, and a pickle is a program: unpickled as usual, it may
call anything. Here it may name what numpy itself writes for an array, and nothing else.
"""

import io
import pickle
from typing import Any

import numpy as np

__all__ = ['array_from_pickle']

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


def array_from_pickle(data: bytes) -> np.ndarray:
    """The floating-point array that was pickled.

    Raises:
        ValueError: Anything else is in there, or it names what an array has no need of, which has not run.
    """
    try:
        array = _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(f'not a pickled array of floats: {error}') from error
    if not isinstance(array, np.ndarray) or array.dtype.kind != 'f':
        raise ValueError(f'not a pickled array of floats: {type(array).__name__}')
    return array
