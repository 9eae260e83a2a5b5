"""What lies in a site's data folder: every file of it, as a picture with its caption or with the reason why it is none.

Enters: a folder. Leaves: one `Entry` a picture, its bytes not read yet, and one for every file that is not used. A
folder may hold any mix of
  - parquet or arrow files as Hugging Face stores them: an image column (bytes, or paths) and text or label;
  - lists, caption files and templates (captions.py);
  - pictures: what a file is, its first bytes say, where its name does not end like a picture's or a text's.
A picture's captions are its list's or table's; else its caption file's; else those of a list without known columns;
else its template's, by its label. What is nearer to the picture counts; one list may name it several times, and of
names that mean it the closest ones count. One that a list names, or that has a caption file, never has the template's.
What lies in CLASS is none of the site's pictures (prior.py).
Nothing is read through a link that leads out of the folder. What computers put into folders for themselves is counted.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from app.errors import SiteError
from app.site.photos import captions
from app.site.photos.captions import LABEL_TEMPLATE, MOST, TEMPLATE, Mention, distinct, fill
from app.site.photos.images import FORMATS, OTHER_PICTURES, PICTURES, BadImage, ending, kind, open_inside, read_inside
from app.site.photos.seen import Seen
from app.site.photos.tables import NoPictures, TableError, rows
from app.text import printable

TABLES = {".parquet", ".arrow"}
LISTS = {".jsonl", ".csv", ".tsv", ".txt"}
BESIDE = (".txt", ".caption")  # caption files; of two the first counts
LONGEST = 4096  # characters of a name in a list: Linux opens no longer one
OURS = (".public", "partition.json")  # what privacy.py and bouquet data partition write
CLASS = "class-images"  # pictures for prior preservation
SYSTEM = {
    "@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin", "recycler",
    "lost+found", "system volume information", "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r",
}  # fmt: skip
PASSING = re.compile(  # hidden, an open document's lock, half a copy, a backup copy, two computers' conflict
    r"\.|~\$|.*(~|\.te?mp|\.part|\.partial|\.crdownload|\.download)$|.*(\.sync-conflict-\d{8}-|\(.*conflicted copy)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Entry:
    """One file. `name` and `captions` are private. `load()` gives a picture's bytes or raises BadImage; `file` is where
    they lie, if in a file of their own. With a `reason` it is none, and `load` is not called.
    """

    name: str
    load: Callable[[], bytes] = bytes
    captions: tuple[str, ...] = ()
    file: str = ""
    reason: str = ""


@dataclass
class Found:
    """What a walk comes across, as sorted names below the root; folders that are closed lead out or let nobody in."""

    files: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    system: list[str] = field(default_factory=list)


def entries(root: Path, template: str | None = None, seen: Seen | None = None) -> Iterator[Entry]:
    """Every file under `root` (a resolved folder), in a stable order; `template` in place of every caption.txt.

    Errors: SITE-05, SITE-06, SITE-07.
    """
    for entry in _Folder(root, template, seen or Seen(root)).entries():
        yield replace(entry, name=printable(entry.name))


def statuses(root: Path) -> Iterator[tuple[str, os.stat_result | None]]:
    """Name and status of every file and folder not entered, in a stable order; None where it cannot be asked."""
    found = _walk(root)
    for name in (*found.files, *found.closed, *found.system):
        try:
            yield name, os.stat(root / name)
        except OSError:
            yield name, None


class _Folder:
    """A data folder's files by what they are used for; what is left over is counted."""

    def __init__(self, root: Path, template: str | None, seen: Seen) -> None:
        self.root, self.seen, self.found = root, seen, _walk(root)
        self.left = dict.fromkeys(name for name in self.found.files if name not in OURS)  # without a use so far
        self.names = _Names(root, self.left)
        self.templates = {} if template is None else {"": template}
        for name in [name for name in self.left if os.path.basename(name).lower() == TEMPLATE]:
            del self.left[name]
            if template is None:
                self.templates[os.path.dirname(name)] = captions.read_template(root, name)
        self.why: dict[str, str] = {}  # of files that are none of pictures
        self.tables = self._take(lambda name: ending(name) in TABLES)
        self.pictures = dict.fromkeys(name for name in self.left if self._is_picture(name))
        self.beside = self._beside()
        self.captioned = {os.path.dirname(name) for name in self.beside}  # folders with caption files
        self.lists = self._take(lambda name: ending(name) in LISTS and name not in self.beside)
        # by file: how much the list counts, its name, what it says
        self.said: dict[str, tuple[tuple[bool, int], str, Mention]] = {}
        self.closest: dict[str, int] = {}  # by file: how far off the closest name is that this list has for it
        self.later: list[tuple[str, int, Mention]] = []  # what this list says by names that may be of other files

    def entries(self) -> Iterator[Entry]:
        for name in self.tables:
            yield from self._table(name)
            yield from self._less_close(name)
        for name in self.lists:
            yield from self._list(name)
            yield from self._less_close(name)
        for name, (_, _, mention) in self.said.items():
            self.left.pop(name, None)
            made = fill(self._template(name) or LABEL_TEMPLATE, mention.label) if mention.label else None
            if mention.guessed and mention.captions and self.beside.get(name):
                yield Entry(name, reason="unused-caption")
            yield from self._picture(name, mention.captions or _one(made), named=not mention.guessed)
        for name in [name for name in self.pictures if name not in self.said]:
            self.left.pop(name, None)
            yield from self._picture(name, _one(fill(self._template(name), captions.folder_label(name))))
        for name in self.left:
            yield Entry(name, reason=self.why.get(name) or self._why_not(name))
        for name in self.found.closed:
            yield Entry(name, partial(read_inside, self.root, name))
        for name in self.found.system:
            yield Entry(name, reason="system")

    def _take(self, wanted: Callable[[str], bool]) -> list[str]:
        taken = [name for name in self.left if wanted(name)]
        for name in taken:
            del self.left[name]
        return taken

    # --- pictures -----------------------------------------------------------------------------------------------------

    def _is_picture(self, name: str) -> bool:
        """By its name, or by its first bytes; those of texts are not asked."""
        if (suffix := ending(name)) in PICTURES | OTHER_PICTURES:
            return True
        if suffix in LISTS or suffix in BESIDE:
            return False
        reason = self.seen.get(name) or self._first_bytes(name)
        if reason.startswith("!") and reason[1:] in ("not-a-picture", "empty", "outside", "unreadable"):
            self.why[name] = "not-a-picture" if reason == "!empty" else reason[1:]
            return False
        return True

    def _first_bytes(self, name: str) -> str:
        """'' of a picture, else ! and the reason."""
        try:
            with open_inside(self.root, name) as file:
                found = kind(file.read(16))
        except OSError:
            return "!unreadable"
        except BadImage as bad:
            return f"!{bad.reason}"
        if found in FORMATS:
            return ""
        self.seen.put(name, f"!{found}")
        return f"!{found}"

    def _picture(self, name: str, said: tuple[str, ...], named: bool = False) -> Iterator[Entry]:
        """A picture by what lists say, by its caption file, or by the captions given."""
        load = partial(read_inside, self.root, name)
        first, *others = self.beside.get(name, ()) or ("",)
        for other in others:
            if self.left.pop(other, "used") is None:
                yield Entry(other, reason="unused-caption")
        if first and (not named or not said):
            self.left.pop(first, None)
            try:
                caption, more = captions.read_file(self.root, first)
            except BadImage as bad:
                yield Entry(name, reason=bad.reason)
                return
            said = _one(caption)
            if more:
                yield Entry(first, reason="unused-caption")
        elif first and self.left.pop(first, "used") is None:
            yield Entry(first, reason="unused-caption")
        yield from _with(Entry(name, load, said, name))

    def _template(self, name: str) -> str | None:
        """The nearest one, from the picture's folder upwards."""
        while name:
            name = os.path.dirname(name)
            if name in self.templates:
                return self.templates[name]
        return None

    # --- captions -----------------------------------------------------------------------------------------------------

    def _beside(self) -> dict[str, list[str]]:
        """Caption files by picture, and every caption file of a picture by its own name."""
        stems: dict[str, list[str]] = {}
        for name in self.pictures:
            for stem in {os.path.splitext(name)[0], name}:
                stems.setdefault(_loose(stem), []).append(name)
        beside: dict[str, list[str]] = {}
        for suffix in BESIDE:
            for name in [name for name in self.left if ending(name) == suffix]:
                stem = os.path.splitext(name)[0]
                near = stems.get(_loose(stem), ())
                for picture in [p for p in near if stem in (p, os.path.splitext(p)[0])] or near:
                    beside.setdefault(picture, []).append(name)
                    beside.setdefault(name, [])
        return beside

    def _list(self, name: str) -> Iterator[Entry]:
        try:
            for mention in captions.read_list(self.root, name, partial(self._pictured, os.path.dirname(name))):
                yield from self._mention(name, mention)
        except captions.NoList as no:
            yield Entry(name, reason=self._why_not(name) if no.reason == "not-a-picture" else no.reason)

    def _pictured(self, folder: str, name: str) -> str | None:
        file, _ = self.names.find(folder, name[:LONGEST])
        return file if file in self.pictures else None

    def _mention(self, name: str, mention: Mention) -> Iterator[Entry]:
        """Take down what a list or table says of a picture; what it says in vain is counted."""
        folder, called = os.path.dirname(name), mention.file[:LONGEST]
        file, off = self.names.find(folder, called)
        if file is None:
            yield self._absent(folder, called)
            return
        self.closest[file] = min(off, self.closest.get(file, off))
        if off:
            self.later.append((file, off, mention))
        else:
            yield from self._said(name, file, mention)

    def _less_close(self, name: str) -> Iterator[Entry]:
        """At a list's end, what it said by loose names: of files that none of its names is closer to."""
        for file, off, mention in self.later:
            if off == self.closest[file]:
                yield from self._said(name, file, mention)
            else:
                yield self._absent(os.path.dirname(name), mention.file[:LONGEST])
        self.closest, self.later = {}, []

    def _said(self, name: str, file: str, mention: Mention) -> Iterator[Entry]:
        folder, known = os.path.dirname(name), self.said.get(file)
        counts = not mention.guessed, 1 + len(Path(folder).parts) if _is_below(file, folder) else 0
        if known is not None and known[1] == name:
            before = known[2]
            mention = replace(before, captions=distinct((*before.captions, *mention.captions)))
        elif known is not None:
            yield Entry(file, reason="unused-caption")
        if known is None or known[1] == name or counts > known[0]:
            self.said[file] = counts, name, mention

    def _absent(self, folder: str, name: str) -> Entry:
        """A name in a list that is no file's: absent, or something that is not read."""
        if re.match(r"[a-zA-Z][\w+.-]+:", name):
            return Entry(name[:300], reason="address")
        place = os.path.normpath(os.path.join(folder, name))[:300]
        try:
            if os.path.lexists(self.root / place) or not _is_below(os.path.normpath(self.root / place), str(self.root)):
                return Entry(place, partial(read_inside, self.root, place))
        except ValueError:  # a null byte
            return Entry(place, reason="unreadable")
        return Entry(place, reason="absent")

    def _table(self, name: str) -> Iterator[Entry]:
        """The rows of one parquet or arrow file."""
        if os.path.basename(name).startswith("cache-") and ending(name) == ".arrow":  # `datasets` leaves these behind
            yield Entry(name, reason="system")
            return
        try:
            for row in rows(self.root, name):
                if row.file:
                    yield from self._mention(name, Mention(row.file, row.captions, row.label))
                    continue
                template = self._template(name) or (LABEL_TEMPLATE if row.label else None)
                made = None if row.worded and not row.label else fill(template, row.label)
                yield from _with(Entry(f"{name} {row.place}", row.load, row.captions or _one(made)))
        except BadImage:
            yield Entry(name, partial(read_inside, self.root, name))  # its load() says why
        except NoPictures as why:
            yield Entry(f"{name} ({why})", reason="not-a-picture")
        except TableError as error:
            what = "Git LFS's pointer to the file: git lfs pull" if self._first_bytes(name) == "!pointer" else error
            found = f"{self.root / name}: {what}"
            fix = "store it as the hub does: an image column (struct of bytes and path) with text, caption or label"
            raise SiteError("SITE-07", found=found, fix=fix) from None

    def _why_not(self, name: str) -> str:
        """Of a text: a caption file without a picture, where others lie; else what it is not."""
        lost = ending(name) in BESIDE and os.path.dirname(name) in self.captioned
        return "unused-caption" if lost else "not-a-picture"


