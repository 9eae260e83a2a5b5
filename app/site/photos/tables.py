"""Parquet and arrow files as Hugging Face stores image data sets: a file in, one `Row` a picture out.

Enters: a file with an image column (struct of bytes and path, plain bytes, or text: a path) and maybe `text`, `caption`
or `label`, whose class names stand in the schema's metadata under `huggingface`; a list of texts is several captions.
Leaves: rows whose picture is fetched on demand. A table that has no such column is none of pictures (`NoPictures`).
Both formats can name gigabytes in a few bytes: compressed, in a dictionary, as "the value before once more". So a
file's own headers are asked what it unpacks to before anything is unpacked (unpacked.py), and parquet is decoded row by
row, once where pictures are read in order. Pictures do not pack: what is read of a file may come to 256 MiB and four
times its size, and to 50,000 rows and one a byte.
"""

from __future__ import annotations

import json
import mmap
import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

from app.site.photos import unpacked
from app.site.photos.captions import MAX_ROWS, NAMES, TEXTS, label, several
from app.site.photos.images import MAX_BYTES, BadImage, open_inside

MAX_NOTES = 4_000_000  # bytes of metadata: 20,000 class names are half a million
At = tuple[int, int]  # row group or record batch, and row in it


class TableError(Exception):
    """The file is damaged or unpacks to too much; `str()` is private."""


class NoPictures(Exception):
    """The table holds other things than pictures; `str()` says which, and is private."""


@dataclass(frozen=True)
class Row:
    """One picture of a table: `load()` gives its bytes, unless it lies in `file`, a path as the table writes it.

    captions: as a Mention's. `worded`: the table has captions, so that a row without one is without.
    """

    place: str
    load: Callable[[], bytes]
    file: str | None
    captions: tuple[str, ...]
    label: str | None
    worded: bool


def rows(root: Path, name: str) -> Iterator[Row]:
    """Every row of the file `name` below `root`, in order.

    Errors: TableError, NoPictures; BadImage (it cannot be opened).
    """
    _open.cache_clear()  # the file may be another one than the last time
    try:
        table = _open(root, name)
        columns, left, most = table.columns, allowed(table.size), min(MAX_ROWS, 50_000 + table.size)
        for number, (at, row) in enumerate(table.read(0)):
            left -= sum(_length(value) for value in row.values())
            if left < 0 or number >= most:
                what = f"{most} rows, or pictures of more than {allowed(table.size) >> 20} MiB together"
                raise TableError(f"its {table.size} bytes hold more than {what}")
            picture = row[columns.image]
            texts = (several(row[text].as_py()) for text in columns.texts)
            yield Row(
                place=f"group {at[0]} row {at[1]}",
                load=partial(_picture, root, name, at),
                file=None if _stored(picture) else _path(picture),
                captions=next(filter(None, texts), ()),
                label=class_name(row[columns.label].as_py(), columns.classes) if columns.label else None,
                worded=bool(columns.texts),
            )
    except (BadImage, TableError, NoPictures):
        raise
    except Exception as error:  # the file is anybody's, and its readers fail in many ways
        raise TableError(f"{type(error).__name__}: {error}"[:500]) from None


def allowed(size: int) -> int:
    """Bytes that a file of `size` bytes may unpack to."""
    return 2**28 + 4 * size


def _picture(root: Path, name: str, at: At) -> bytes:
    """The bytes of one picture. Errors: BadImage."""
    try:
        table = _open(root, name)
        data = _stored(table.row(at)[table.columns.image])
    except BadImage:
        raise
    except Exception:
        raise BadImage("unreadable") from None
    if len(data) > MAX_BYTES:
        raise BadImage("too-large")
    return bytes(data)


@lru_cache(maxsize=1)  # pictures are read in order, so the place where the last one was read serves the next
def _open(root: Path, name: str) -> _Table:
    file = open_inside(root, name)
    try:
        return (_Arrow if name.lower().endswith(".arrow") else _Parquet)(file)
    except BaseException:
        file.close()
        raise


# --- columns and values -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Columns:
    """What is read of a table."""

    image: str
    fields: tuple[str, ...]  # of the image, where it is a struct
    texts: tuple[str, ...]
    label: str | None
    classes: list[Any]

    @property
    def names(self) -> tuple[str, ...]:
        return (self.image, *self.texts, *((self.label,) if self.label else ()))

    @property
    def leaves(self) -> tuple[str, ...]:
        """As parquet names them, or what their names begin with."""
        return (*(f"{self.image}.{field}" for field in self.fields), *self.names[bool(self.fields) :])


