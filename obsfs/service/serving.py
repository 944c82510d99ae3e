"""Serves a mount: builds the file system from its parts, mounts it, and takes everything down in the end."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from obsfs import mountinfo
from obsfs.errors import UsageError
from obsfs.fetch.engine import Engine
from obsfs.library import snapshot
from obsfs.limits import LEAST_FILES, allow_open_files, open_files_limit
from obsfs.service import state, takeover_log
from obsfs.service.calls import MountCalls
from obsfs.service.control import ControlServer
from obsfs.service.native import NativeServing, note_lost_supervisor
from obsfs.service.stop import Stop
from obsfs.service.supervisor import RETRY
from obsfs.service.supervisor_client import SupervisorClient
from obsfs.service.takeover import Takeover
from obsfs.service.takeover_log import TakeoverLog
from obsfs.settings import Settings
from obsfs.store import open_store
from obsfs.store.address import Address, parse_address
from obsfs.store.base import ObjectStore
from obsfs.store.types import Page
from obsfs.vfs.listings import Source
from obsfs.vfs.operations import Operations
from obsfs.vfs.tree import Tree

log = logging.getLogger(__name__)


def serve(
    source: str,
    mountpoint: Path,
    settings: Settings,
    on_ready: Callable[[], None],
    stop: Stop,
    *,
    supervisor: SupervisorClient | None = None,
    takeover: Takeover | None = None,
    log_file: Path | None = None,
    request: dict[str, Any] | None = None,
) -> None:
    """Mount `source` on `mountpoint` and serve it, until it is unmounted or `stop` is called.

    From when it mounts, signals only call `stop`; so this runs in the main thread.

    Args:
        source: ``obs://BUCKET[/PREFIX]``.
        mountpoint: an absolute path without symbolic links.
        settings: of the mount.
        on_ready: called once, when the directory answers.
        stop: ends the mount.
        supervisor: of this process; by default it has none.
        takeover: what a predecessor left. Nothing is mounted then: the kernel goes on with this process.
        log_file: where the mount's log is, for the status.
        request: what the supervisor asked for, for another one if it is killed.

    Raises:
        ObsfsError: it cannot be served; no mount is left behind.
    """
    address = parse_address(source)
    supervisor = supervisor or SupervisorClient()
    request = request or {}
    allow_open_files()
    if takeover is None and (limit := open_files_limit()) < LEAST_FILES:
        raise UsageError(
            f"the limit of open files is {limit}, and a mount needs {LEAST_FILES} at least",
            "raise it (LimitNOFILE= of a unit, `ulimit -n`)",
        )
    with ExitStack() as cleanup, _retried(takeover) as is_serving:
        lock = takeover.lock if takeover else state.acquire_lock(mountpoint, supervisor.pid or os.getpid())
        cleanup.callback(os.close, lock)
        bucket = open_store(address, settings, is_known=takeover is not None)
        names, page = _names(cleanup, bucket, address, settings, mountpoint, is_successor=takeover is not None)
        engine = Engine(bucket, settings, scrubs=True)
        cleanup.callback(engine.close)
        records = TakeoverLog(state.file_path(mountpoint, "journal"), keep=takeover is not None)
        cleanup.callback(records.close)
        tree = _tree(names, address.prefix, settings, records, takeover.server if takeover else 0)
        if takeover is not None:
            _restore(tree, records.path, bucket, takeover)
            records.renew()
        if page is not None:
            tree.seed_root(page)
        identity = {
            **_identity(bucket, address, mountpoint, settings, takeover),
            "supervisor": supervisor.pid,
            "log": str(log_file) if log_file else None,
            "ends_with_program": bool(request.get("lifeline")),
        }
        operations = Operations(tree, engine, settings, identity, lambda: bucket.stats().endpoints)
        stop.on_signals()
        if settings.fuse_backend == "native":
            native = NativeServing(
                operations,
                mountpoint,
                settings,
                supervisor=supervisor,
                lock=lock,
                takeover_log=records,
                request=request,
                stop=stop,
            )
            on_ready = _with_control(cleanup, MountCalls(operations, mountpoint, native.refresh), stop, on_ready)
            native.serve(on_ready, takeover, is_serving)
        else:
            from obsfs.fuse import libfuse

            def on_lost() -> None:
                note_lost_supervisor(identity, lock, request, stop)

            # Nothing can follow this server, so it does not need its supervisor to go on.
            supervisor.listen(lambda refused: None, on_lost)
            on_ready = _with_control(cleanup, MountCalls(operations, mountpoint, operations.refresh), stop, on_ready)
            libfuse.serve(operations, mountpoint, settings, on_ready, stop.wait)


def _identity(
    bucket: ObjectStore, address: Address, mountpoint: Path, settings: Settings, takeover: Takeover | None
) -> dict[str, object]:
    """Return what the status says of the mount and its server, whatever happens."""
    return {
        "mountpoint": str(mountpoint),
        "source": str(address),
        "endpoint": bucket.endpoint,
        "snapshot": settings.snapshot,
        "pid": os.getpid(),
        "fuse_backend": settings.fuse_backend,
        # Its old name and values, for one version.
        "engine": "native" if settings.fuse_backend == "native" else "fusepy",
        "restarts": takeover.restarts if takeover else 0,
        "upgrades": takeover.upgrades if takeover else 0,
        "can_be_followed": takeover is not None,
    }


def _names(
    cleanup: ExitStack,
    bucket: ObjectStore,
    address: Address,
    settings: Settings,
    mountpoint: Path,
    *,
    is_successor: bool,
) -> tuple[Source, Page | None]:
    """Return what the mount shows, the bucket or a snapshot, and the first page of it, if it was read.

    Raises:
        ObsfsError: there is nothing to show.
    """
    if settings.snapshot:
        names, file = _snapshot(bucket, address, settings.snapshot, mountpoint, is_successor=is_successor)
        cleanup.callback(file.unlink, missing_ok=True)
        return names, next(names.list(address.prefix))
    return bucket, None if is_successor else _check(bucket, address)


def _check(bucket: ObjectStore, address: Address) -> Page:
    page = bucket.check()
    if address.prefix and not page.objects and not page.prefixes:
        raise UsageError(f"there is nothing under {address}", f"see what is in {address.scheme}://{address.bucket}")
    return page


def _snapshot(
    bucket: ObjectStore, address: Address, wanted: str, mountpoint: Path, *, is_successor: bool
) -> tuple[snapshot.Snapshot, Path]:
    """Return what the mount shows, and the file in which it is kept for successors.

    Raises:
        ObsfsError: it cannot be taken.
    """
    file = state.file_path(mountpoint, "snapshot")
    if is_successor:
        try:
            return snapshot.restore(file.read_bytes(), bucket), file
        except (OSError, ValueError) as error:
            log.warning("%s cannot be read (%s): the bucket is asked again", file, error)
    try:
        taken = snapshot.take(bucket, address, wanted)
    except UsageError as error:
        if not is_successor:
            raise
        # Files that are open are in the takeover log.
        log.error("the snapshot cannot be taken again: %s", error)
        taken = snapshot.Snapshot(())
    try:
        new = file.with_suffix(".new-snapshot")
        new.touch(mode=0o600)
        new.write_bytes(taken.to_json())
        new.replace(file)
    except OSError as error:
        log.warning("%s cannot be written (%s): a server that follows asks the bucket again", file, error)
    return taken, file


def _tree(names: Source, prefix: str, settings: Settings, records: TakeoverLog, server: int) -> Tree:
    """Return an empty tree, which records what the kernel is told."""
    tree = Tree(
        names,
        prefix,
        settings.metadata_ttl,
        # Nothing follows a server of libfuse.
        records.record if settings.fuse_backend == "native" else lambda *changes: None,
        max_entries=settings.max_entries,
        server=server,
    )
    records.snapshot = tree.snapshot
    return tree


def _restore(tree: Tree, path: Path, bucket: ObjectStore, takeover: Takeover) -> None:
    """Restore what the takeover log holds. A record that is missing costs the file that it is about, not the mount."""
    try:
        found = takeover_log.read(path)
    except OSError as error:
        log.error("%s cannot be read (%s): what is open is lost", path, error)
        return
    is_counted = takeover.is_whole and found.format > 0 and not found.damaged
    lost = found.damaged + tree.restore(found.records, bucket.version, is_counted=is_counted)
    if lost:
        log.error("%d of %d records of %s cannot be read: those files are lost", lost, len(found.records), path)
    if not is_counted:
        log.warning("the names that the kernel knows were not all counted: they are kept until the mount ends")


@contextmanager
def _retried(takeover: Takeover | None) -> Iterator[threading.Event]:
    """End the process at once if a takeover fails before the event is set, and leave everything for the next server."""
    is_serving = threading.Event()
    try:
        yield is_serving
    except Exception:
        if takeover is not None and not is_serving.is_set():
            log.exception("could not take over yet")
            logging.shutdown()
            os._exit(RETRY)
        raise


def _with_control(
    cleanup: ExitStack, calls: MountCalls, stop: Stop, on_ready: Callable[[], None]
) -> Callable[[], None]:
    """Return what is to be called when the directory answers: it opens the control socket before `on_ready`."""
    control = ControlServer(calls.table, stop=stop)
    cleanup.callback(control.close)
    return partial(_open_control, control, calls.mountpoint, on_ready)


def _open_control(control: ControlServer, mountpoint: Path, on_ready: Callable[[], None]) -> None:
    try:
        # Not the mount on top: something else may have been mounted there since.
        entries = [entry for entry in mountinfo.mounts() if entry.mountpoint == mountpoint and entry.is_ours]
        if entries:
            control.open(state.control_path(entries[-1].minor))
    except (OSError, UsageError) as error:
        log.warning("no control socket (%s): this mount is asked through the file system", error)
    on_ready()
