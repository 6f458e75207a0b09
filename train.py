"""Train what a YAML file describes: ``composer train.py yamls/digits_tread.yaml [key=value ...]``."""

import sys

from tread_composer.cli import main

if __name__ == '__main__':
    sys.exit(main(['train', *sys.argv[1:]]))
