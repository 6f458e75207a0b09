"""What runs beside training: tracking, pictures, quality figures and guards. Each file holds the class of its name."""

from tread_composer.core.lazy import lazy_names

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
