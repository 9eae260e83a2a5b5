"""What a parquet column or an arrow message unpacks to, by its own headers: asked before anything is unpacked.

Enters: an open parquet file and where a column chunk lies, or a message of pyarrow's. Leaves: a number of bytes. Two
formats are read by hand here, as far as that needs: their readers tell what the file's metadata claims, or nothing.
Errors: ValueError, struct.error (a header that is damaged).
"""

from __future__ import annotations

import struct
from typing import Any, BinaryIO

MAX_PAGES = 100_000  # a page is a megabyte, or 20,000 rows


def pages(file: BinaryIO, at: int, end: int) -> int:
    """The most that a column chunk has unpacked at a time: its dictionaries and its largest page.

    Source: parquet.thrift, PageHeader.
    """
    dictionary = largest = count = 0
    while at < end:
        count += 1
        if count > MAX_PAGES:
            raise ValueError(f"more than {MAX_PAGES} pages in a column of one row group")
        header, said = _page(file, at)
        size = abs(said[2])
        at += header + max(0, said[3])
        dictionary, largest = (dictionary + size, largest) if said[1] == 2 else (dictionary, max(largest, size))
    return dictionary + largest


def _page(file: BinaryIO, at: int) -> tuple[int, dict[int, int]]:
    """A page's header: its length, and its fields."""
    for most in (2**12, 2**24):  # a writer may put the least and the greatest value of the page into it
        file.seek(at)
        header = _Compact(file.read(most))
        try:
            fields = header.struct()
            return header.at, fields
        except IndexError:
            continue
    raise ValueError("a page's header is cut off")


class _Compact:
    """Reads Thrift's compact protocol: the whole numbers of a struct by field; what else it holds is passed over."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def struct(self, depth: int = 0) -> dict[int, int]:
        if depth > 16:
            raise ValueError("a page's header is nested too deeply")
        found, field = {}, 0
        while head := self.byte():
            field = field + (head >> 4) if head >> 4 else self.number()
            found[field] = self.value(head & 15, depth)
        return found

    def value(self, kind: int, depth: int) -> int:
        if kind in (1, 2):  # true, false: in the kind itself
            return kind
        if kind == 3:
            return self.byte()
        if kind in (4, 5, 6):
            return self.number()
        if kind == 7:
            self.at += 8
        elif kind == 8:
            length = self.plain()
            self.at += length
        elif kind == 12:
            self.struct(depth + 1)
        else:  # lists, sets and maps: no page's header has one
            raise ValueError(f"a page's header holds a value of kind {kind}")
        return 0

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def plain(self) -> int:
        number = shift = 0
        while shift < 64:
            part = self.byte()
            number |= (part & 127) << shift
            if part < 128:
                return number
            shift += 7
        raise ValueError("a page's header has a number without an end")

    def number(self) -> int:
        plain = self.plain()
        return (plain >> 1) ^ -(plain & 1)


def buffers(message: Any) -> int:
    """Bytes that an arrow message's compressed buffers unpack to, with which each of them begins.

    Source: Message.fbs, Message, DictionaryBatch, RecordBatch.
    """
    data, body = message.metadata.to_pybytes(), message.body

    def at(table: int, slot: int) -> int:
        """Where a flatbuffer table's field is; 0 where it has none."""
        entries = table - struct.unpack_from("<i", data, table)[0]
        if 4 + 2 * slot >= struct.unpack_from("<H", data, entries)[0]:
            return 0
        offset: int = struct.unpack_from("<H", data, entries + 4 + 2 * slot)[0]
        return table + offset if offset else 0

    def follow(place: int) -> int:
        offset: int = struct.unpack_from("<I", data, place)[0]
        return place + offset

    if message.type not in ("record batch", "dictionary"):
        return 0
    batch = follow(at(follow(0), 2))
    batch = follow(at(batch, 1)) if message.type == "dictionary" else batch
    if not at(batch, 3):  # compression
        return 0
    listed, total = follow(at(batch, 2)), 0
    for number in range(struct.unpack_from("<I", data, listed)[0]):
        offset, length = struct.unpack_from("<qq", data, listed + 4 + 16 * number)
        if length >= 8:
            total += max(0, struct.unpack_from("<q", body, offset)[0])  # −1: this one is not compressed
    return total
