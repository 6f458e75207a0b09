"""What runs beside training: tracking, pictures, quality figures and guards. Each file holds the class of its name."""

from typing import TYPE_CHECKING

from tread_composer.core.lazy import lazy_names

if TYPE_CHECKING:
    from tread_composer.callbacks.digits_quality import DigitsQuality
    from tread_composer.callbacks.epoch_is_whole import EpochIsWhole
    from tread_composer.callbacks.evaluation import Evaluation
    from tread_composer.callbacks.mlflow_run import MLflowRun
    from tread_composer.callbacks.progress import ProgressLines
    from tread_composer.callbacks.sample_grid import SampleGrid

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

__getattr__ = lazy_names(__name__, {name: f'{__name__}.{module}' for name, module in _LAZY.items()})
