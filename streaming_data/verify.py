"""Check a data set: ``python streaming_data/verify.py data/imagenet256``. Exit code 0, 1 (faults) or 2."""

import sys

from tread_composer.conversion.verify import main

if __name__ == '__main__':
    sys.exit(main())
