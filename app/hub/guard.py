"""The guard: which of a round's replies hold, and how much each one weighs. strategy.py aggregates what is left.

Enters: replies as Flower messages. Leaves: accepted replies with their weight, or an error that says what is wrong
with one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from flwr.app import ConfigRecord, Message
from flwr.common.constant import ErrorCode

from app import lora, masks, metrics, text
from app.errors import AdapterError, HubError, public
from app.model import Adapter, check_adapter
from app.wire import unpack

UNTRUSTED = {  # what a site's SuperNode may say of a signature (bouquet/flower/trust.py), in the hub's own words
    "TRUST-06": "its signature is too old",
    "TRUST-07": "the site has run a newer one of that publisher",
    "TRUST-08": "it was signed in the future, by the site's clock",
    "TRUST-09": "the site's memory of what ran there cannot be used",
}
NAME = 80  # characters of a site's or a GPU's name that the hub prints and keeps


@dataclass(frozen=True)
class Reply:
    """A site's valid reply: its adapter (None after an evaluation), the images it counts for, its numbers, its length.

    left_out: how many of its numbers were not kept. bound: why it counts for fewer images than it says, or "".
    offer: what a site says before it hides its update (app/masks.py), else "". rank: the site's own, or 0; share: how
    many of the round's numbers it trained at that.
    """

    site: str
    adapter: Mapping[str, torch.Tensor] | None
    images: int
    metrics: dict[str, float]
    norm: float = 0.0
    gpu: str = ""
    left_out: int = 0
    bound: str = ""
    offer: str = ""
    rank: int = 0
    share: float = 1.0

    @property
    def trained(self) -> Mapping[str, torch.Tensor]:
        """The adapter of a reply to a training message."""
        assert self.adapter is not None
        return self.adapter

    @property
    def pace(self) -> float:
        """Its length, had it trained all of the round's numbers: what updates of several ranks are compared by."""
        return self.norm / math.sqrt(self.share)


def accept(
    message: Message,
    sent: Adapter,
    sent_hash: str,
    *,
    training: bool,
    site: str = "",
    precision: str = "fp32",
    like: Adapter | None = None,
    half: str = "",
    lower: bool = False,
) -> Reply:
    """The reply, under the name `site` that the hub registered, else under its own.

    like: what it has to look like where that is not an adapter like `sent`; then it has no length that says anything.
    half, lower: it holds this half alone (lora.half), and may say that it is of a lower rank; the rest, which the site
    did not train, is as it was sent.
    Errors: TRUST-01, -11, -12, HUB-04, HUB-05, ADAPTER-01, -02 or -03, with a sentence that says what is wrong with it.
    """
    _refuse_error(message)
    content = message.content
    told: Mapping[str, object] = content.config_records.get("info", ConfigRecord())
    info = {name: value for name in ("site", "applied", "gpu") if isinstance(value := told.get(name), str)}
    numbers, left_out = metrics.sane(content.metric_records.get("metrics", {}))
    wrong = [name for name in metrics.needed(numbers) if name not in numbers]
    images = numbers.get("num-examples")
    if wrong or type(images) is not int:
        found = f"{', '.join(wrong) or 'num-examples'} is not a sensible number"
        raise unreadable("its metrics are missing or impossible", found)
    if info.get("applied") != sent_hash:
        raise AdapterError(
            "ADAPTER-03",
            found=f"it applied {info.get('applied', 'nothing')[:16]}, the hub sent {sent_hash[:16]}",
            fix="update that site to the hub's version",
        )
    adapter = unpack(content.array_records.get("arrays"), precision) if training else None
    rank, norm, share = _rank(told.get("rank", 0), sent, lower), 0.0, 1.0
    if adapter is not None and like is not None:
        check_adapter(adapter, like)
    elif adapter is not None:
        check_adapter(adapter, asked := lora.part(sent, half, rank))
        norm, share = update_norm(adapter, asked), _numbers(asked) / _numbers(lora.part(sent, half))
        adapter = lora.filled(adapter, sent) if half or rank else adapter
    name = site or text.line(info.get("site", ""), NAME) or str(message.metadata.src_node_id)
    gpu = text.line(info.get("gpu", ""), NAME)
    return Reply(name, adapter, images, numbers, norm, gpu, left_out, rank=rank, share=share)


def _rank(told: object, sent: Adapter, lower: bool) -> int:
    """The rank that a site says it trained; 0 is the run's. Errors: HUB-05."""
    if told == 0:
        return 0
    if not lower:
        raise unreadable("it trained a rank of its own, which strategy=svd alone can take", told)
    if type(told) is not int or not 1 <= told <= max(lora.ranks_of(sent).values()):
        raise unreadable("it trained a rank that the run's adapter has no room for", told)
    return told


def _numbers(adapter: Adapter) -> int:
    return sum(value.numel() for value in adapter.values())


