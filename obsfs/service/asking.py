"""Asks mounts of this user, all at the same time, and waits for none longer than 5 seconds.

A mount is asked over its control socket (:mod:`obsfs.service.control`). Where nothing serves that, the mount is of a
version before the socket, or dead, or its state directory is another. Then it is asked by extended attribute, in a
process of its own (:mod:`obsfs.service.attribute_asker`), which may be stuck for good, and is left behind.
"""

from __future__ import annotations

import errno
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

from obsfs import processes
from obsfs.errors import UsageError
from obsfs.mountinfo import MountEntry
from obsfs.service import attribute_asker, control, state

ASK_SECONDS = 5.0
_LEAVE_SECONDS = 0.05
_ATTRIBUTES = {"status": "user.obsfs.status", "refresh": "user.obsfs.refresh"}
"""The calls that every version answers."""
_PIECE_BYTES = 64 << 10


class Question(NamedTuple):
    """A call on a mount; `path` is below its mountpoint."""

    entry: MountEntry
    call: str
    path: Path = Path()


class Answer(NamedTuple):
    """What a mount answered, and about which path below its mountpoint."""

    path: Path
    value: dict[str, Any]


Outcome = Answer | OSError | UsageError | None
"""An answer, or the error that the mount reports; None where it did not answer in time."""


class _Conversation(Protocol):
    """One question to one mount, in one of two ways."""

    question: Question

    def fileno(self) -> int: ...

    def read(self) -> tuple[bool, Outcome]:
        """Read what has come. Returns whether that is all, and the outcome."""

    def close(self) -> None: ...


def ask(questions: Sequence[Question]) -> list[Outcome]:
    """Ask mounts a question each, and return the outcomes in the same order.

    Only mounts of this user may be asked: any other could answer anything. A call that only the control socket knows
    has ECONNREFUSED as its outcome where nothing serves the socket.
    """
    outcomes: list[Outcome] = [None for _ in questions]
    running: list[_Conversation] = []
    deadline = time.monotonic() + ASK_SECONDS
    with selectors.DefaultSelector() as selector:

        def begin(number: int, conversation: _Conversation | OSError) -> None:
            if isinstance(conversation, OSError):
                outcomes[number] = conversation
            else:
                running.append(conversation)
                selector.register(conversation, selectors.EVENT_READ, (number, conversation))

        try:
            for number, question in enumerate(questions):
                begin(number, _begin(question))
            while selector.get_map() and (left := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    number, conversation = key.data
                    is_over, outcome = conversation.read()
                    if not is_over:
                        continue
                    selector.unregister(conversation)
                    if isinstance(conversation, _SocketConversation) and isinstance(outcome, OSError):
                        # The server went away: its successor, or the kernel, has the answer.
                        begin(number, _by_attribute(conversation.question))
                    else:
                        outcomes[number] = outcome
        finally:
            for conversation in running:
                conversation.close()
    return outcomes


def _begin(question: Question) -> _Conversation | OSError:
    try:
        return _SocketConversation(question)
    except (OSError, UsageError):
        return _by_attribute(question)


def _by_attribute(question: Question) -> _Conversation | OSError:
    attribute = _ATTRIBUTES.get(question.call)
    if attribute is None:
        return OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    return _AttributeConversation(question, attribute)


class _SocketConversation:
    """A question over the control socket. Raises OSError or UsageError where it cannot be asked."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self._root = PurePosixPath(question.entry.root.lstrip("/"))
        self._said = bytearray()
        self._socket = control.connect(state.control_path(question.entry.minor))
        try:
            line = control.Request(question.call, _relative(self._root / question.path)).encode()
            if self._socket.send(line) != len(line):
                raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
        except OSError:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """Return the descriptor to wait for."""
        return self._socket.fileno()

    def read(self) -> tuple[bool, Outcome]:
        """Read what has come. Returns whether that is all, and the outcome."""
        try:
            piece = self._socket.recv(_PIECE_BYTES)
        except BlockingIOError:
            return False, None
        except OSError as error:
            return True, error
        self._said += piece
        if not piece:
            return True, OSError(errno.ECONNABORTED, os.strerror(errno.ECONNABORTED))
        if not piece.endswith(b"\n") and len(self._said) <= control.MAX_ANSWER_BYTES:
            return False, None
        return True, self._outcome()

    def _outcome(self) -> Outcome:
        try:
            result = control.parse_answer(bytes(self._said))
        except UsageError as error:
            return error
        # A bind mount shows a part of what the server serves.
        path = PurePosixPath(str(result.get("path", self._root)))
        with suppress(ValueError):
            return Answer(Path(path.relative_to(self._root)), result)
        return Answer(Path(), result)

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


class _AttributeConversation:
    """A question by extended attribute, which another process asks."""

    def __init__(self, question: Question, attribute: str) -> None:
        self.question = question
        entry = question.entry
        self._said = bytearray()
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", attribute_asker.__file__),
                *(str(entry.number), entry.mountpoint, attribute, question.path),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=processes.bare_environment(),
        )
        assert self._process.stdout is not None
        self._output = self._process.stdout

    def fileno(self) -> int:
        """Return the descriptor to wait for."""
        return self._output.fileno()

    def read(self) -> tuple[bool, Outcome]:
        """Read what has come. Returns whether that is all, and the outcome."""
        piece = os.read(self.fileno(), _PIECE_BYTES)
        self._said += piece
        if piece:
            return False, None
        return True, self._outcome()

    def _outcome(self) -> Outcome:
        code, _, rest = bytes(self._said).partition(b"\n")
        if not code.isdigit():
            return None
        if number := int(code):
            return OSError(number, os.strerror(number))
        path, _, text = rest.partition(b"\0")
        value: object = {}
        if self.question.call == "status":
            try:
                value = json.loads(text)
            except ValueError:
                return None
        return Answer(Path(os.fsdecode(path)), value) if isinstance(value, dict) else None

    def close(self) -> None:
        """End the process; one that cannot be ended is waited for in a thread."""
        self._output.close()
        try:
            self._process.wait(_LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            threading.Thread(target=self._process.wait, name="obsfs-asker", daemon=True).start()


def _relative(path: PurePosixPath) -> str:
    return "" if path == PurePosixPath() else path.as_posix()
