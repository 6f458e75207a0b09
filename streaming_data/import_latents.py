"""Latents of other projects as a data set: ``python streaming_data/import_latents.py SOURCE --layout ...``."""

import sys

from tread_composer.conversion.importers import main

if __name__ == '__main__':
    sys.exit(main())