def _columns(schema: Any) -> _Columns:
    """Errors: NoPictures; TableError where two columns have one name."""
    features = _features((schema.metadata or {}).get(b"huggingface", b"{}"))
    kinds = [(name, feature.get("_type")) for name, feature in features.items() if isinstance(feature, dict)]
    own = [name for name, kind in kinds if kind == "Image" and name in schema.names]
    if "image" not in schema.names and len(own) > 1:
        said = f"{len(own)} image columns, {' and '.join(own)}"
        raise NoPictures(f"{said[:200]}: nobody knows which; call one image")
    images = [name for name in ("image", *own, *NAMES) if name in schema.names]
    labels = [name for name in ("label", *(n for n, kind in kinds if kind == "ClassLabel")) if name in schema.names]
    if not images:
        raise NoPictures(f"no image column among {', '.join(schema.names)}"[:300])
    image, kind = images[0], _only(schema, images[0])
    fields = tuple(field for field, right in (("bytes", _is_bytes), ("path", _is_text)) if right(_field(kind, field)))
    if not fields and not _is_bytes(kind) and not _is_text(kind):
        raise NoPictures(f"its column {image} holds {kind}, no pictures"[:300])
    label = next((name for name in labels if _is_label(_only(schema, name))), None)
    texts = tuple(name for name in TEXTS if name in schema.names and _is_text(_only(schema, name), lists=True))
    about = features.get(label) if label else None
    classes = about.get("names") if isinstance(about, dict) else None
    classes = classes if isinstance(classes, list) else []
    return _Columns(image, fields, tuple(name for name in texts if name != label), label, classes)


