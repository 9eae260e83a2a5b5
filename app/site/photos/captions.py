"""The words that came with pictures, whatever program wrote them: lists, caption files, templates, labels.

Enters: text files of a data folder. Leaves: captions of one line and `Mention`s, what a list says of one picture: it
may have several captions, in one row (a list of texts) or in several.
  - A list is a .jsonl, .csv, .tsv or .txt with a picture's name and its caption a line; `metadata.jsonl` and
    `metadata.csv` must be one, another file is one by its columns. One without known columns is one where most of its
    first lines begin with a picture's name; it is a guess, and caption files come before it.
  - A caption file is `0001.txt` or `0001.caption` beside `0001.jpg`; its first line that says something counts.
    Trainers differ: some draw one of its lines, kohya's reads the first, others join them; and a text that an editor
    has wrapped has half a sentence in each.
  - A template is `caption.txt`, one line for all pictures below it, in which {label} is a class's or a folder's name.
Text is UTF-8, with or without a byte order mark, or Windows' 16-bit form of it with one; a line ends at a line feed and
nowhere else. Nothing is read without a bound: a list 200 MB, its lines a megabyte each and a million, a caption 10,000
characters (a text encoder sees 77 tokens), 16 of them a picture, and a label 200; what is longer is cut.
Errors: SITE-05 (a template), SITE-06 (a list); BadImage "caption-unreadable".
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from app.errors import SiteError
from app.metrics import REASONS
from app.site.photos.images import MAX_BYTES, PICTURES, BadImage, ending, open_inside, read_inside

MAX_ROWS = 1_000_000  # of any file or list
MAX_LINE = 1_000_000  # bytes of a list's line
MAX_TEMPLATE, MAX_FILE = 4_000, 100_000  # bytes of caption.txt, and of a caption file
MAX_CAPTION, MAX_LABEL = 10_000, 200  # characters; the rest is cut off
MOST = 16  # captions of one picture; each is encoded
FIRST = 100  # lines that are not empty, of which most name a picture in a list without known columns
NAMES = ("file_name", "filename", "file", "image", "image_path", "path")  # columns that name a picture, and
TEXTS = ("text", "caption", "prompt")  # its caption; of several the first that is there
WORDS = {*TEXTS, "label"}
FLICKR30K = ["image_name", "comment_number", "comment"]  # the head of its results.csv
MUST = ("metadata.jsonl", "metadata.csv")  # lists by their names alone, as `datasets` has them
TEMPLATE = "caption.txt"
LABEL_TEMPLATE = "a photo of a {label}"  # for a table or list that names its classes
SPLITS = {  # folders whose names are no labels
    "train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval", "data", "dataset", "image",
    "images", "img", "imgs", "photo", "photos", "picture", "pictures", "raw", "original", "originals", "jpg", "jpeg",
    "png", "webp", "dcim",
}  # fmt: skip
CAMERA = re.compile(r"[1-9]\d\d[A-Z0-9_]{5}")  # a camera's own folders, below DCIM: 100CANON
REPEATS = re.compile(r"^\d{1,4}_(?=\D)")  # kohya's "10_zwx flower": ten times an epoch there, once here


@dataclass(frozen=True)
class Mention:
    """What a list or table says of the picture `file`, as it writes that; of more captions than MOST, one more."""

    file: str
    captions: tuple[str, ...] = ()
    label: str | None = None
    guessed: bool = False  # the list has no known columns


Lines = Iterable[tuple[int, str]]  # numbered, without their ends
There = Callable[[str], str | None]  # the picture's file that a list means by a name, if any


class NoList(Exception):
    """The file is no list of captions; `str()` is private, `reason` says what it counts as."""

    def __init__(self, found: str, reason: str = "not-a-picture") -> None:
        super().__init__(found)
        self.reason = reason


class _Unreadable(Exception):
    """What a list holds cannot be read; `str()` is private."""


class _Damaged(_Unreadable):
    """A file that is surely a list has a row that cannot be read."""


# --- text -------------------------------------------------------------------------------------------------------------


def one_line(value: object) -> str | None:
    """A caption: text or a number, on one line; None where it says nothing."""
    if type(value) is int and abs(value) < 10**18:
        value = str(value)
    return " ".join(_whole(value[:MAX_CAPTION]).split()) or None if isinstance(value, str) else None


def several(value: object) -> tuple[str, ...]:
    """The captions of one picture, or a list of them, none twice; of more than MOST, one more."""
    return distinct(filter(None, map(one_line, value if isinstance(value, list) else [value])))


def distinct(texts: Iterable[str]) -> tuple[str, ...]:
    """As `several`, of captions of one line."""
    found: dict[str, None] = {}
    for text in texts:
        found[text] = None
        if len(found) > MOST:
            break
    return tuple(found)


def label(value: object) -> str | None:
    """A class's name as words."""
    return _whole(value[:MAX_LABEL]).replace("_", " ").strip() or None if isinstance(value, str) else None


