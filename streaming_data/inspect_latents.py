"""Draw samples of a data set: ``python streaming_data/inspect_latents.py data/imagenet256 --autoencoder PATH``."""

import sys

from tread_composer.core.process import prepare_process

if __name__ == '__main__':
    prepare_process()
    from tread_composer.cli.convert import inspect_main

    sys.exit(inspect_main())
