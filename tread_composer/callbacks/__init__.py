"""What runs beside training: tracking, pictures, quality figures and guards. Each file holds the class of its name."""

import importlib
from typing import Any

__all__ = ['DigitsQuality', 'EpochIsWhole', 'Evaluation', 'MLflowRun', 'ProgressLines', 'SampleGrid']

# Imported on first use: a run without MLflow must not pay for importing it, nor need it.
_LAZY = {
    'DigitsQuality': 'digits_quality',
    'EpochIsWhole': 'epoch_is_whole',
    'Evaluation': 'evaluation',
    'MLflowRun': 'mlflow_run',
    'ProgressLines': 'progress',
    'SampleGrid': 'sample_grid',
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'{__name__}.{_LAZY[name]}'), name)
