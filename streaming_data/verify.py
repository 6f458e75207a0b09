"""Check a data set: ``python streaming_data/verify.py data/imagenet256``. Exit code 0, 1 (faults) or 2."""

import sys

from tread_composer.core.process import prepare_process

if __name__ == '__main__':
    prepare_process()
    from tread_composer.cli.convert import verify_main

    sys.exit(verify_main())
