"""The command line: one file per verb.

Other packages add verbs by the entry point group ``obsfs.commands``; see :mod:`obsfs.plugin`.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import signal
import traceback
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from obsfs import processes
from obsfs.cli.options import Command, Context
from obsfs.cli.output import drop_output, open_streams, tell, terminate_like_interrupt, tolerate_any_text
from obsfs.errors import ObsfsError, SettingWarning, UsageError, WaitWarning
from obsfs.logs import VisibleFormatter
from obsfs.ours import check_ours
from obsfs.settings import warn_of_variables
from obsfs.suggestions import did_you_mean
from obsfs.text import visible
from obsfs.version import __version__

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

_VERBS = {
    "mount": "mount",
    "umount": "umount",
    "status": "status",
    "refresh": "refresh",
    "upgrade": "upgrade",
    "models": "models",
    "push": "push",
    "pull": "pull",
    "import": "import_",
    "verify": "verify",
    "warm": "warm",
    "unpin": "warm",
    "cache": "cache",
    "bench": "bench",
    "demo": "demo",
}
"""Our verbs, each with its module."""


def _further() -> dict[str, EntryPoint]:
    """Return the entry points of other packages' verbs, by the names of the verbs."""
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group="obsfs.commands")}


def _summary(verb: click.Command) -> str:
    return verb.short_help or " ".join((verb.help or "").split()).partition(". ")[0].rstrip(".")


class Group(click.Group):
    """A group of verbs. It suggests the nearest name for an unknown verb, and never shortens a summary."""

    command_class = Command
    context_class = Context

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one entry per verb: its `short_help`, or the first sentence of its help."""
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, _summary(verb)) for name, verb in found if verb and not verb.hidden])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        verb = args[0]
        known = self.list_commands(ctx)
        if not verb.startswith("-") and verb not in known and self.get_command(ctx, verb) is None:
            hint = did_you_mean(verb, known)
            raise click.UsageError(f"No such command '{visible(verb)}'{hint and f': {hint}'}", ctx)
        return super().resolve_command(ctx, args)


class _Verbs(Group):
    """Imports the module of a verb only when it is used, so that ``obsfs umount`` imports no S3 client."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # mount(8) runs the program that /etc/fstab names as `obsfs SOURCE DIRECTORY -o OPTIONS`.
        if args and "://" in args[0]:
            args = ["mount", *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*_VERBS, *sorted(_further())]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _VERBS:
            module = import_module(f"obsfs.cli.{_VERBS[cmd_name]}")
            found = getattr(module, "import_" if cmd_name == "import" else cmd_name)
        else:
            point = _further().get(cmd_name)
            if point is None:
                return None
            try:
                if point.module.partition(".")[0] == "trainer":
                    check_ours("trainer")
                found = point.load()
            except UsageError as error:
                return _broken(cmd_name, error.message, error.remedy)
            except ImportError as error:
                return _broken(cmd_name, f"{point.value} cannot be loaded ({error})")
        return found if isinstance(found, click.Command) else None


def _broken(name: str, reason: str, remedy: str = "see to the package that has it") -> click.Command:
    """Return a verb that reports why another package's verb cannot be loaded, so that the other verbs work."""

    def refuse(**_: object) -> None:
        raise UsageError(f"obsfs {name}: {reason}", remedy)

    anything = click.Argument(["words"], nargs=-1, type=click.UNPROCESSED)
    settings = {"ignore_unknown_options": True}
    return click.Command(name, context_settings=settings, callback=refuse, params=[anything], short_help=reason)


_EPILOG = """\b
Examples:
  obsfs mount obs://models /mnt/models --region cn-south-1
  obsfs status
  obsfs pull obs://models/Qwen2-7B-Instruct ./qwen
"""


@click.group(
    cls=_Verbs, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="obsfs")
def obsfs() -> None:
    """Mount a bucket of models as a directory: lazy, parallel, cached on the local SSD."""
    warn_of_variables()  # also for verbs that read no settings


