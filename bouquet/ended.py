"""How a command ends when nobody reads its output any more: `bouquet hub status | head -1`. What a terminal has no sign
for ends none: it is shown as ?.

Enters: a command's main(). Leaves: its exit code; 141, as a shell says it of cat, and no traceback where the output's
reader has gone. A connection that broke is another thing, and raised as it was: so SIGPIPE stays ignored, as Python
has it.
"""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Callable


def quietly(main: Callable[[], int | None]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            return main() or 0
        finally:
            if sys.stdout:  # what is still held back is written now, where it can be caught
                sys.stdout.flush()
    except BrokenPipeError:
        if not unread(1):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes once more at its end
        return 141


def unread(descriptor: int) -> bool:
    """Whether this is a pipe that nobody reads from."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
