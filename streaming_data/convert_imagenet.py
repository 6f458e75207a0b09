"""Convert images to latents: ``python streaming_data/convert_imagenet.py --source ... --out ... --autoencoder ...``.

Several GPUs: ``composer -n 8 streaming_data/convert_imagenet.py ...``. All options: ``--help``.
"""

import sys

from tread_composer.core.process import prepare_process

if __name__ == '__main__':
    prepare_process()
    from tread_composer.cli.convert import convert_main

    sys.exit(convert_main())
