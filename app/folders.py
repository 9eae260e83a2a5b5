"""What lies in a site's data folder: the picture files and table rows, with the caption or label each one came with.

Enters: a folder. Leaves: one `Entry` a picture, its bytes not read yet. A folder may hold any mix of
  - `metadata.jsonl` beside its pictures (an imagefolder): {"file_name": "0001.png", "text": "a red poppy"};
  - parquet or arrow files as the hub stores them: an image column (struct of bytes, path) with text, caption or label;
  - bare pictures; the name of the sub-folder is the label, which `caption.txt` can use.
Everything in the folder counts; hidden files do not. Nothing is read through a link that leads out of the folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from app.errors import SiteError
from app.images import MAX_BYTES, BadImage
from app.tables import TableError, rows

PICTURES = {".png", ".jpg", ".jpeg", ".webp"}
OTHER_PICTURES = {".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl"}  # set aside as "format"
LABEL_TEMPLATE = "a photo of a {label}"  # for a table that names its classes


@dataclass(frozen=True)
class Entry:
    """One picture, unread. `name` and `caption` are private; `load()` gives the bytes or raises BadImage."""

    name: str
    load: Callable[[], bytes]
    caption: str | None = None
    label: str | None = None
    template: str | None = None  # makes a caption from the label where the site gives no template of its own


def entries(root: Path) -> Iterator[Entry]:
    """Every picture under `root` (a resolved folder), in a stable order. Errors: SITE-06, SITE-07."""
    names, closed = _walk(root)
    seen = set()
    tables = (entry for name in names if _is_table(name) for entry in _table(root, name))
    listed = (entry for name in names if os.path.basename(name) == "metadata.jsonl" for entry in _listed(root, name))
    bare = (_bare(root, name) for name in names if _suffix(name) in PICTURES | OTHER_PICTURES and name not in seen)
    for source in (tables, listed, bare, (_bare(root, name) for name in closed)):
        for entry in source:
            seen.add(entry.name)
            yield entry


def statuses(root: Path) -> Iterator[tuple[str, os.stat_result | None]]:
    """Name and status of every file and closed folder below `root`, in a stable order; None where it cannot be asked."""
    for name in (name for names in _walk(root) for name in names):
        try:
            yield name, os.stat(root / name)
        except OSError:
            yield name, None


def read_inside(root: Path, name: str) -> bytes:
    """The bytes of `name` below `root`. Errors: BadImage "outside", "unreadable" or "too-large"."""
    try:
        path = Path(os.path.realpath(root / name))
        if not path.is_relative_to(root):
            raise BadImage("outside")
        if not path.is_file():
            raise BadImage("unreadable")
        if path.stat().st_size > MAX_BYTES:
            raise BadImage("too-large")
        return path.read_bytes()
    except (OSError, ValueError):  # ValueError: a name with a null byte
        raise BadImage("unreadable") from None


def _walk(root: Path) -> tuple[list[str], list[str]]:
    """Sorted names below `root`, without hidden ones: files, and folders closed to us (links out, no permission)."""
    files: list[str] = []
    closed: list[str] = []
    for folder, subfolders, names in os.walk(root, onerror=lambda error: closed.append(error.filename)):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        files += [os.path.join(folder, name) for name in names if not name.startswith(".")]
        links = [path for name in subfolders if os.path.islink(path := os.path.join(folder, name))]
        closed += [path for path in links if not Path(os.path.realpath(path)).is_relative_to(root)]
    return sorted(os.path.relpath(f, root) for f in files), sorted(os.path.relpath(c, root) for c in closed)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _bare(root: Path, name: str) -> Entry:
    label = os.path.basename(os.path.dirname(name)).replace("_", " ")
    return Entry(name, partial(read_inside, root, name), label=label or None)


def _listed(root: Path, list_name: str) -> Iterator[Entry]:
    """The pictures that one metadata.jsonl names, relative to its own folder."""
    try:
        lines = read_inside(root, list_name).decode().splitlines()
    except (BadImage, UnicodeDecodeError) as error:
        raise _list_error(root / list_name, str(error)) from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name = os.path.normpath(os.path.join(os.path.dirname(list_name), row["file_name"]))
        except (ValueError, TypeError, KeyError) as error:
            raise _list_error(root / list_name, f"line {number}: {type(error).__name__} {error}") from None
        yield Entry(name, partial(read_inside, root, name), caption=_text(row))


def _list_error(path: Path, found: str) -> SiteError:
    fix = 'write one object a line, in UTF-8, like {"file_name": "0001.png", "text": "a red poppy"}'
    return SiteError("SITE-06", "The list of captions cannot be read.", found=f"{path}: {found}", fix=fix)


def _text(row: dict[str, Any]) -> str | None:
    """The caption of a row, on one line."""
    text = row.get("text") or row.get("caption")
    return " ".join(text.split()) or None if isinstance(text, str) else None


def _is_table(name: str) -> bool:
    suffix, cached = _suffix(name), os.path.basename(name).startswith("cache-")  # `datasets` leaves these behind
    return suffix == ".parquet" or (suffix == ".arrow" and not cached)


def _table(root: Path, name: str) -> Iterator[Entry]:
    """The rows of one parquet or arrow file."""
    if not Path(os.path.realpath(root / name)).is_relative_to(root):
        yield Entry(name, partial(read_inside, root, name))  # its load() says "outside"
        return
    try:
        for row in rows(root / name):
            if row.file:
                place, load = os.path.normpath(row.file), partial(read_inside, root, row.file)
            else:
                place, load = f"{name} {row.place}", row.load
            yield Entry(place, load, _text(row.texts), row.label, LABEL_TEMPLATE)
    except TableError as error:
        found = f"{root / name}: {error}"
        fix = "store it as the hub does: an image column (struct of bytes and path) with text, caption or label"
        raise SiteError("SITE-07", "The data set's table cannot be read.", found=found, fix=fix) from None
