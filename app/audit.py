"""An audit log: who did what, one line of JSON a deed, each with the SHA-256 of the line before it.

The hub has such a log and so has each site; neither leaves its machine. A line ends with `prev`, the hash of the whole
line before it, so that a line that is changed, taken out, put in or moved breaks the chain there. Whoever may write the
file may write all of it anew, and an end that is cut off leaves a shorter chain that holds: both are found by a head
(the last line's hash) that was kept elsewhere, and by nothing else.

The first line names a log id by chance, and its `prev` is the hash of what the file held before there was a chain. A
kill or a full disk in the middle of a write leaves a piece of a line: the next line follows the last whole one and has
the piece's hash as `torn`, so that the piece stays where it is, is named, and hides nothing.
Enters: a file, a deed. Leaves: the line, on the disk before `append` returns, one process at a time; the file's check.
Errors: OSError, after which the file is what it was.
"""

from __future__ import annotations

import errno
import fcntl
import getpass
import hashlib
import json
import os
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Entry = dict[str, Any]
CHANGED = "it does not follow the line before it: one of the two was changed, or lines between them were taken out"


@dataclass(frozen=True)
class Checked:
    """A log as it was found. head: the last whole line's hash; earlier: lines from before there was a chain.

    entries: the chain's lines, without those that follow on nothing; torn: pieces of lines that a kill left;
    faults: what nobody but a person can have done. Both are sentences.
    """

    log: str
    head: str
    earlier: int
    entries: tuple[Entry, ...]
    torn: tuple[str, ...]
    faults: tuple[str, ...]
    hashes: tuple[str, ...]


def append(file: Path, **deed: Any) -> str:
    """Add a line and return its hash, the log's new head. Errors: OSError."""
    target = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        lock(target)
        with os.fdopen(os.dup(target), "rb") as reader:
            content = reader.read()
        last, after = _last(content)
        start = b"\n" if content and not content.endswith(b"\n") else b""
        lines = []
        if last is None:
            opening = {"did": "began", "log": secrets.token_hex(16), "prev": _hash(content + start)}
            lines.append(_line(opening))
            last = lines[0]
        torn = {"torn": _hash(after + start)} if lines == [] and after else {}
        lines.append(_line({**deed, **torn, "prev": _hash(last)}))
        _write(target, start + b"".join(line + b"\n" for line in lines), len(content))
        return _hash(lines[-1])
    finally:
        os.close(target)


def check(content: bytes) -> Checked:
    """What a log holds, and whether it is as it was written."""
    whole = content.split(b"\n")
    unfinished = whole.pop()
    entries: list[Entry] = []
    torn, faults, hashes = list[str](), list[str](), list[str]()
    log, gap, earlier = "", b"", 0
    for number, line in enumerate(whole, start=1):
        entry = _chained(line)
        if entry is None:
            gap += line + b"\n"
            continue
        if not hashes:
            log, earlier = str(entry.get("log", "")), gap.count(b"\n")
            if not log or entry["prev"] != _hash(gap):
                faults.append(f"line {number}: the log does not begin here: what was before it is gone, or was changed")
        else:
            follows = entry["prev"] == hashes[-1]
            if gap and entry.get("torn") == _hash(gap) and follows:
                torn.append(f"before line {number}: {len(gap)} bytes of a line whose writing was cut off")
            elif gap or "torn" in entry:
                faults.append(f"line {number}: what stands before it is no line of this log, or not what stood there")
            elif not follows:
                faults.append(f"line {number}: {CHANGED}")
        gap = b""
        hashes.append(_hash(line))
        entries.append(entry)
    if gap and hashes:
        torn.append(f"after line {len(whole) - gap.count(chr(10).encode())}: {len(gap)} bytes that are no line of it")
    if unfinished:
        torn.append(f"at the end: {len(unfinished)} bytes of a line whose writing was cut off")
    if content and not hashes:
        faults.append("it has no chain: nothing says that this is what was written")
    return Checked(
        log, hashes[-1] if hashes else "", earlier, tuple(entries), tuple(torn), tuple(faults), tuple(hashes)
    )


def _chained(line: bytes) -> Entry | None:
    """The line of the chain that these bytes are, or None."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("prev"), str) else None


def _last(content: bytes) -> tuple[bytes | None, bytes]:
    """The last whole line of the chain, without its end, and what follows it; None where there is no chain yet."""
    end = content.rfind(b"\n")
    while end >= 0:
        start = content.rfind(b"\n", 0, end) + 1
        if _chained(content[start:end]) is not None:
            return content[start:end], content[end + 1 :]
        end = start - 1
    return None, b""


def _line(entry: Entry) -> bytes:
    """A deed as a line: when, by whom, what; `prev` comes last."""
    return json.dumps({"time": round(time.time(), 3), "by": who(), **entry}, allow_nan=False).encode()


def lock(target: int) -> None:
    """Alone until it is closed, or its process killed. A disk that knows no locks is written all the same: two at once
    would break the chain there, where it is found.
    """
    try:
        fcntl.flock(target, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):
            raise


def _write(target: int, data: bytes, size: int) -> None:
    """All of it on the disk, or nothing."""
    try:
        if os.write(target, data) != len(data):
            raise OSError("the disk took a part of the line alone")
        os.fsync(target)
    except OSError:
        os.ftruncate(target, size)
        raise


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def who() -> str:
    """The system's user on this host; a container's may have no name."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"
