"""`python -m llmctl`, and the console script `llmctl`."""

from __future__ import annotations

import contextlib
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line. A Ctrl-C is no traceback, neither while it is imported nor while it leaves for another."""
    try:
        import signal  # noqa: F401  # for `_ignore_interrupts`, which must not be interrupted itself

        from llmctl.cli import main as run

        run()
    except KeyboardInterrupt:
        _ignore_interrupts()
        with contextlib.suppress(OSError, AttributeError):  # closed, or None for `2>&-`
            sys.stderr.write("interrupted\n")
        sys.exit(130)
    except SystemExit as end:
        if end.code == 130:
            _ignore_interrupts()
        raise


def _ignore_interrupts() -> None:
    if signal := sys.modules.get("signal"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)


if __name__ == "__main__":
    main()
