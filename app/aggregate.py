"""From replies to the next global adapter: guard each reply, then Flower's weighted mean over the ones that hold.

Enters: the round's replies as Flower messages. Leaves: the adapter, and who was refused and why.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from flwr.app import ArrayRecord, Message
from flwr.serverapp.strategy import FedAvg

from app.errors import AdapterError, HubError
from app.model import Adapter, check_adapter

NEEDED = ("num-examples", "train-loss", "validation-loss")


@dataclass(frozen=True)
class Reply:
    """A site's valid reply: its message (for Flower's aggregation) and what a person reads of it."""

    site: str
    message: Message
    images: int
    metrics: dict[str, float]


def accept(message: Message, sent: Adapter, sent_hash: str) -> Reply:
    """The reply, or HUB-04 / ADAPTER-01 / ADAPTER-02 / ADAPTER-03 with a sentence that says what is wrong with it."""
    if message.has_error():
        raise HubError("HUB-04", f"The site could not take part: {_reason(message)}", found="an error reply", fix="read that site's log")
    content = message.content
    info, metrics = dict(content.config_records.get("info", {})), dict(content.metric_records.get("metrics", {}))
    wrong = [k for k in NEEDED if not isinstance(metrics.get(k), (int, float)) or not math.isfinite(metrics[k])]
    images = metrics.get("num-examples")
    if wrong or not isinstance(images, int) or not 0 < images < 10**9:
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
    if "arrays" in content.array_records:
        check_adapter(content["arrays"].to_torch_state_dict(), sent)
    numbers = {k: v for k, v in metrics.items() if isinstance(v, (int, float))}
    return Reply(str(info.get("site", message.metadata.src_node_id)), message, images, numbers)


def _reason(message: Message) -> str:
    """An error's public text; Flower wraps an exception as <class '…'>:<'text'>."""
    return (message.error.reason or f"error code {message.error.code}").removesuffix("'>").split(":<'", 1)[-1]


def weighted_mean(replies: Iterable[Reply]) -> Adapter:
    """FedAvg: each site weighs as many images as it trained on. In the order of the sites' names, so that it repeats.

    Source: McMahan et al. 2017, arXiv:1602.05629, algorithm 1.
    """
    ordered = [reply.message for reply in sorted(replies, key=lambda reply: reply.site)]
    arrays, _ = FedAvg(min_available_nodes=1).aggregate_train(0, ordered)
    assert isinstance(arrays, ArrayRecord)
    return {key: value.float() for key, value in arrays.to_torch_state_dict().items()}


def weighted(replies: Iterable[Reply], name: str) -> float:
    """Mean of a metric, weighted by images."""
    replies = list(replies)
    return sum(r.metrics[name] * r.images for r in replies) / sum(r.images for r in replies)
