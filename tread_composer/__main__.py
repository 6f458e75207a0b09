"""``python -m tread_composer``."""

import sys

from tread_composer.cli import main

sys.exit(main())
