"""What a site knows of its files from the last time: a folder of originals is read once, not with every message.

Enters: a file's place, inode, size and times, and what its bytes were found to be: their sha256, or `!` and the reason
why they are set aside. Leaves: the same, as long as nobody has touched the file. In the cache folder lies a list of
hashes, which tells neither names nor pictures, for this user alone. Where the list is damaged or cannot be written,
files are read again.
Errors: none.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

from app import files
from app.metrics import REASONS
from app.site.photos.images import READING

FILE = "seen.json"
LARGEST = 200_000_000  # bytes: a million files and more


class Seen:
    """`folder`: the cache; None remembers nothing."""

    def __init__(self, root: Path, folder: Path | None = None) -> None:
        self.root, self.file = root, folder and folder / FILE
        self.before = _read(self.file) if self.file else {}
        self.now: dict[str, str] = {}
        self.asked: dict[str, str] = {}

    def get(self, name: str) -> str | None:
        """What the file `name` below the root was found to be, if it is as it was then."""
        key = self.asked[name] = self._key(name)
        if (found := self.now.get(key) or self.before.get(key)) is not None:
            self.now[key] = found
        return found

    def put(self, name: str, found: str) -> None:
        """Remember it, unless the file was touched since it was asked for."""
        if (key := self._key(name)) and key == self.asked.get(name):
            self.now[key] = found

    def save(self) -> None:
        """Whole or not at all, and only what was asked for this time."""
        if self.file is None or self.now == self.before:
            return
        with suppress(OSError):  # a cache that is full or closed: the preflight says so
            self.file.parent.mkdir(parents=True, exist_ok=True)
            files.write(self.file, json.dumps(self.now), 0o600)

    def _key(self, name: str) -> str:
        """'' where the file's status cannot be asked."""
        try:
            status = os.stat(self.root / name)
        except (OSError, ValueError):
            return ""
        what = (READING, str(self.root), name, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        return hashlib.sha256(repr(what).encode(errors="surrogateescape")).hexdigest()[:32]


def _read(file: Path) -> dict[str, str]:
    try:
        with file.open("rb") as opened:
            found = json.loads(opened.read(LARGEST))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, str) and _is_known(value)}


def _is_known(value: str) -> bool:
    return value[1:] in REASONS if value.startswith("!") else len(value) == 64 and set(value) <= set("0123456789abcdef")