class _Warnings:
    """Prints each warning of obsfs once, on one line. Warnings of libraries are not shown."""

    def __init__(self) -> None:
        self._told = set[str]()

    def __call__(self, message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        """Show a warning, in place of ``warnings.showwarning``."""
        if issubclass(category, SettingWarning | WaitWarning) and str(message) not in self._told:
            self._told.add(str(message))
            tell(f"obsfs: warning: {message}", err=True)


_REMEDIES = {
    errno.ENOTCONN: "the mount there is dead: mount it again, or `obsfs umount` it",
    errno.EACCES: "you may not: use a path of your own",
    errno.EPERM: "you may not: use a path of your own",
    errno.ENOSPC: "make room on that disk",
    errno.EROFS: "choose a place that can be written to",
    errno.ESTALE: "the object was replaced: try again",
}


def _missing(error: ModuleNotFoundError) -> str:
    """Return the missing package that a module needs; empty if it is one of ours."""
    package = str(error.name or "").partition(".")[0]
    return "" if package in ("obsfs", "trainer") else package


def _refused_by_system(error: OSError) -> str:
    """Return what the system refused, on which file, and what to do; empty without a file: that is our mistake."""
    if error.filename is None and error.errno != errno.ENOTCONN:
        return ""
    name = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    reason = error.strerror or type(error).__name__
    remedy = _REMEDIES.get(error.errno or 0, "check that path")
    return f"{name}{reason}: {remedy}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 1 where a verb says so, and after an internal error; 2 after a mistake of the user, which is reported on one
        line; 130 after Ctrl-C or SIGTERM; 141 if nobody reads the output, as for a program that SIGPIPE ends.
    """
    processes.secure_import_path()
    open_streams()
    tolerate_any_text()
    for ours in (SettingWarning, WaitWarning):
        warnings.simplefilter("always", ours)
    shown = warnings.showwarning
    warnings.showwarning = _Warnings()
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(VisibleFormatter("obsfs: %(message)s"))
    try:
        with terminate_like_interrupt():
            check_ours()
            status = obsfs.main(arguments, prog_name="obsfs", standalone_mode=False)
            return status if isinstance(status, int) else 0
    except BaseException as error:
        try:
            return _tell(error)
        except OSError as lost:
            return _tell(lost)
    finally:
        warnings.showwarning = shown
        gc.freeze()  # a last garbage collection would take 0.1 s


_PIPE = 128 + signal.SIGPIPE


def _status_unread(error: BaseException) -> int:
    """Return the exit status when nobody reads the output: that of an interrupt, if there was one before."""
    before: BaseException | None = error
    while before is not None and not isinstance(before, KeyboardInterrupt):
        before = before.__context__
    return _PIPE if before is None else 130


def _tell(error: BaseException) -> int:
    """Print on one line what ended a command, and return the exit status."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.ctx.get_help() if error.ctx else "")  # of our own text
        return 2
    if isinstance(error, click.NoSuchOption):
        hint = did_you_mean(error.option_name, error.possibilities or ())
        path = error.ctx.command_path if error.ctx else "obsfs"
        tell(f"obsfs: No such option '{error.option_name}'{hint and f': {hint}'} (see `{path} --help`)", err=True)
        return 2
    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        hint = f" (see `{context.command_path} --help`)" if context else ""
        tell(f"obsfs: {error.format_message().rstrip('.')}{hint}", err=True)
        return 2
    if isinstance(error, ObsfsError):
        tell(f"obsfs: {error}", err=True)
        return 2
    if isinstance(error, click.Abort | KeyboardInterrupt):
        tell("obsfs: interrupted", err=True)
        return 130
    passed = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, SystemExit):
        if passed[-1] is not click.Command.main.__code__:  # where click leaves when nobody reads
            raise error
        drop_output()
        return _status_unread(error)
    if isinstance(error, OSError) and click.echo.__code__ in passed:
        drop_output()
        if isinstance(error, BrokenPipeError):
            return _status_unread(error)
        tell(f"obsfs: cannot print what was asked ({error.strerror}): make room, or print it elsewhere", err=True)
        return 2
    if os.environ.get("OBSFS_DEBUG"):
        traceback.print_exception(error)
    if isinstance(error, ModuleNotFoundError) and (missing := _missing(error)):
        tell(f"obsfs: the Python package {missing!r} is missing: in a clone of obsfs: pip install .", err=True)
        return 2
    if isinstance(error, OSError) and (said := _refused_by_system(error)):
        tell(f"obsfs: {said}", err=True)
        return 2
    shown = f"{type(error).__name__}: {error}"
    tell(f"obsfs: internal error: {shown} (OBSFS_DEBUG=1 shows where; please report it)", err=True)
    return 1
