"""What the fork server of ``tests/warm.py`` imports before its first fork: all that a command may import later."""

import atexit
import gc
import importlib

from tread_composer.core.process import prepare_process

prepare_process()
for name in (
    'tread_composer.run.train',
    'tread_composer.cli.convert',
    # What libraries import only at their first use: MLflow its store, scikit-learn the digits, diffusers its VAE.
    'mlflow.store.tracking.sqlalchemy_store',
    'sklearn.datasets',
    'diffusers.models.autoencoders.autoencoder_kl',
    'tests.helpers',
    'tests.warm',
):
    importlib.import_module(name)
gc.freeze()  # a fork would copy each page of memory whose reference counts a collection touches
atexit.register(gc.unfreeze)  # see core.process.importing
