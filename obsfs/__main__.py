"""``python -m obsfs``."""

import os
import sys

# Nothing is imported from the working directory, which ``python -m`` puts first, unless obsfs lies there.
if not sys.flags.safe_path and sys.path[0] != os.path.dirname(os.path.dirname(__file__)):  # noqa: PTH120
    del sys.path[0]

from obsfs.commands import main

sys.exit(main())
