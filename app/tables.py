"""Parquet and arrow files as the hub stores image data sets: a file in, one `Row` a picture out.

Enters: a file with an image column (struct of bytes and path, or plain bytes) and maybe `text`, `caption` or `label`,
whose class names stand in the schema's metadata under `huggingface`. Leaves: rows whose picture is fetched on demand.
One parquet row group at a time is in memory; arrow files are memory-mapped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from app.images import MAX_BYTES, BadImage


class TableError(Exception):
    """The file is damaged or has no image column; `str()` is private."""


@dataclass(frozen=True)
class Row:
    """One picture of a table: `load()` gives its bytes, unless it lies in `file`, relative to the data folder."""

    place: str
    load: Callable[[], bytes]
    file: str | None
    texts: dict[str, Any]
    label: str | None


def rows(path: Path) -> Iterator[Row]:
    """Every row, in order. Errors: TableError."""
    import pyarrow as pa  # only where a site has a table

    try:
        groups, schema = _shape(str(path))
        image, label, classes = _columns(schema)
        texts = [name for name in ("text", "caption") if name in schema.names]
        for group in range(groups):
            table = _group(str(path), group, (image, *texts, *([label] if label else [])))
            for index in range(len(table)):
                yield Row(
                    place=f"group {group} row {index}",
                    load=partial(_picture, str(path), group, index, image),
                    file=_file(table[image][index].as_py()),
                    texts={name: table[name][index].as_py() for name in texts},
                    label=_class_name(table[label][index].as_py(), classes) if label else None,
                )
    except (pa.ArrowException, OSError, ValueError) as error:
        raise TableError(str(error)) from None


def _columns(schema: Any) -> tuple[str, str | None, list[str] | None]:
    """Names of the image column and the label column, and the class names. Errors: TableError."""
    info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = info.get("info", {}).get("features") or {}
    kinds = [(name, feature.get("_type")) for name, feature in features.items() if isinstance(feature, dict)]
    images = [name for name in ("image", *(n for n, kind in kinds if kind == "Image")) if name in schema.names]
    labels = [name for name in ("label", *(n for n, kind in kinds if kind == "ClassLabel")) if name in schema.names]
    if not images:
        raise TableError(f"no image column among {schema.names}")
    label = labels[0] if labels else None
    return images[0], label, (features.get(label) or {}).get("names")


def _class_name(value: Any, classes: list[str] | None) -> str | None:
    """A label as words: 0 with ["pink_primrose"] is "pink primrose"; −1 (the hub's "no label") is None."""
    if isinstance(value, int):
        value = classes[value] if classes and 0 <= value < len(classes) else None
    return value.replace("_", " ").strip() or None if isinstance(value, str) else None


def _file(value: Any) -> str | None:
    """The path of a picture that is not stored in the table."""
    return value.get("path") if isinstance(value, dict) and not value.get("bytes") else None


def _picture(path: str, group: int, index: int, image: str) -> bytes:
    """The bytes of one picture. Errors: BadImage."""
    import pyarrow as pa

    try:
        value = _group(path, group, (image,))[image][index].as_py()
    except (pa.ArrowException, OSError, IndexError):
        raise BadImage("unreadable") from None
    data = (value.get("bytes") if isinstance(value, dict) else value) or b""
    if len(data) > MAX_BYTES:
        raise BadImage("too-large")
    return data


def _shape(path: str) -> tuple[int, Any]:
    """Number of row groups (an arrow file is one) and the schema."""
    import pyarrow.parquet as pq

    if path.lower().endswith(".arrow"):
        return 1, _arrow(path).schema
    with pq.ParquetFile(path) as file:
        return file.num_row_groups, file.schema_arrow


@lru_cache(maxsize=2)  # pictures are read in order, so the row group of the last one serves the next
def _group(path: str, group: int, columns: tuple[str, ...]) -> Any:
    import pyarrow.parquet as pq

    if path.lower().endswith(".arrow"):
        return _arrow(path).select(list(columns))
    with pq.ParquetFile(path) as file:
        return file.read_row_group(group, columns=list(columns))


def _arrow(path: str) -> Any:
    """An arrow table in stream format (as `datasets` writes it) or file format."""
    import pyarrow as pa

    source = pa.memory_map(path)
    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    return (pa.ipc.open_file if is_file else pa.ipc.open_stream)(source).read_all()
