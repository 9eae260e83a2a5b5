"""Text that somebody else wrote, made fit to be shown: a site's to the hub, the hub's to a site, a file's name to both.

A terminal obeys control characters (title, clipboard, cleared screen), a reader believes a line that looks like ours,
and both are misled by characters that turn the direction of writing or take no room. So such text is one line, of
bounded length, and every character that is not printed (Unicode's categories Cc, Cf, Cs, Co, Cn, Zl, Zp) becomes �,
which shows that something was there.
Enters: any text, any JSON value. Leaves: the same, harmless. Errors: none.
"""

from __future__ import annotations

import logging
from typing import Any

MOST = 300  # characters of a line
LONGEST = 10_000  # characters of several lines, of a text in a JSON file
LARGEST = 1e12  # of a number that is shown: a float may be infinite, and no page has room for 300 digits
MARK = "\ufffd"


def printable(text: str) -> str:
    """The text with a space for every kind of white space, and � for every other character that cannot be printed."""
    return text if text.isprintable() else "".join(c if c.isprintable() else " " if c.isspace() else MARK for c in text)


def line(text: object, most: int = MOST) -> str:
    """One line of at most `most` characters; white space at either end goes, and in between it is one space."""
    return printable(" ".join(str(text)[: 4 * most].split())[:most])


def block(text: object, indent: int) -> str:
    """Several lines, each but the first indented, so that none can pass for another message's."""
    return ("\n" + " " * indent).join(printable(part) for part in str(text)[:LONGEST].split("\n"))


def tidy(value: Any, most: int = LONGEST) -> Any:
    """A JSON value that somebody else had a hand in: each text printable and at most `most` long, each number one to
    show.
    """
    match value:
        case str():
            return printable(value[:most])
        case float():
            return min(max(value, -LARGEST), LARGEST) if value == value else LARGEST
        case int() if not -(2**64) < value < 2**64:  # a seed has up to 63 bits
            return int(LARGEST)
        case dict():
            return {printable(str(key)[:MOST]): tidy(held, most) for key, held in value.items()}
        case list():
            return [tidy(held, most) for held in value]
    return value


class _Tidy(logging.Filter):
    """Makes a log's records harmless; its own colours are added later."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = block(record.getMessage(), indent=4), ()
        record.__dict__.pop("color_message", None)  # uvicorn's second wording of the same
        if record.exc_info and not record.exc_text:
            record.exc_text = block(logging.Formatter().formatException(record.exc_info), indent=2)
        return True


_filter = _Tidy()  # one, so that a logger has it once


def tidy_log(*names: str) -> None:
    """From now on no record of these loggers holds what a terminal obeys."""
    for name in names:
        logging.getLogger(name).addFilter(_filter)
