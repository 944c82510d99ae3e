"""The wire format against the kernel's own header, compiled here."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest

from obsfs.fuse.kernel import wire

HEADER = Path("/usr/include/linux/fuse.h")
STRUCTS = {
    "fuse_in_header": wire.IN_HEADER.size,
    "fuse_out_header": wire.OUT_HEADER.size,
    "fuse_attr": wire.ATTR.size,
    "fuse_entry_out": wire.ENTRY_OUT.size + wire.ATTR.size,
    "fuse_attr_out": wire.ATTR_OUT.size + wire.ATTR.size,
    "fuse_init_in": wire.INIT_IN.size,
    "fuse_init_out": wire.INIT_OUT.size,
    "fuse_open_in": wire.OPEN_IN.size,
    "fuse_open_out": wire.OPEN_OUT.size,
    "fuse_read_in": wire.READ_IN.size,
    "fuse_release_in": wire.RELEASE_IN.size,
    "fuse_forget_in": wire.FORGET_IN.size,
    "fuse_batch_forget_in": wire.BATCH_FORGET_IN.size,
    "fuse_forget_one": wire.FORGET_ONE.size,
    "fuse_getxattr_in": wire.GETXATTR_IN.size,
    "fuse_getxattr_out": wire.GETXATTR_OUT.size,
    "fuse_statfs_out": wire.STATFS_OUT.size,
    "fuse_interrupt_in": wire.INTERRUPT_IN.size,
    "fuse_dirent": wire.DIRENT.size,
    "fuse_notify_inval_entry_out": wire.NOTIFY_INVAL_ENTRY_OUT.size,
}
CONSTANTS = {
    **{f"FUSE_{opcode.name}": opcode.value for opcode in wire.Opcode},
    "FUSE_ASYNC_READ": wire.Init.ASYNC_READ,
    "FUSE_SPLICE_WRITE": wire.Init.SPLICE_WRITE,
    "FUSE_DO_READDIRPLUS": wire.Init.DO_READDIRPLUS,
    "FUSE_READDIRPLUS_AUTO": wire.Init.READDIRPLUS_AUTO,
    "FUSE_ASYNC_DIO": wire.Init.ASYNC_DIO,
    "FUSE_PARALLEL_DIROPS": wire.Init.PARALLEL_DIROPS,
    "FUSE_MAX_PAGES": wire.Init.MAX_PAGES,
    "FUSE_INIT_EXT": wire.Init.INIT_EXT,
    "FOPEN_KEEP_CACHE": wire.FileOpen.KEEP_CACHE,
    "FOPEN_CACHE_DIR": wire.FileOpen.CACHE_DIR,
    "FOPEN_NOFLUSH": wire.FileOpen.NOFLUSH,
    "FUSE_NOTIFY_INVAL_ENTRY": wire.NOTIFY_INVAL_ENTRY,
    "FUSE_DEV_IOC_CLONE": wire.DEV_IOC_CLONE,
}


def test_sizes_and_numbers_are_the_kernels(tmp_path: Path) -> None:
    assert HEADER.exists(), "the kernel's header is missing: apt-get install linux-libc-dev"
    lines = [f'printf("{name} %zu\\n", sizeof(struct {name}));' for name in STRUCTS]
    lines += [f'printf("{name} %llu\\n", (unsigned long long){name});' for name in CONSTANTS]
    source = "#include <stdio.h>\n#include <sys/ioctl.h>\n#include <linux/fuse.h>\nint main(void) {%s return 0; }"
    (tmp_path / "sizes.c").write_text(source % "\n".join(lines))
    subprocess.run(["gcc", "-o", tmp_path / "sizes", tmp_path / "sizes.c"], check=True)
    out = subprocess.run([tmp_path / "sizes"], capture_output=True, text=True, check=True).stdout
    theirs = {name: int(number) for name, number in map(str.split, out.splitlines())}
    assert theirs == {**STRUCTS, **{name: int(value) for name, value in CONSTANTS.items()}}


def test_what_older_headers_do_not_have() -> None:
    """Passthrough came with protocol 7.40; numbers by _IOW of <linux/ioctl.h>."""
    assert wire.BACKING_MAP.size == 16
    assert wire.DEV_IOC_BACKING_OPEN == (1 << 30) | (16 << 16) | (229 << 8) | 1
    assert wire.DEV_IOC_BACKING_CLOSE == (1 << 30) | (4 << 16) | (229 << 8) | 2
    assert (wire.Init.PASSTHROUGH, wire.Init.HAS_RESEND, wire.FileOpen.PASSTHROUGH) == (1 << 37, 1 << 39, 1 << 7)


def test_requests_are_taken_apart() -> None:
    body = b"name\0"
    data = wire.IN_HEADER.pack(wire.IN_HEADER.size + len(body), 1, 77, 5, 0, 0, 0, 0, 0) + body
    request = wire.parse_request(data, len(data))
    assert (request.opcode, request.unique, request.node) == (1, 77, 5)
    assert wire.text(data, request.body, request.end) == "name"
    for broken in (data[:-1], data[:10]):
        with pytest.raises(ValueError, match="request"):
            wire.parse_request(broken, len(broken))
    with pytest.raises(ValueError, match="utf-8"):
        wire.text(b"\xff\xff\0", 0, 3)


def test_times_are_seconds_and_nanoseconds() -> None:
    attr = wire.attr(ino=7, mode=0o100644, size=513, mtime=12.5, uid=1, gid=2)
    fields = wire.ATTR.unpack(attr)
    assert fields[:3] == (7, 513, 2)
    assert fields[3:9] == (12, 12, 12, 500_000_000, 500_000_000, 500_000_000)
    entry = wire.entry_out(9, 1.25, attr)
    assert struct.unpack_from("=QQQQII", entry)[::2] == (9, 1, 250_000_000)


def test_directory_entries_are_padded() -> None:
    for length in range(1, 20):
        assert len(wire.dirent(1, 2, wire.DT_REG, b"x" * length)) % 8 == 0
