"""What a hostile site may reply: by name, what is done to an honest reply before it leaves.

A reply is our own (the adapter is one array of bytes) or that of a plain FedAvg app (an array a tensor); a lie is the
same to both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from safetensors.torch import load, load_file, save, save_file

OURS = "adapter.safetensors"
BOMB = 40 * 10**9  # bytes that the array of one small chunk says it has


@dataclass
class Update:
    """A reply before it is put on the wire. sent: the adapter that the hub sent; kept: where the first round's reply
    was put aside.
    """

    adapter: dict[str, torch.Tensor]
    metrics: dict
    info: dict
    sent: dict[str, torch.Tensor]
    kept: Path
    raw: bool = False  # bytes that no reader understands, in place of an array


Lie = Callable[[Update], object]


def _every(change: Callable[[torch.Tensor], torch.Tensor]) -> Lie:
    return lambda update: update.adapter.update({key: change(value) for key, value in update.adapter.items()})


def _one(change: Callable[[torch.Tensor], torch.Tensor]) -> Lie:
    return lambda update: update.adapter.update({min(update.adapter): change(update.adapter[min(update.adapter)])})


def _weight(value: float) -> Lie:
    return lambda update: update.metrics.update({"num-examples": value})


def _farther(update: Update) -> None:
    update.adapter = {key: update.sent[key] + 1e6 * (value - update.sent[key]) for key, value in update.adapter.items()}


def _stale(update: Update) -> None:
    update.adapter = load_file(update.kept)
    other = json.loads(update.kept.with_suffix(".json").read_text())
    update.metrics, update.info = other["metrics"], other["info"]


LIES: dict[str, Lie] = {
    "NaN": _one(lambda t: torch.full_like(t, math.nan)),
    "infinity": _one(lambda t: torch.full_like(t, math.inf)),
    "an update ×10⁶": _farther,
    "a wrong key": lambda update: update.adapter.update({"rose": update.adapter.pop(min(update.adapter))}),
    "a wrong shape": _one(lambda t: t.reshape(-1)),
    "shape (1,)": _every(lambda t: t.reshape(-1)[:1].clone()),
    "a wrong dtype": _every(lambda t: t.double()),
    "weight 1e300": _weight(1e300),
    "weight −9": _weight(-9),
    "weight 0": _weight(0),
    "weight NaN": _weight(math.nan),
    "no metrics": lambda update: update.metrics.clear(),
    "garbage bytes": lambda update: setattr(update, "raw", True),
    "a stale round's reply": _stale,
}


def tell(name: str, content: RecordDict, sent: RecordDict, kept: Path) -> None:
    """Make the reply `content` that lie; '' only puts it aside where nothing has been. sent: the hub's message."""
    ours = OURS in content["arrays"]
    adapter, before = _adapter(content["arrays"]), _adapter(sent["arrays"])
    update = Update(adapter, dict(content["metrics"]), dict(content["info"]), before, kept)
    if not kept.exists():
        kept.with_suffix(".json").write_text(json.dumps({"metrics": update.metrics, "info": update.info}))
        save_file(adapter, kept)
    if not name:
        return
    LIES[name](update)
    content["metrics"], content["info"] = MetricRecord(update.metrics), ConfigRecord(update.info)
    if ours:
        record = ArrayRecord({OURS: Array(np.frombuffer(save(update.adapter), np.uint8))})
    else:
        record = ArrayRecord(update.adapter)
    if update.raw:
        record[min(record)] = Array(
            dtype="float32", shape=(1,), stype="numpy.ndarray", data=b"\x93NUMPY garbage" * 1000
        )
    content["arrays"] = record


def _adapter(record: ArrayRecord) -> dict[str, torch.Tensor]:
    return load(record[OURS].numpy().tobytes()) if OURS in record else dict(record.to_torch_state_dict())


# --- lies below Flower's records: what an array looks like on the wire
# -----------------------------------------------------------


def garble(deflate: Callable[[Array], bytes], array: Array) -> bytes:
    """Bytes that no reader of Flower's understands, under their right hash."""
    from flwr.supercore.inflatable.inflatable_object import add_header_to_object_body

    return add_header_to_object_body(object_body=b"\xff\x00 garbage" * 1000, obj=array)


def bomb(deflate: Callable[[Array], bytes], array: Array) -> bytes:
    """The array names its one chunk so often that it would be 40 GB."""
    from flwr.supercore.inflatable.inflatable_object import add_header_to_object_body

    body = json.loads(deflate(array).split(b"\x00", 1)[1])
    body["arraychunk_ids"] = [0] * (BOMB // len(array.data))
    return add_header_to_object_body(object_body=json.dumps(body).encode(), obj=array)


WIRE = {"an array that is garbage on the wire": garble, "a chunk list that repeats one chunk to 40 GB": bomb}
