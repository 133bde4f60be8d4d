"""``python -m packc``."""

import sys

from packc.cli import main

sys.exit(main())
