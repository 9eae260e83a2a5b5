"""What lies in a site's data folder: the picture files and table rows, with the caption or label each one came with.

Enters: a folder. Leaves: one `Entry` a picture, its bytes not read yet. A folder may hold any mix of
  - `metadata.jsonl` beside its pictures (an imagefolder): {"file_name": "0001.png", "text": "a red poppy"};
  - parquet or arrow files as the hub stores them: an image column (struct of bytes, path) with text, caption or label;
  - bare pictures; the name of the sub-folder is the label, which `caption.txt` can use.
Everything in the folder counts; hidden files do not. Nothing is read through a link that leads out of the folder, and
nothing without a bound: a list 200 MB, its lines a megabyte each and a million, a caption 10,000 characters (a text
encoder sees 77 tokens) and a label 200, and what is longer is cut.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from app.errors import SiteError
from app.images import MAX_BYTES, BadImage, open_inside
from app.tables import MAX_ROWS, TableError, rows
from app.text import printable

PICTURES = {".png", ".jpg", ".jpeg", ".webp"}
OTHER_PICTURES = {".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl"}  # set aside as "format"
MAX_LINE = 1_000_000  # bytes of a list's line
MAX_TEXT = 4_000  # bytes of a text file with one line
MAX_CAPTION, MAX_LABEL = 10_000, 200  # characters; the rest is cut off
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
            yield replace(entry, name=printable(entry.name))


def statuses(root: Path) -> Iterator[tuple[str, os.stat_result | None]]:
    """Name and status of every file and closed folder below `root`, in a stable order; None where it cannot be asked."""
    for name in (name for names in _walk(root) for name in names):
        try:
            yield name, os.stat(root / name)
        except OSError:
            yield name, None


def read_inside(root: Path, name: str, most: int = MAX_BYTES) -> bytes:
    """The bytes of `name` below `root`, at most `most`. Errors: BadImage "outside", "unreadable" or "too-large"."""
    try:
        with open_inside(root, name) as file:
            data = file.read(most + 1) if os.fstat(file.fileno()).st_size <= most else None
    except OSError:
        raise BadImage("unreadable") from None
    if data is None or len(data) > most:
        raise BadImage("too-large")
    return data


def text_inside(root: Path, name: str) -> str | None:
    """A short text file below `root`; None where there is none. Errors: BadImage, UnicodeDecodeError."""
    return read_inside(root, name, MAX_TEXT).decode() if os.path.lexists(root / name) else None


def _walk(root: Path) -> tuple[list[str], list[str]]:
    """Sorted names below `root`, without hidden ones: files, and folders closed to us (links out, no permission)."""
    files: list[str] = []
    closed: list[str] = []
    left = [str(root)]
    while left:  # os.walk calls itself, and a folder may lie a thousand deep
        folder = left.pop()
        try:
            with os.scandir(folder) as found:
                entries = [entry for entry in found if not entry.name.startswith(".")]
        except OSError:
            closed.append(folder)
            continue
        for entry in entries:
            if not _is_folder(entry):
                files.append(entry.path)
            elif not entry.is_symlink():
                left.append(entry.path)
            elif not Path(os.path.realpath(entry.path)).is_relative_to(root):
                closed.append(entry.path)
    return sorted(os.path.relpath(f, root) for f in files), sorted(os.path.relpath(c, root) for c in closed)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _bare(root: Path, name: str) -> Entry:
    label = os.path.basename(os.path.dirname(name)).replace("_", " ")
    return Entry(name, partial(read_inside, root, name), label=_label(label))


def _listed(root: Path, list_name: str) -> Iterator[Entry]:
    """The pictures that one metadata.jsonl names, relative to its own folder."""
    try:
        with open_inside(root, list_name) as file:
            if os.fstat(file.fileno()).st_size > MAX_BYTES:
                raise BadImage("too-large")
            for number, line in enumerate(iter(partial(file.readline, MAX_LINE + 1), b""), start=1):
                if len(line) > MAX_LINE or number > MAX_ROWS:
                    what = f"line {number}: more than {MAX_LINE} bytes, or than {MAX_ROWS} lines"
                    raise _list_error(root / list_name, what)
                for part in line.decode().splitlines():
                    if part.strip():
                        yield _line(root, list_name, part, number)
    except (BadImage, OSError, UnicodeDecodeError) as error:
        raise _list_error(root / list_name, str(error)) from None


def _line(root: Path, list_name: str, line: str, number: int) -> Entry:
    """The picture that one line names. Errors: SITE-06."""
    try:
        row = json.loads(line)
        name = os.path.normpath(os.path.join(os.path.dirname(list_name), row["file_name"]))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _list_error(root / list_name, f"line {number}: {type(error).__name__} {error}"[:500]) from None
    return Entry(name, partial(read_inside, root, name), caption=_text(row))


def _list_error(path: Path, found: str) -> SiteError:
    fix = 'write one object a line, in UTF-8, like {"file_name": "0001.png", "text": "a red poppy"}'
    return SiteError("SITE-06", "The list of captions cannot be read.", found=f"{path}: {found}", fix=fix)


def _text(row: dict[str, Any]) -> str | None:
    """The caption of a row, on one line."""
    text = row.get("text") or row.get("caption")
    return " ".join(_whole(text[:MAX_CAPTION]).split()) or None if isinstance(text, str) else None


def _label(text: str | None) -> str | None:
    return _whole(text[:MAX_LABEL]) or None if text else None


def _whole(text: str) -> str:
    """The text with ? for what no encoding holds: half a character in JSON, a file's name that is no UTF-8."""
    return text.encode(errors="replace").decode()


def _is_table(name: str) -> bool:
    suffix, cached = _suffix(name), os.path.basename(name).startswith("cache-")  # `datasets` leaves these behind
    return suffix == ".parquet" or (suffix == ".arrow" and not cached)


def _table(root: Path, name: str) -> Iterator[Entry]:
    """The rows of one parquet or arrow file."""
    try:
        for row in rows(root, name):
            if row.file:
                place, load = os.path.normpath(row.file), partial(read_inside, root, row.file)
            else:
                place, load = f"{name} {row.place}", row.load
            yield Entry(place, load, _text(row.texts), _label(row.label), LABEL_TEMPLATE)
    except BadImage:
        yield Entry(name, partial(read_inside, root, name))  # its load() says why
    except TableError as error:
        found = f"{root / name}: {error}"
        fix = "store it as the hub does: an image column (struct of bytes and path) with text, caption or label"
        raise SiteError("SITE-07", "The data set's table cannot be read.", found=found, fix=fix) from None
