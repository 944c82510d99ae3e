"""``python -m obsfs``."""

import sys

from obsfs.commands import main

sys.exit(main())
