"""The program name of supervisors: ``python -m obsfs.fuse.supervisor``. The code is in :mod:`obsfs.service.supervisor`.

A server appoints another supervisor when its own is killed, perhaps from the program of another version. So the name is
part of their protocol, and stays (see :mod:`obsfs.fuse.daemon`).
"""

from __future__ import annotations

import sys

from obsfs.service.supervisor import main

if __name__ == "__main__":
    sys.exit(main())
