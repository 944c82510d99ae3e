"""The command ``obsfs``, and ``python -m obsfs``."""

import os
import signal
import sys


def main() -> int:
    """Run the command line; returns the exit status. Ctrl-C while it still imports ends it as a signal does."""
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_default:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from obsfs.cli import main as run

    if is_default:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return run()


if __name__ == "__main__":
    # Nothing is imported from the working directory, which ``python -m`` puts first, unless obsfs lies there.
    if not sys.flags.safe_path and sys.path[0] != os.path.dirname(os.path.dirname(__file__)):  # noqa: PTH120
        del sys.path[0]
    sys.exit(main())