def _one(caption: str | None) -> tuple[str, ...]:
    return (caption,) if caption else ()


def _with(entry: Entry) -> Iterator[Entry]:
    """A picture with as many captions as count, and the note that it had more."""
    yield replace(entry, captions=entry.captions[:MOST])
    if len(entry.captions) > MOST:
        yield Entry(entry.name, reason="unused-caption")


class _Names:
    """Files by their names, and by what people and other systems make of these: backslashes, case, composed and
    decomposed letters; a picture's without its ending, or with the one that it had in another format.
    """

    def __init__(self, root: Path, files: dict[str, None]) -> None:
        self.root, self.exact = f"{root}/", set(files)
        self.loose, self.stems = dict[str, str | None](), dict[str, str | None]()
        for name in files:
            _file(self.loose, _loose(name), name)
            if ending(name) in PICTURES:
                _file(self.stems, _stem(name), name)

    def find(self, folder: str, name: str) -> tuple[str | None, int]:
        """(the file that a list in `folder` calls so, from there or from the root; how far off the name is: 0 is exact,
        1 in other letters, 2 without its ending or with another).
        """
        if not name or "\0" in name:
            return None, 0
        name = name.removeprefix(self.root)
        spelled = [os.path.join(above, one) for one in (name, name.replace("\\", "/")) for above in (folder, "")]
        spelled = list(map(os.path.normpath, spelled))
        if exact := next((place for place in spelled if place in self.exact), None):
            return exact, 0
        for place in spelled[2:]:
            if found := self.loose.get(_loose(place)):
                return found, 1
            if found := self.stems.get(_stem(place)):
                return found, 2
        return None, 0


