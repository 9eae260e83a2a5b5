"""From replies to the next global adapter: guard each reply, then Flower's weighted mean over the ones that hold.

Enters: the round's replies as Flower messages. Leaves: the adapter, and who was refused and why.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from app.errors import AdapterError, HubError
from app.model import Adapter, check_adapter
from app.wire import unpack

NEEDED = ("num-examples", "train-loss", "validation-loss")
LONGEST = 300  # characters of a site's own text that the hub prints and keeps


@dataclass(frozen=True)
class Reply:
    """A site's valid reply: its adapter (None after an evaluation), the images it trained on, and its other numbers."""

    site: str
    adapter: Adapter | None
    images: int
    metrics: dict[str, float]


def accept(message: Message, sent: Adapter, sent_hash: str, *, training: bool) -> Reply:
    """The reply, or HUB-04, HUB-05, ADAPTER-01, -02 or -03 with a sentence that says what is wrong with it."""
    if message.has_error():
        raise HubError("HUB-04", f"The site could not take part: {_reason(message)}", found="an error reply", fix="read that site's log")
    content = message.content
    info, metrics = content.config_records.get("info", {}), content.metric_records.get("metrics", {})
    numbers = {k: v for k, v in metrics.items() if type(v) in (int, float) and math.isfinite(v)}
    wrong = [name for name in NEEDED if name not in numbers]
    images = numbers.get("num-examples")
    if wrong or type(images) is not int or not 0 < images < 10**9:
        raise HubError(
            "HUB-05",
            "The reply's metrics are missing or impossible.",
            found=f"{', '.join(wrong) or 'num-examples'} is not a sensible number",
            fix="update that site to the hub's version",
        )
    if info.get("applied") != sent_hash:
        raise AdapterError(
            "ADAPTER-03",
            "The site did not train from the global adapter.",
            found=f"it applied {str(info.get('applied'))[:16]}, the hub sent {sent_hash[:16]}",
            fix="update that site to the hub's version",
        )
    adapter = unpack(content.array_records.get("arrays")) if training else None
    if adapter is not None:
        check_adapter(adapter, sent)
    return Reply(_line(info.get("site", message.metadata.src_node_id)), adapter, images, numbers)


def _reason(message: Message) -> str:
    """An error's public text; Flower wraps an exception as <class '…'>:<'text'>."""
    text = message.error.reason or f"error code {message.error.code}"
    return _line(text.split(":<'", 1)[-1].removesuffix("'>"))


def _line(text: object) -> str:
    """A site's text on one line of bounded length."""
    return " ".join(str(text).split())[:LONGEST]


def weighted_mean(replies: Iterable[Reply]) -> Adapter:
    """FedAvg: each site weighs as many images as it trained on. In the order of the sites' names, so that it repeats.

    Source: McMahan et al. 2017, arXiv:1602.05629, algorithm 1.
    """
    records = [
        RecordDict({"arrays": ArrayRecord(reply.adapter), "metrics": MetricRecord({"num-examples": reply.images})})
        for reply in sorted(replies, key=lambda reply: reply.site)
    ]
    return dict(aggregate_arrayrecords(records, "num-examples").to_torch_state_dict())


def weighted(replies: Iterable[Reply], name: str) -> float:
    """Mean of a metric, weighted by images."""
    replies = list(replies)
    return sum(r.metrics[name] * r.images for r in replies) / sum(r.images for r in replies)
