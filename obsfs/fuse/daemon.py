"""The program name of servers: ``python -m obsfs.fuse.daemon``. The code is in :mod:`obsfs.service.daemon`.

A supervisor outlives upgrades: one of an earlier version starts servers of this version by this name, and one of this
version may have to start the server of an earlier one. So the name is part of their protocol, and stays.
"""

from __future__ import annotations

import logging
import os

from obsfs.service.daemon import main

if __name__ == "__main__":
    # Worker threads may be stuck in a request to a server that does not answer; the process ends all the same.
    status = main()
    logging.shutdown()
    os._exit(status)