def _file(names: dict[str, str | None], key: str, name: str) -> None:
    names[key] = None if key in names else name  # two that differ in this alone are not taken for each other


def _stem(name: str) -> str:
    """The name without a picture's ending, loosely."""
    return _loose(os.path.splitext(name)[0] if ending(name) in PICTURES | OTHER_PICTURES else name)


def _loose(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _is_below(name: str, folder: str) -> bool:
    return not folder or name.startswith(folder.rstrip("/") + "/")


def _walk(root: Path) -> Found:
    found = Found()
    left = [str(root)]
    while left:  # os.walk calls itself, and a folder may lie a thousand deep
        folder = left.pop()
        try:
            with os.scandir(folder) as listed:
                inside = list(listed)
        except OSError:
            found.closed.append(folder)
            continue
        for entry in inside:
            if folder == str(root) and entry.name in (*OURS, CLASS):
                continue
            if entry.name.lower() in SYSTEM or PASSING.match(entry.name):
                found.system.append(entry.path)
            elif not _is_folder(entry):
                found.files.append(entry.path)
            elif not entry.is_symlink():
                left.append(entry.path)
            elif not Path(os.path.realpath(entry.path)).is_relative_to(root):
                found.closed.append(entry.path)
    names = ([os.path.relpath(path, root) for path in paths] for paths in (found.files, found.closed, found.system))
    return Found(*map(sorted, names))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False
