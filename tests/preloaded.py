"""What the fork server of ``tests/warm.py`` imports before its first fork: all that a command may import later."""

import importlib
import pkgutil

import tread_composer
from tread_composer.core.process import importing, prepare_process

prepare_process()
with importing():  # what it freezes, no fork copies: a collection touches the reference counts of all else
    # Commands import much of ours only where they use it. Not here: pyarrow, which has threads.
    for module in pkgutil.walk_packages(tread_composer.__path__, 'tread_composer.'):
        if not module.name.endswith(('.__main__', '.parquet')):
            importlib.import_module(module.name)
    for name in (
        # What libraries import only at their first use: MLflow its store, diffusers its VAE.
        'mlflow.store.tracking.sqlalchemy_store',
        'diffusers.models.autoencoders.autoencoder_kl',
        'pytest',  # by functions of tests
        'tests.helpers',
        'tests.warm',
    ):
        importlib.import_module(name)
