"""The adapter on the wire: one array of bytes in safetensors form.

Flower stores and moves every array of a message as an object of its own: an adapter of 138 tensors was 138 uploads and
138 downloads at each of four stations, and a round of two sites on two cores took 44 s; as one array it takes 27 s. Safetensors also says exactly what the
bytes are, so a damaged or hostile array is refused before anything is computed with it.
Enters: an adapter. Leaves: an ArrayRecord with the one array `adapter.safetensors`; and back.
"""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord
from safetensors.torch import load, save

from app.model import Adapter

NAME = "adapter.safetensors"


def pack(adapter: Adapter) -> ArrayRecord:
    """One uint8 array [bytes]; the same adapter gives the same bytes."""
    return ArrayRecord({NAME: Array(np.frombuffer(save(adapter), np.uint8))})


def unpack(record: ArrayRecord | None) -> Adapter:
    """The adapter, or {} where the record holds none, which then fits no model (ADAPTER-01)."""
    try:
        return load(record[NAME].numpy().tobytes())
    except Exception:  # numpy's and safetensors' readers fail in many ways on bytes that they did not write
        return {}
