"""Draw samples of a data set: ``python streaming_data/inspect_latents.py data/imagenet256 --autoencoder PATH``."""

import sys

from tread_composer.conversion.draw import main

if __name__ == '__main__':
    sys.exit(main())
