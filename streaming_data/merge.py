"""Join data sets of independent conversions: ``python streaming_data/merge.py data/a data/b --out data/all``."""

import sys

from tread_composer.core.process import prepare_process

if __name__ == '__main__':
    prepare_process()
    from tread_composer.cli.convert import merge_main

    sys.exit(merge_main())