def folder_label(name: str) -> str | None:
    """The label of a picture by the folder that it lies in; names of splits and a camera's are none, and the data
    folder has none.
    """
    for folder in reversed(Path(os.path.dirname(name)).parts):
        if folder.lower() not in SPLITS and not CAMERA.fullmatch(folder):
            return label(REPEATS.sub("", folder))
    return None


def _whole(text: str) -> str:
    """The text with ? for what no encoding holds: half a character in JSON, a file's name that is no UTF-8."""
    return text.encode(errors="replace").decode()


def _decoded(data: bytes) -> str:
    """Errors: UnicodeDecodeError."""
    return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")


def _why(error: Exception) -> str:
    """For the site's own eyes; of a link that leads out, what to do about it."""
    if not isinstance(error, BadImage):
        return str(error)
    more = "; copy the folder with what its links lead to: cp -rL" if error.reason == "outside" else ""
    return REASONS[error.reason] + more


# --- templates --------------------------------------------------------------------------------------------------------


def read_template(root: Path, name: str) -> str:
    """The line in a caption.txt. Errors: SITE-05."""
    try:
        lines = [line for line in _decoded(read_inside(root, name, MAX_TEMPLATE)).split("\n") if line.strip()]
    except (BadImage, UnicodeDecodeError) as error:
        raise _template_error(f"{root / name}: {_why(error)}") from None
    if len(lines) > 1:
        what = f"{len(lines)} lines; captions of single pictures belong into a list, or into files of their own"
        raise _template_error(f"{root / name}: {what}")
    return checked_template(" ".join(lines), f"{root / name}: ")


def checked_template(text: str, where: str = "") -> str:
    """A caption template on one line. Errors: SITE-05 when it is empty or has a placeholder other than {label}."""
    template = " ".join(text.split())
    unknown = sorted(set(re.findall(r"{(.*?)}", template)) - {"label"})
    if not template or unknown:
        raise _template_error(where + (f"the placeholder {{{unknown[0]}}}" if unknown else "an empty template"))
    return template


def fill(template: str | None, label: str | None) -> str | None:
    """The caption of a photo that came without; None when there is no template, or no label for it."""
    if template is None or ("{label}" in template and label is None):
        return None
    return template.replace("{label}", label or "")


def _template_error(found: str) -> SiteError:
    fix = "write one line, in UTF-8, where {label} stands for the class or sub-folder name: a photo of a {label}"
    return SiteError("SITE-05", found=found, fix=fix)


# --- caption files ----------------------------------------------------------------------------------------------------


def read_file(root: Path, name: str) -> tuple[str | None, bool]:
    """(the caption in a caption file, whether more lines follow it). Errors: BadImage "caption-unreadable"."""
    try:
        lines = list(filter(None, map(one_line, _decoded(read_inside(root, name, MAX_FILE)).split("\n"))))
    except (BadImage, UnicodeDecodeError):
        raise BadImage("caption-unreadable") from None
    return (lines[0] if lines else None), len(lines) > 1


# --- lists ------------------------------------------------------------------------------------------------------------


def read_list(root: Path, name: str, there: There) -> Iterator[Mention]:
    """What a list says, a picture at a time. Errors: NoList, SITE-06."""
    must, known = os.path.basename(name).lower() in MUST, False
    try:
        with open_inside(root, name) as file:
            if os.fstat(file.fileno()).st_size > MAX_BYTES:
                raise _Unreadable(f"more than {MAX_BYTES // 10**6} MB")
            for mention in (_objects if name.lower().endswith(".jsonl") else _columns)(_lines(file), there, must):
                known = True
                yield mention
    except (BadImage, OSError, _Unreadable) as error:
        if not must and not known and not isinstance(error, _Damaged):
            raise NoList(str(error), error.reason if isinstance(error, BadImage) else "caption-unreadable") from None
        raise _list_error(f"{root / name}: {_why(error)}") from None


