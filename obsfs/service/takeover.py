"""What a supervisor asks a server for: settings, and for a successor what it takes over."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from obsfs.errors import UsageError
from obsfs.service.supervisor import FORMAT
from obsfs.settings import Settings


@dataclass(frozen=True)
class Takeover:
    """What a successor gets from its supervisor.

    Attributes:
        lock: the descriptor of the mount's lock.
        fds: all descriptors of the connection to the kernel.
        direct: whether passthrough works here.
        restarts: how many servers have died.
        server: the number of this server of the mount, greater than those of its predecessors.
        is_whole: whether the takeover log holds everything that was to be recorded.
        upgrades: how many servers were replaced on purpose.
        is_upgrade: whether this is one of those.
    """

    lock: int
    fds: list[int]
    direct: bool
    restarts: int
    server: int
    is_whole: bool
    upgrades: int = 0
    is_upgrade: bool = False

    @staticmethod
    def parse(request: dict[str, Any]) -> Takeover:
        """Read the part ``takeover`` of a request. Unknown keys are ignored.

        Raises:
            UsageError: it was made by a program of another kind.
        """
        try:
            lock, *fds = map(int, request["connection"])
            restarts = int(request["restarts"])
            server = int(request.get("servers", restarts))
            direct, is_whole = bool(request["direct"]), bool(request.get("is_whole", True))
            upgrades, is_upgrade = int(request.get("upgrades", 0)), bool(request.get("is_upgrade", False))
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"the takeover request cannot be read ({error!r})", "mount again") from None
        return Takeover(lock, fds, direct, restarts, server, is_whole, upgrades, is_upgrade)

    def own(self) -> None:
        """Keep the descriptors from the children of this process."""
        for fd in (self.lock, *self.fds):
            os.set_inheritable(fd, False)


def read_request(request: dict[str, Any]) -> tuple[Settings, Takeover | None, list[str]]:
    """Read a supervisor's request.

    Returns:
        The settings, what is taken over (None for a new mount), and a line for each setting that was ignored.

    Raises:
        UsageError: it has a later format, or a setting of a new mount is wrong.
    """
    if request.get("format", 0) > FORMAT:
        raise UsageError("this mount is supervised by a later version of obsfs", "install that version, or mount again")
    if "takeover" not in request:
        return Settings.parse(request["settings"], request.get("places")), None, []
    settings, notes = Settings.adopt(request["settings"])
    return settings, Takeover.parse(request["takeover"]), notes
