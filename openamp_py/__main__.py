"""``python -m openamp_py`` is the command ``openamp``."""

import sys

from openamp_py.cli import main

sys.exit(main())