def _lines(file: io.BufferedReader) -> Iterator[tuple[int, str]]:
    """Numbered lines without their ends. Errors: _Unreadable."""
    wide = file.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff")
    lines: Any = io.TextIOWrapper(file, encoding="utf-16", newline="\n") if wide else file
    try:
        for number in range(1, MAX_ROWS + 2):
            try:
                line = lines.readline(MAX_LINE + 1)
                text = line if wide else line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _Unreadable(f"line {number} is no UTF-8: {error.reason}; save the file as UTF-8") from None
            if not line:
                return
            if len(line) > MAX_LINE or number > MAX_ROWS:
                raise _Unreadable(f"line {number}: more than {MAX_LINE} bytes, or than {MAX_ROWS} lines")
            yield number, text.rstrip("\r\n")
    finally:
        if wide:
            lines.detach()  # who opened the file closes it


def _objects(lines: Lines, there: There, must: bool) -> Iterator[Mention]:
    """One JSON object a line."""
    known = must
    for number, line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line, strict=False)
            name = next((row[key] for key in NAMES if key in row), None)
            if not isinstance(name, str):
                raise ValueError(f"no file_name among {', '.join(map(str, row))}"[:300])
        except (ValueError, TypeError, RecursionError) as error:
            raise (_Unreadable if known else NoList)(f"line {number}: {type(error).__name__} {error}"[:500]) from None
        if not known and not any(key in row for key in (*TEXTS, "label")):
            raise NoList(f"line {number}: no caption among {', '.join(map(str, row))}"[:300])
        known = True
        texts = (several(row[key]) for key in TEXTS if key in row)
        yield Mention(name, next(filter(None, texts), ()), label(row.get("label")))


def _columns(lines: Iterator[tuple[int, str]], there: There, must: bool) -> Iterator[Mention]:
    """Columns with a head, or a name and a caption a line."""
    first = list(islice(((number, line) for number, line in lines if line.strip()), FIRST))
    head = first[0][1] if first else ""
    for separator in ",;\t|":
        titles = _titles(head, separator)
        at = next((titles.index(key) for key in NAMES if key in titles), None)
        if at is not None and WORDS & set(titles):
            yield from _cells(chain(first[1:], lines), separator, titles, at, there)
            return
        if at is not None and not must:
            raise NoList(f"no caption among {', '.join(titles)}"[:300])
    if must:
        raise _Unreadable(f"no columns file_name and text in its first line: {head[:200]}")
    yield from (replace(mention, guessed=True) for mention in _guessed(first, lines, there))


def _titles(head: str, separator: str) -> list[str]:
    titles = [title.strip().lower() for title in _fields(head, separator)]
    return ["file_name", "", "text"] if titles == FLICKR30K else titles


def _fields(line: str, separator: str, strict: bool = False) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=separator, strict=strict), [])
    except csv.Error:
        return []


def _cells(lines: Lines, separator: str, titles: list[str], at: int, there: There) -> Iterator[Mention]:
    """Rows under a head. A caption with the separator in it that nobody quoted goes on to the end of its line."""
    column = next((titles.index(key) for key in TEXTS if key in titles), None)
    classes = titles.index("label") if "label" in titles else None
    for number, row in _rows(lines, separator, at, there):
        if len(row) > len(titles):
            if column != len(titles) - 1:
                what = f"{len(row)} fields, and its head has {len(titles)}; quote what holds a separator"
                raise _Unreadable(f"row {number}: {what}")
            row[column:] = [separator.join(row[column:])]
        if any(part.strip() for part in row):
            name, caption, kind = (_cell(row, place) for place in (at, column, classes))
            yield Mention(name.strip(), several(caption), label(kind))


def _rows(lines: Lines, separator: str, at: int, there: There) -> Iterator[tuple[int, list[str]]]:
    """Rows by the line that each begins on; the column `at` names pictures. Errors: _Damaged."""
    read: list[int] = []  # lines of this row
    reader = csv.reader(_noted(lines, read), delimiter=separator)
    try:
        for row in reader:
            if len(read) > 1 and (taken := _taken(row, separator, at, there)):
                raise _Damaged(f"row {read[0]}: its quotes hold the row of {taken[:100]} too; close them before it")
            yield read[0], row
            read.clear()
    except csv.Error as error:
        what = f"{error} in line {read[-1]}; close what is quoted, and write a quote in it twice"
        raise _Damaged(f"row {read[0]}: {what}") from None


