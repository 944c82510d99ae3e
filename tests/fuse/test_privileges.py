"""Where mounting is not permitted, the hint is the one that helps there."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

from obsfs.fuse.kernel import privileges
from obsfs.fuse.kernel.privileges import Rights
from tests.conftest import Store

ROOT = Rights(is_root=True, no_new_privileges=False)
USER = Rights(is_root=False, no_new_privileges=False)
BOUND = Rights(is_root=False, no_new_privileges=True)


def mount(bucket: Store, path: Path, *wrapper: str, **environment: str) -> str:
    path.mkdir(exist_ok=True)
    done = subprocess.run(
        [*wrapper, sys.executable, "-m", "obsfs", "mount", str(bucket), str(path)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done
    return done.stderr


def test_root_without_cap_sys_admin(bucket: Store, tmp_path: Path) -> None:
    """As in a container. fusermount3 cannot mount either, and says it in its own words."""
    without = ["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"]
    if os.geteuid():
        without = ["unshare", "--map-root-user"]
    told = mount(bucket, tmp_path / "mnt", *without)
    assert "root has no CAP_SYS_ADMIN" in told
    assert "--cap-add SYS_ADMIN" in told
    # Without fusermount3 on the PATH, as in most images.
    alone = tmp_path / "bin"
    alone.mkdir()
    (alone / without[0]).symlink_to(shutil.which(without[0]) or without[0])
    told = mount(bucket, tmp_path / "mnt", *without, PATH=str(alone))
    assert "no fusermount3" in told
    assert "--cap-add SYS_ADMIN" in told


def test_the_rights_of_this_process() -> None:
    code = "from obsfs.fuse.kernel.privileges import Rights; print(Rights.of_process())"
    told = subprocess.run(
        ["setpriv", "--no-new-privs", sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "no_new_privileges=True" in told.stdout
    assert Rights.of_process().no_new_privileges is False


def test_each_refusal_of_fusermount3_has_its_remedy(tmp_path: Path) -> None:
    helper = tmp_path / "fusermount3"
    helper.touch(mode=0o755)
    for said, rights, words in (
        (
            "fusermount3: option allow_other only allowed if 'user_allow_other' is set in /etc/fuse.conf",
            USER,
            "fuse.conf",
        ),
        ("fusermount3: user has no write access to mountpoint /mnt", USER, "own and may write"),
        ("fusermount3: mount failed: Operation not permitted", USER, "chmod u+s"),
        ("fusermount3: mount failed: Operation not permitted", BOUND, "no_new_privs"),
        ("fusermount3: mount failed: Operation not permitted", ROOT, "CAP_SYS_ADMIN"),
        ("fusermount3: too many FUSE filesystems mounted; mount_max=N can be set in /etc/fuse.conf", USER, "mount_max"),
        ("fusermount3: fuse device not found, try 'modprobe fuse' first /dev/fuse", USER, "modprobe fuse"),
        ("fusermount3: something new", USER, "fusermount3(1)"),
    ):
        assert words in privileges.helper_remedy(said, rights, helper), said
    helper.chmod(0o4755)
    told = privileges.helper_remedy("fusermount3: mount failed: Operation not permitted", USER, helper)
    assert "chmod" not in told
    assert "SYS_ADMIN" in told


def test_the_device_and_the_call() -> None:
    assert "modprobe fuse" in privileges.device_remedy(errno.ENOENT, ROOT)
    assert "--device /dev/fuse" in privileges.device_remedy(errno.EPERM, ROOT)
    assert "chmod 666" in privileges.device_remedy(errno.EACCES, USER)
    assert "chmod" not in privileges.device_remedy(errno.EACCES, ROOT)
    assert "apparmor" in privileges.mount_remedy(errno.EACCES)
    assert "modprobe" in privileges.mount_remedy(errno.ENODEV)
    assert "fuse3" in privileges.no_helper_remedy(USER)
    assert "fuse3" not in privileges.no_helper_remedy(ROOT)
