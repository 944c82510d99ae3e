"""Hostile input for whatever reads what others wrote: ``python -m tests.fuzz TARGET [OPTIONS OF LIBFUZZER]``.

A target gets bytes made up by atheris, and must not raise: what cannot be read is refused with one of obsfs's own
errors, in one line.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["obsfs"]):
    from obsfs.access import safetensors
    from obsfs.blocks import BLOCK
    from obsfs.cache.directory import Cache
    from obsfs.cache.layout import FORMAT, map_path, read_entry
    from obsfs.errors import ObsfsError, UnavailableError
    from obsfs.fetch.engine import Engine
    from obsfs.fuse.kernel import wire
    from obsfs.fuse.kernel.server import Server
    from obsfs.fuse.kernel.wire import Opcode
    from obsfs.library import manifest
    from obsfs.library.hub import parse_hub_name
    from obsfs.library.names import parse_model, suggest_names
    from obsfs.library.snapshot import parse_time
    from obsfs.paths import config_path
    from obsfs.service.supervisor_client import SupervisorClient
    from obsfs.settings import Settings, knobs
    from obsfs.store.address import check_endpoint, parse_address
    from obsfs.store.memory import MemoryStore, Request
    from obsfs.store.types import ObjectVersion
    from obsfs.values import parse_seconds
    from obsfs.vfs.operations import Operations
    from obsfs.vfs.tree import Tree

from tests.conftest import random_bytes

_SILENT = {Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT}
_FRAGMENTS = (
    "obs://", "s3://", "https://", "hf:", "ms:", "/", "..", ".", "@", ":", "//", "\0", "\n", "\x1b[31m", " ", "%2e%2e",
    "models", "v1", "-1", "1e999", "9" * 30, "inf", "now", "[", "]", "=", '"', "{", "}", "é", "\ud800", "²", "a" * 300,
)  # fmt: skip


def _store() -> MemoryStore:
    """A bucket that lists, and does not give its bytes."""
    store = MemoryStore({"a": b"1", "dir/b": b"22", "dir/sub/c": b"333", "m.safetensors": b"4444"})

    def refuse(request: Request) -> None:
        if request.operation == "open_range":
            raise UnavailableError("there are no bytes")

    store.before = refuse
    return store


class _Kernel:
    """A server, and the other end of its connection."""

    def __init__(self) -> None:
        settings = Settings.load(cache_dir=tempfile.mkdtemp(), retry_timeout="0")
        store = _store()
        tree = Tree(store, "", 60)
        operations = Operations(tree, Engine(store, settings), settings, {})
        self._near, self._far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._near.setblocking(False)
        self._server = Server(
            self._far.fileno(), operations, passthrough=False, on_end=lambda: None, fd_store=SupervisorClient()
        )
        self._buffer = bytearray(64 << 10)
        self._unique = 0

    def ask(self, opcode: int, node: int, body: bytes, length: int) -> None:
        """Send one request, which says that it is `length` bytes long; it is answered once, and well."""
        self._unique += 2
        raw = wire.IN_HEADER.pack(length, opcode, self._unique, node, 0, 0, 0, 0, 0) + body
        self._buffer[: len(raw)] = raw
        try:
            request = wire.parse_request(self._buffer, len(raw))
        except ValueError:
            return
        self._server._dispatch(self._far.fileno(), request, memoryview(self._buffer))
        deadline = time.monotonic() + 10
        while self._unique in self._server._pending:
            assert time.monotonic() < deadline, "a request is not answered"
            time.sleep(0.0005)
        answers: list[Any] = []
        while opcode not in _SILENT and not answers:
            assert time.monotonic() < deadline, "a request is not answered"
            with suppress(BlockingIOError):
                while True:
                    answers.append(self._near.recv(2 << 20))
        for answer in answers:
            size, error, unique = wire.OUT_HEADER.unpack_from(answer)
            assert (size, unique) == (len(answer), self._unique), "the answer to something else"
            assert -4096 < error <= 0
        assert len(answers) <= 1


def kernel() -> Callable[[bytes], None]:
    """Requests that no kernel would send."""
    one = _Kernel()
    opcodes = [*Opcode, 0, 9999]

    def test(data: bytes) -> None:
        take = atheris.FuzzedDataProvider(data)
        for _ in range(take.ConsumeIntInRange(1, 6)):
            body = take.ConsumeBytes(take.ConsumeIntInRange(0, 80))
            if take.ConsumeBool():
                # What is right in the first place gets further: a handle, an offset, a size.
                body = struct.pack("<QQI", take.ConsumeIntInRange(0, 20), take.ConsumeIntInRange(0, 8), 4096) + body
            length = wire.IN_HEADER.size + len(body)
            if take.ConsumeIntInRange(0, 9) == 0:
                length = take.ConsumeIntInRange(0, 1 << 32 - 1)
            opcode = opcodes[take.ConsumeIntInRange(0, len(opcodes) - 1)]
            one.ask(opcode, take.ConsumeIntInRange(0, 8), body, length)

    return test


def cache() -> Callable[[bytes], None]:
    """Cache files that something has written into: what is read is right, or is not there."""
    home = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    version = ObjectVersion("e", "b", "k", '"t"', 2 * BLOCK + 1000)
    content = random_bytes(version.size)
    store = Cache(home, 1 << 30)
    whole = store.open(version)
    for block in range(whole.blocks):
        whole.store_block(block, memoryview(content)[block * BLOCK :][: whole.length_of(block)])
    map_file = map_path(store.directory / FORMAT, version)
    data_path = map_file.with_suffix(".data")
    good_map = map_file.read_bytes()
    whole.close()

    def test(data: bytes) -> None:
        take = atheris.FuzzedDataProvider(data)
        damaged = bytearray(good_map)
        for _ in range(take.ConsumeIntInRange(0, 4)):
            at = take.ConsumeIntInRange(0, len(damaged))
            junk = take.ConsumeBytes(16)
            damaged[at : at + len(junk)] = junk
        for path, text in ((map_file, bytes(damaged[: take.ConsumeIntInRange(0, len(damaged))])), (data_path, content)):
            path.write_bytes(text)
        if take.ConsumeBool():
            os.truncate(data_path, take.ConsumeIntInRange(0, version.size))
        read_entry(map_file)
        list(store.entries())
        opened = store.open(version)
        for block in range(opened.blocks):
            size = opened.length_of(block)
            if opened.ensure_verified(block):
                assert opened.read(block * BLOCK, size) == content[block * BLOCK :][:size], "a wrong byte"
        opened.close()
        store.trim()

    return test


def text() -> Callable[[bytes], None]:
    """What people type, and the configuration file."""
    os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp()
    config_path().parent.mkdir(parents=True)
    names = list(knobs())

    def refused(call: Callable[[], object]) -> None:
        try:
            call()
        except ObsfsError as error:
            assert "\n" not in str(error), repr(str(error))

    def test(data: bytes) -> None:
        take = atheris.FuzzedDataProvider(data)
        parts = []
        for _ in range(take.ConsumeIntInRange(1, 6)):
            fragment = take.ConsumeIntInRange(0, 2 * len(_FRAGMENTS))
            parts.append(_FRAGMENTS[fragment] if fragment < len(_FRAGMENTS) else take.ConsumeUnicode(8))
        said = "".join(parts)
        name = names[take.ConsumeIntInRange(0, len(names) - 1)]
        for parse in (parse_address, check_endpoint, parse_model, parse_hub_name, parse_time):
            refused(lambda parse=parse: parse(said))
        with suppress(ValueError):
            assert parse_seconds(said) >= 0
        suggest_names(said, [said, "v2", "v10"])
        refused(lambda: Settings.load(**{name: said}))
        config_path().write_bytes(f"{name} = {said}\n".encode(errors="surrogatepass"))
        refused(Settings.load)
        config_path().write_bytes(take.ConsumeBytes(200))
        refused(Settings.load)
        config_path().unlink()

    return test


def formats() -> Callable[[bytes], None]:
    """Manifests, headers of weights, and configurations of models."""
    good = b'{"name":"a","created":"2026-01-01T00:00:00Z","files":[{"path":"a","size":1}]}'

    def test(data: bytes) -> None:
        take = atheris.FuzzedDataProvider(data)
        name, dtype = take.ConsumeUnicodeNoSurrogates(12), take.ConsumeUnicodeNoSurrogates(4)
        tensor = {"dtype": dtype, "shape": [take.ConsumeInt(8)], "data_offsets": [take.ConsumeInt(9), 1]}
        raw = take.ConsumeBytes(take.ConsumeIntInRange(0, 400))
        written = [
            raw,
            b"[" * 100_000,
            b'{"' + raw + b'": 1}',
            str({name: tensor}).replace("'", '"').encode(),
            good[: take.ConsumeIntInRange(0, len(good))] + raw,
        ]
        for some in written:
            body = (len(some).to_bytes(8, "little") + some) if take.ConsumeBool() else some
            found = safetensors.extents(len(body) + 1000, lambda at, size, body=body: body[at : at + size])
            safetensors.load_order({"file": found or []}, BLOCK)
            manifest.summarize(some, some, {"w": {name: tensor}})
            try:
                manifest.parse_manifest(some, "here")
            except ObsfsError as error:
                assert "\n" not in str(error), repr(str(error))

    return test


TARGETS = {"kernel": kernel, "cache": cache, "text": text, "formats": formats}


def main() -> None:
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name not in TARGETS:
        sys.exit(f"usage: python -m tests.fuzz {'|'.join(TARGETS)} [options of libFuzzer]")
    atheris.Setup(sys.argv, TARGETS[name]())
    atheris.Fuzz()


if __name__ == "__main__":
    main()
