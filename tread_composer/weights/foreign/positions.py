"""How far stored sines and cosines may be from those that are computed here."""

import torch
from torch import Tensor

__all__ = ['position_tolerance']

_TOLERANCE = 1e-4  # other ways to compute them differ by 1e-6, another table by 1


def position_tolerance(values: Tensor) -> float:
    """For float32 values of up to 1, whatever they were rounded to before."""
    narrow = (dtype for dtype in (torch.bfloat16, torch.float16) if torch.equal(values.to(dtype).float(), values))
    # Half the distance of two numbers at 1: what values up to 1 lose in the type in which they were stored.
    return _TOLERANCE + torch.finfo(next(narrow, torch.float32)).eps / 2
