"""The adapter on the wire: one array of bytes in safetensors form.

Flower stores and moves every array of a message as an object of its own: an adapter of 138 tensors was 138 uploads and
138 downloads at each of four stations, and a round of two sites on two cores took 44 s; as one array it takes 27 s.
Safetensors also says exactly what the bytes are, so a damaged or hostile array is refused before anything is computed
with it. With wire-precision = "fp16" the numbers travel in half the bytes: every station rounds an adapter before it
sends or keeps it, so that the hub, its checkpoints and the sites speak of the same numbers and nothing is lost on the
way.
Enters: an adapter. Leaves: an ArrayRecord with the one array `adapter.safetensors`; and back.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from flwr.supercore.inflatable.inflatable_object import get_object_body, get_object_children_ids_from_object_content
from safetensors.torch import load, save

from app.model import Adapter

NAME = "adapter.safetensors"
_inflate = Array.inflate.__func__  # type: ignore[attr-defined]


def rounded(adapter: Adapter, precision: str) -> Adapter:
    """The float32 adapter that arrives when this one is sent: with fp16 each number rounded to 11 significant bits,
    else the same.

    A number beyond fp16's 65504 becomes infinite, which no station takes (ADAPTER-02).
    """
    return {key: value.half().float() for key, value in adapter.items()} if precision == "fp16" else adapter


def pack(adapter: Adapter, precision: str = "fp32") -> ArrayRecord:
    """One uint8 array [bytes]; the same adapter gives the same bytes, half of them with fp16."""
    tensors = {key: value.half() for key, value in adapter.items()} if precision == "fp16" else adapter
    return ArrayRecord({NAME: Array(np.frombuffer(save(tensors), np.uint8))})


def unpack(record: ArrayRecord | None, precision: str = "fp32") -> Adapter:
    """The adapter in float32, or {} where the record holds none, which then fits no model (ADAPTER-01).

    Tensors of another type than was agreed on fit no model either: float64 where fp16 was, else what they are.
    """
    if record is None:
        return {}
    try:
        adapter = load(record[NAME].numpy().tobytes())
    except Exception:  # numpy's and safetensors' readers fail in many ways on bytes that they did not write
        return {}
    if precision == "fp16":
        return {
            key: value.float() if value.dtype == torch.float16 else value.double() for key, value in adapter.items()
        }
    return adapter


def bound_arrays(most: int) -> None:
    """From now on this process builds no array of more than `most` bytes out of what it received.

    Flower's array names its chunks by number, and may name one of them a million times: a few megabytes sent would be
    terabytes in the hub's memory. Errors (of Array.inflate): ValueError.
    """

    def inflate(cls: type[Array], content: bytes, children: dict[str, Any] | None = None) -> Array:
        chunks = [(children or {})[name].data.nbytes for name in get_object_children_ids_from_object_content(content)]
        if sum(chunks[number] for number in json.loads(get_object_body(content, cls))["arraychunk_ids"]) > most:
            raise ValueError(f"an array of more than {most} bytes")
        array: Array = _inflate(cls, content, children)
        return array

    Array.inflate = classmethod(inflate)  # type: ignore[method-assign, assignment]
