"""Files that are whole or not there: what is written lies beside until it is complete, and then takes the name in one
step.

Enters: a path and its content. Leaves: the file or folder, on the disk before its name is; whatever was there before
is gone only then.
Errors: OSError, and ValueError for what is no JSON; nothing stays beside.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # renameat2(2)


def write(path: Path, content: bytes | str, mode: int | None = None) -> None:
    """Replace a file in one step; of several processes that write it at once, one's is there in the end, whole.

    mode: its permissions; without one, what the umask leaves of 0666.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """The same for JSON, which holds no NaN and no infinity: ValueError."""
    write(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_folder(target: Path, fill: Callable[[Path], None], check: Callable[[Path], None]) -> None:
    """Fill a folder beside, sync it, let `check` look at it, then give it its name; one that was there is exchanged for
    it.
    """
    beside, old = target.with_name(f".{target.name}.tmp"), target.with_name(f".{target.name}.old")
    for left in (beside, old):
        shutil.rmtree(left, ignore_errors=True)
    beside.mkdir(parents=True)
    fill(beside)
    for path in beside.iterdir():
        path.chmod(0o644)  # safetensors writes 0600, which nobody else who shares the volume could read
        with path.open("rb") as file:
            os.fsync(file.fileno())
    check(beside)
    sync(beside)
    if not target.exists():
        beside.replace(target)
    elif exchange(beside, target):
        beside.replace(old)
    else:
        target.replace(old)
        beside.replace(target)
    shutil.rmtree(old, ignore_errors=True)
    sync(target.parent)


def exchange(one: Path, other: Path) -> bool:
    """Let two names change places at once, so that neither is ever missing; False where system or disk cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    if (number := ctypes.get_errno()) in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def sync(folder: Path) -> None:
    """The names in a folder, on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