def _features(notes: bytes) -> dict[str, Any]:
    """What `datasets` says of the columns; {} where it says it in another way. Errors: TableError, ValueError."""
    if len(notes) > MAX_NOTES:
        raise TableError(f"{len(notes)} bytes of metadata")
    found = json.loads(notes)
    for key in ("info", "features"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def _only(schema: Any, name: str) -> Any:
    """The type of the one column of that name. Errors: TableError."""
    if len(found := schema.get_all_field_indices(name)) != 1:
        raise TableError(f"{len(found)} columns named {name}"[:500])
    return schema.field(found[0]).type


def _field(kind: Any, name: str) -> Any:
    """The type of a struct's field, else None."""
    import pyarrow as pa

    return kind.field(name).type if pa.types.is_struct(kind) and kind.get_all_field_indices(name) else None


def _is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    return kind in (pa.binary(), pa.large_binary(), pa.binary_view())


def _is_text(kind: Any, lists: bool = False) -> bool:
    """lists: or a list of texts."""
    import pyarrow as pa

    if lists and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        kind = kind.value_type
    of = kind.value_type if isinstance(kind, pa.DictionaryType) else kind
    return of in (pa.string(), pa.large_string(), pa.string_view())


def _is_label(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_integer(kind) or _is_text(kind)


def class_name(value: Any, classes: list[Any]) -> str | None:
    """A label as words: 0 with ["pink_primrose"] is "pink primrose"; −1 (the hub's "no label") is None."""
    if isinstance(value, int):
        value = classes[value] if 0 <= value < len(classes) else None
    return label(value)


def _stored(value: Any) -> Any:
    """The buffer of a picture that lies in the table; b"" of another."""
    import pyarrow as pa

    if isinstance(value, pa.StructScalar):
        value = value["bytes"] if value.is_valid and "bytes" in value.type.names else None
    if value is not None and _is_text(value.type):
        return b""
    return (value.as_buffer() if value is not None and value.is_valid and hasattr(value, "as_buffer") else None) or b""


def _path(value: Any) -> str | None:
    """The path of a picture that lies in a file."""
    import pyarrow as pa

    if isinstance(value, pa.StructScalar) and value.is_valid and "path" in value.type.names:
        value = value["path"]
    elif not _is_text(value.type):
        return None
    path: str | None = value.as_py()
    return path


def _length(value: Any) -> int:
    """Bytes of one value, without a copy of it."""
    import pyarrow as pa

    if isinstance(value, pa.StructScalar):
        return sum(_length(part) for part in value.values()) if value.is_valid else 0
    if isinstance(value, (pa.ListScalar, pa.LargeListScalar)):
        return sum(map(_length, value)) if value.is_valid else 0
    if isinstance(value, pa.DictionaryScalar):
        value = value.value
    return len(value.as_buffer() or b"") if hasattr(value, "as_buffer") else 8


# --- the two formats --------------------------------------------------------------------------------------------------


class _Table:
    """An open file and the place where it was read last."""

    columns: _Columns
    size: int
    now: dict[str, Any]

    def read(self, group: int) -> Iterator[tuple[At, dict[str, Any]]]:
        """Place and values of every row from the first of that group on."""
        self.steps, self.at, self.now = self._rows(group), (group, -1), {}
        for self.at, self.now in self.steps:  # noqa: B020
            yield self.at, self.now

    def row(self, at: At) -> dict[str, Any]:
        """The values of one row: at hand, further on, or from the beginning of its group. Errors: LookupError."""
        if at < self.at or at[0] > self.at[0]:
            self.steps, self.at = self._rows(at[0]), (at[0], -1)
        while self.at < at:
            self.at, self.now = next(self.steps, ((at[0] + 1, 0), {}))
        if self.at != at:
            raise LookupError(at)
        return self.now

    def _rows(self, group: int) -> Iterator[tuple[At, dict[str, Any]]]:
        raise NotImplementedError


class _Parquet(_Table):
    """Of a row group, one page of each column is unpacked at a time, and of that one row is decoded."""

    def __init__(self, file: BinaryIO) -> None:
        import pyarrow.parquet as pq

        self.file, self.size = file, os.fstat(file.fileno()).st_size
        weakref.finalize(self, file.close)
        self.parquet = pq.ParquetFile(file, buffer_size=2**20)
        self.columns = _columns(self.parquet.schema_arrow)

    def _rows(self, group: int) -> Iterator[tuple[At, dict[str, Any]]]:
        for number in range(group, self.parquet.num_row_groups):
            self._check(number)
            leaves = list(self.columns.leaves)
            batches = self.parquet.iter_batches(1, row_groups=[number], columns=leaves, use_threads=False)
            for index, batch in enumerate(batches):
                yield (number, index), {name: batch.column(name)[0] for name in self.columns.names}

    def _check(self, group: int) -> None:
        """TableError where a row group's pages unpack to too much: by their own headers, since metadata may lie."""
        about, most = self.parquet.metadata.row_group(group), 0
        leaves = self.columns.leaves
        for chunk in (about.column(number) for number in range(about.num_columns)):
            path = chunk.path_in_schema  # of a list's values it goes on: caption.list.element
            if any(path == leaf or path.startswith(f"{leaf}.") for leaf in leaves):
                begin = min(o for o in (chunk.dictionary_page_offset, chunk.data_page_offset) if o)
                most += unpacked.pages(self.file, begin, begin + chunk.total_compressed_size)
        if most > allowed(self.size):
            raise TableError(f"row group {group} unpacks to {most >> 20} MiB at a time, the file has {self.size} bytes")


class _Arrow(_Table):
    """Mapped into memory, and read as a stream: the file format is one too, after its first 8 bytes."""

    def __init__(self, file: BinaryIO) -> None:
        import pyarrow as pa

        with file:
            self.size = os.fstat(file.fileno()).st_size
            everything = pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        stream = everything[8:] if everything[:6].to_pybytes() == b"ARROW1" else everything
        most = sum(map(unpacked.buffers, pa.ipc.MessageReader.open_stream(stream)))
        if most > allowed(self.size):
            raise TableError(f"its buffers unpack to {most >> 20} MiB, the file has {self.size} bytes")
        schema = pa.ipc.open_stream(stream).schema
        self.columns = _columns(schema)
        some = pa.ipc.IpcReadOptions(included_fields=[schema.get_field_index(name) for name in self.columns.names])
        self.batches = list(pa.ipc.open_stream(stream, options=some))

    def _rows(self, group: int) -> Iterator[tuple[At, dict[str, Any]]]:
        for number, batch in enumerate(self.batches[group:], start=group):
            batch.validate(full=True)  # an offset that leads out of the file would be followed
            for index in range(batch.num_rows):
                yield (number, index), {name: batch.column(name)[index] for name in self.columns.names}