def _noted(lines: Lines, read: list[int]) -> Iterator[str]:
    for number, line in lines:
        read.append(number)
        yield line + "\n"


def _taken(row: list[str], separator: str, at: int, there: There) -> str | None:
    """Another picture whose row lies within this one's quotes, by the lines in these."""
    own = _cell(row, at).strip()
    for parts in (line.split(separator) for cell in row for line in cell.split("\n")[1:]):
        if len(parts) > max(at, 1) and (name := parts[at].strip()) != own and _is_named(name, own, there):
            return name
    return None


def _is_named(name: str, own: str, there: There) -> bool:
    """Whether `name` is a picture's: one that is there, or a word that ends as the picture does that the row names."""
    word = " " not in name if ending(name) else there(name) is not None
    return _in_full(name, there) or (word and ending(name) == ending(own))


def _cell(row: list[str], number: int | None) -> str:
    return row[number] if number is not None and number < len(row) else ""


def _guessed(first: list[tuple[int, str]], lines: Lines, there: There) -> Iterator[Mention]:
    """A name and a caption a line, maybe under a head that calls the captions so. Errors: NoList, _Damaged."""
    separator, endings = _separator([line for _, line in first], there)
    titles, name = _titles(first[0][1], separator), _pair(first[0][1], separator)[0]
    text = separator == " " and len(titles) != len(first[-1][1].split())
    absent = ending(_called(name, there)) in endings
    if len(titles) > 1 and not (text or absent or _in_full(name, there)):
        if not WORDS & set(titles):
            raise NoList(f"no caption among {', '.join(titles)}"[:300])
        first = first[1:]
        if separator != " ":
            yield from _cells(chain(first, lines), separator, titles, 0, there)
            return
    for name, caption in _pairs(chain(first, lines), separator, there):
        yield Mention(_called(name, there), several(caption))


def _separator(lines: list[str], there: There) -> tuple[str, set[str]]:
    """What stands after a picture's name in most lines, and how these names end. A picture is one of this folder or, by
    its ending, of the data set that this folder is a part of. Errors: NoList.
    """
    for separator in "\t|;, ":
        pairs = [(_called(name, there), caption) for name, caption in (_pair(line, separator) for line in lines)]
        named = [name for name, said in pairs if said.strip() and (there(name) or ending(name) in PICTURES)]
        if 2 * len(named) > len(lines):
            return separator, set(map(ending, named)) - {""}
    raise NoList("most of its first lines name no picture together with a caption")


def _pairs(lines: Lines, separator: str, there: There) -> Iterator[tuple[str, str]]:
    """(name, caption) a line; a quoted caption goes on over lines where commas or semicolons part it from its name."""
    if separator in ",;":
        rows = (row for _, row in _rows(lines, separator, 0, there))
        yield from ((row[0].strip(), separator.join(row[1:])) for row in rows if any(part.strip() for part in row))
    else:
        yield from (_pair(line, separator) for _, line in lines if line.strip())


def _pair(line: str, separator: str) -> tuple[str, str]:
    """(name, caption) of a line, without the quotes around them where all of it is quoted as a table is."""
    fields = _fields(line, separator, strict=True) if separator != " " else []
    name, caption = (fields[0], separator.join(fields[1:])) if fields else line.partition(separator)[::2]
    return name.strip(), caption


def _called(name: str, there: There) -> str:
    """The name, without Flickr's number of the caption where no picture has that in its own."""
    return name if there(name) is not None else re.sub(r"#\d$", "", name)


def _in_full(name: str, there: There) -> bool:
    """Whether it is the name of a picture with its ending, maybe with Flickr's number of the caption."""
    name = _called(name, there)
    return (file := there(name)) is not None and ending(file) == ending(name)


def _list_error(found: str) -> SiteError:
    fix = 'write one object a line, in UTF-8, like {"file_name": "0001.png", "text": "a red poppy"}, or columns'
    fix += " file_name,text"
    return SiteError("SITE-06", found=found, fix=fix)
