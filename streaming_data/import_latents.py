"""Latents of other projects as a data set: ``python streaming_data/import_latents.py SOURCE --layout ...``."""

import sys

from tread_composer.core.process import prepare_process

if __name__ == '__main__':
    prepare_process()
    from tread_composer.cli.convert import import_main

    sys.exit(import_main())
