"""``python -m heads``, and what the command ``heads`` runs."""

from __future__ import annotations

import os
import signal
import sys


def main() -> int:
    """Entry point: Ctrl-C ends it in one line while it still loads what it needs, too.

    An exception would go through the imports of other packages, some of which make another one
    of it. There is nothing to tidy up yet.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else a shell has it ignored, and so it stays
        signal.signal(signal.SIGINT, _end)
    from featcache.console import run
    from heads.cli import parser

    made = parser()
    signal.signal(signal.SIGINT, before)
    return run(made, None)


def _end(number: int, frame: object) -> None:
    os.write(2, b"heads: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