def accept_offer(message: Message, site: str, asked: tuple[str, int, int], admitted: Mapping[str, int]) -> Reply:
    """A site's key for the (run, round, try) that was asked for; the sites themselves check whose it is.

    Errors: TRUST-01, HUB-04; HUB-05 where it is no such key, is another site's, or counts for more images than the site
    was admitted with: what a hidden update weighs, the hub cannot bound.
    """
    _refuse_error(message)
    told = message.content.config_records.get("info", ConfigRecord()).get("offer")
    try:
        offer = masks.read(str(told))
    except ValueError as error:
        raise unreadable(str(error), told) from None
    key = offer.key
    if (key.run, key.round, key.attempt) != asked or key.site != (site or key.site):
        raise unreadable("it offers a key for something else", f"{key.site}, {key.run}, {key.round}, {key.attempt}")
    if key.images > admitted.get(key.site, key.images):
        raise HubError(
            "HUB-05",
            why="it has more images than it was admitted with, and a hidden update cannot be bounded",
            found=f"{key.images}, admitted with {admitted[key.site]}",
            fix="admit it with as many as it has (bouquet hub admit NAME KEY.pub --images N)",
        )
    return Reply(text.line(key.site, NAME), None, key.images, {}, offer=offer.text)


def unreadable(why: str, found: object) -> HubError:
    """A reply that no site of the hub's version sends."""
    fix = "update that site to the hub's version"
    return HubError("HUB-05", why=why, found=text.line(found), fix=fix)


def _refuse_error(message: Message) -> None:
    """Errors: TRUST-01, -11, -12 or HUB-04 for an error in place of a reply."""
    if message.has_error() and message.error.code == ErrorCode.INVALID_FAB:
        raise HubError(
            "TRUST-01",
            why=UNTRUSTED.get((message.error.reason or "")[:8], "no publisher that it pins has signed this bundle"),
            found="Flower's error 7, the bundle could not be verified",
            fix=(
                "sign the checkout (bouquet hub sign, or --again) and run again; a site pins publishers in its"
                " trusted.yaml"
            ),
        )
    if message.has_error() and _reason(message).startswith("TRUST-11"):
        raise HubError("TRUST-11", found="an error reply", fix="wait, or ask that site's operator")
    if message.has_error() and _reason(message).startswith("TRUST-12"):
        raise HubError("TRUST-12", found="an error reply", fix="ask that site's operator, or run without it: sites")
    if message.has_error():
        raise HubError(
            "HUB-04",
            reason=_reason(message),
            found="an error reply",
            fix="read that site's log",
        )


def _reason(message: Message) -> str:
    """An error's public text; Flower wraps an exception as <class '…'>:<'text'>."""
    reason = (message.error.reason or f"error code {message.error.code}")[: 4 * text.MOST]
    return text.line(reason.split(":<'", 1)[-1].removesuffix("'>"))


def update_norm(new: Adapter, old: Adapter) -> float:
    """Euclidean length of a site's update, in float64."""
    return math.sqrt(sum((new[key].double() - old[key].double()).square().sum().item() for key in sorted(old)))


def guard_norms(
    replies: Iterable[Reply], earlier: Iterable[float], bound: float
) -> tuple[list[Reply], list[tuple[Reply, str]]]:
    """The replies whose update is at most `bound` times the median one, and the others with a reason (ADAPTER-04).

    The median is that of this round's updates and the `earlier` accepted ones; of an even number, the lower middle, so
    that of two sites the larger is measured by the smaller. bound = 0 keeps all.
    """
    replies = list(replies)
    norms = [reply.pace for reply in replies] + list(earlier)
    middle = statistics.median_low(norms) if norms else 0.0
    kept, refused = [], []
    for reply in replies:
        if bound and reply.pace > bound * middle:
            times = min(reply.pace / middle, 1e9) if middle else math.inf
            refused.append((reply, public("ADAPTER-04", times=f"{times:.1f}")))
        else:
            kept.append(reply)
    return kept, refused


def weigh(replies: Iterable[Reply], admitted: Mapping[str, int], largest_share: float) -> list[Reply]:
    """Each reply with the images it counts for: no more than the site was admitted with, no more than `largest_share`
    of all.

    largest_share is at least a half, so that at most one site can exceed it; among fewer than two sites there are no
    shares.
    """
    counted = [_at_most(r, admitted.get(r.site, r.images), metrics.ADMITTED) for r in replies]
    total = sum(r.images for r in counted)
    if len(counted) < 2 or largest_share >= 1:
        return counted
    return [_at_most(r, metrics.most_images(total - r.images, largest_share), metrics.SHARE) for r in counted]


def _at_most(reply: Reply, most: int, bound: str) -> Reply:
    return replace(reply, images=most, bound=bound) if reply.images > most else reply
