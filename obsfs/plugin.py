"""The public interface for packages that add verbs to the command line.

A verb is a click command. Give it the class :class:`Command` and name it in the entry point group ``obsfs.commands``::

    [project.entry-points."obsfs.commands"]
    hello = "my_package.verbs:hello"

    @click.command(cls=Command)
    @settings_options(*BUCKET_SETTINGS)
    def hello(**given: Any) -> None:
        settings = Settings.load(**given)
        tell(f"hello, {settings.region}")

``trainer`` is built this way: it uses this module and ``obsfs`` itself, and nothing else of the package.

* Output: results go to stdout by :func:`tell`, :func:`tell_json` or :func:`tell_path`. Everything else goes to stderr:
  ``tell(..., err=True)``, :func:`progress`, :func:`spinner`. Ask by :func:`ask` and :func:`confirm`.
* Errors: raise an :class:`ObsfsError`. The command line prints it on one line and exits with status 2.
* Text from outside: :func:`visible` escapes control characters. The functions above do so themselves.
* Optional packages: :func:`remedy` gives the command that installs an extra, :func:`require` raises with it.
* Child processes: :func:`python_command` and :func:`child_environment` start Python without its working directory on
  the import path; :func:`find_program` and :func:`foreign_environment` do so for other programs.
"""

from __future__ import annotations

from obsfs.cli import main
from obsfs.cli.options import BUCKET as BUCKET_SETTINGS
from obsfs.cli.options import CACHE as CACHE_SETTINGS
from obsfs.cli.options import Command, settings_options
from obsfs.cli.output import (
    ask,
    columns,
    confirm,
    count,
    counted,
    escape_markup,
    facts,
    fold,
    human,
    progress,
    spinner,
    tell,
    tell_heading,
    tell_json,
    tell_path,
    terminal_width,
)
from obsfs.errors import (
    ExistsError,
    ForbiddenError,
    NotFoundError,
    ObsfsError,
    UnavailableError,
    UnsupportedError,
    UsageError,
    VersionChangedError,
    first_line,
)
from obsfs.extras import missing, remedy, require
from obsfs.logs import VisibleFormatter
from obsfs.paths import state_dir
from obsfs.processes import child_environment, find_program, foreign_environment, python_command
from obsfs.service.mounts import find_mounts
from obsfs.settings import GivenValue, Settings, knobs
from obsfs.suggestions import did_you_mean
from obsfs.text import to_json, visible

__all__ = [
    "BUCKET_SETTINGS",
    "CACHE_SETTINGS",
    "Command",
    "ExistsError",
    "ForbiddenError",
    "GivenValue",
    "NotFoundError",
    "ObsfsError",
    "Settings",
    "UnavailableError",
    "UnsupportedError",
    "UsageError",
    "VersionChangedError",
    "VisibleFormatter",
    "ask",
    "child_environment",
    "columns",
    "confirm",
    "count",
    "counted",
    "did_you_mean",
    "escape_markup",
    "facts",
    "find_mounts",
    "find_program",
    "first_line",
    "fold",
    "foreign_environment",
    "human",
    "knobs",
    "main",
    "missing",
    "progress",
    "python_command",
    "remedy",
    "require",
    "settings_options",
    "spinner",
    "state_dir",
    "tell",
    "tell_heading",
    "tell_json",
    "tell_path",
    "terminal_width",
    "to_json",
    "visible",
]
