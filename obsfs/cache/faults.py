"""What went wrong with the cache's disk: counted, and logged once in a while."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

log = logging.getLogger(__name__)

_LOG_SECONDS = 60.0
"""Between two lines of the log about disk errors."""


class DiskFaults:
    """Errors of one cache directory. Safe to use from many threads."""

    def __init__(self, directory: Path) -> None:
        self.corrupt_blocks = 0
        """Blocks that did not match their checksums so far."""
        self._directory = directory
        self._guard = threading.Lock()
        self._next_line = 0.0

    def log_error(self, error: OSError) -> None:
        """Log that the directory refused something, at most once a minute."""
        now = time.monotonic()
        if now >= self._next_line:
            self._next_line = now + _LOG_SECONDS
            log.warning(
                "cache directory %s: %s; what it does not take is read from memory", self._directory, error.strerror
            )

    def count_corrupt_block(self) -> None:
        """Count a block that did not match its checksum."""
        with self._guard:
            self.corrupt_blocks += 1
