"""The adapter on the wire: one array of bytes in safetensors form.

Flower stores and moves every array of a message as an object of its own: an adapter of 138 tensors was 138 uploads and
138 downloads at each of four stations, and a round of two sites on two cores took 44 s; as one array it takes 27 s. Safetensors also says exactly what the
bytes are, so a damaged or hostile array is refused before anything is computed with it.
Enters: an adapter. Leaves: an ArrayRecord with the one array `adapter.safetensors`; and back.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.supercore.inflatable.inflatable_object import get_object_body, get_object_children_ids_from_object_content
from safetensors.torch import load, save

from app.model import Adapter

NAME = "adapter.safetensors"
_inflate = Array.inflate.__func__


def pack(adapter: Adapter) -> ArrayRecord:
    """One uint8 array [bytes]; the same adapter gives the same bytes."""
    return ArrayRecord({NAME: Array(np.frombuffer(save(adapter), np.uint8))})


def unpack(record: ArrayRecord | None) -> Adapter:
    """The adapter, or {} where the record holds none, which then fits no model (ADAPTER-01)."""
    try:
        return load(record[NAME].numpy().tobytes())
    except Exception:  # numpy's and safetensors' readers fail in many ways on bytes that they did not write
        return {}


def bound_arrays(most: int) -> None:
    """From now on this process builds no array of more than `most` bytes out of what it received.

    Flower's array names its chunks by number, and may name one of them a million times: a few megabytes sent would be
    terabytes in the hub's memory. Errors (of Array.inflate): ValueError.
    """

    def inflate(cls: type[Array], content: bytes, children: dict[str, Any] | None = None) -> Array:
        chunks = [(children or {})[name].data.nbytes for name in get_object_children_ids_from_object_content(content)]
        if sum(chunks[number] for number in json.loads(get_object_body(content, cls))["arraychunk_ids"]) > most:
            raise ValueError(f"an array of more than {most} bytes")
        return _inflate(cls, content, children)

    Array.inflate = classmethod(inflate)
