"""Attacks by too much and too slowly: what one or several strangers without a key can take of the hub's memory and
connections.
"""

from __future__ import annotations

import json
from functools import cache

from flwr.proto.fleet_pb2 import PullMessagesRequest

from benchmarks.access.attacks import Hub, Result, attack
from benchmarks.access.door import at_once, probe
from benchmarks.access.spellings import ALLOWED, MEDIA
from benchmarks.hostile import drip, stream_body
from bouquet import ROOT

GIGABYTE = 2**30
SLOW = 64  # connections of each kind
BODY = 5_500_000  # bytes; the gateway lets 6 MB pass
ADDRESSES = 6
MEMORY = 4096  # MB, the SuperLink's limit in compose.yaml
PATIENCE = 13  # seconds; the gateway cuts a header at 10


def big_body(hub: Hub, size: int, chunked: bool) -> Result:
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
    before = hub.inside and hub.peak()
    head = f"POST {ALLOWED} HTTP/1.1\r\nHost: x\r\nContent-Type: {MEDIA}\r\n{length}\r\n\r\n"
    sent, answer = stream_body(hub.door, head.encode(), size, chunked)
    memory = f"; SuperLink's peak {before} -> {hub.peak()} MB" if hub.inside else ""
    return Result.of(sent >= size, f"{answer.status or answer} after {sent / 2**20:.1f} MB{memory}")


@attack("load", "1 GB body without a key, its length announced")
def big_announced(hub: Hub) -> Result:
    return big_body(hub, GIGABYTE, chunked=False)


@attack("load", "1 GB body without a key, in chunks")
def big_chunked(hub: Hub) -> Result:
    return big_body(hub, GIGABYTE, chunked=True)


def tally(statuses: list) -> str:
    return ", ".join(f"{statuses.count(status)} x {status or 'cut off'}" for status in sorted(set(statuses)))


@attack("load", "96 bodies of 5.5 MB without a key, 24 at a time", "inside")
def many_bodies(hub: Hub) -> Result:
    """Each is small enough for the gateway, and a message as far as protobuf knows. Got through: more than 1 GB of
    memory for them.
    """
    before, body = hub.peak(), PullMessagesRequest(message_ids=["x" * BODY]).SerializeToString()
    statuses = [answer.status for answer in at_once(lambda _: hub.door.send("POST", ALLOWED, body), range(96), 24)]
    after = hub.peak()
    return Result.of(
        after - before > 1024 or 200 in statuses, f"{tally(statuses)}; SuperLink's peak {before} -> {after} MB"
    )


@attack("load", f"such bodies from {ADDRESSES} addresses at once, 24 from each", "inside", "beside")
def bodies_from_everywhere(hub: Hub) -> Result:
    """From the hub's inner network, where each has an address of its own: no limit by address helps. Got through: the
    SuperLink ended, took more memory than its container may, or no site is answered.
    """
    before, born = hub.peak(), started(hub)
    head = PullMessagesRequest(message_ids=["x" * BODY]).SerializeToString()[:-BODY]
    flood = {"address": hub.from_site, "path": ALLOWED, "head": head.hex(), "size": BODY, "count": 24}
    command = ["python", "-c", (ROOT / "benchmarks/access/flood.py").read_text(), json.dumps(flood)]
    statuses = [status for said in at_once(hub.beside, [command] * ADDRESSES) for status in json.loads(said)]
    after, site, same = hub.peak(), served(hub), started(hub) == born
    got = (
        f"{tally(statuses)}; SuperLink's peak {before} -> {after} MB{'' if same else ', and it was started anew'};"
        f" afterwards a site was answered {site}"
    )
    return Result.of(not same or after > MEMORY or site != "401", got)


def started(hub: Hub) -> str:
    """When the SuperLink's container began."""
    return hub.inside("superlink", ["stat", "-c", "%Y", "/proc/1"])


def slow(hub: Hub, heads: slice) -> Result:
    """Got through: the SuperLink itself held such connections (without a look inside: more than 32 were held), or a
    site was not answered.
    """
    times, (links, answer) = slowness(hub)
    held = sum(seconds >= PATIENCE for seconds in times[heads])
    ended = max((seconds for seconds in times[heads] if seconds < PATIENCE), default=0)
    got = f"{held} of {SLOW} still open after {PATIENCE} s" + (
        f", the others ended by {ended:.0f} s" if held < SLOW else ""
    )
    if not hub.inside:
        return Result.of(held > 32, got)
    return Result.of(
        links > SLOW / 2 or answer != "401",
        f"{got}; the SuperLink held {links} of all {2 * SLOW}; meanwhile a site was answered {answer}",
    )


@cache
def slowness(hub: Hub) -> tuple[list[float], tuple[int, str]]:
    """Both kinds of slow client at once: their times, and (the SuperLink's connections more than before, what a site
    was answered).
    """
    head = f"POST {ALLOWED} HTTP/1.1\r\nHost: x\r\nContent-Type: {MEDIA}\r\n"
    heads = [f"{head}X-Slow: ".encode()] * SLOW + [f"{head}Content-Length: 100000\r\n\r\n".encode()] * SLOW
    before = hub.links() if hub.inside else 0
    return drip(
        hub.door, heads, PATIENCE, lambda: (max(0, hub.links() - before), served(hub)) if hub.inside else (0, "")
    )


def served(hub: Hub) -> str:
    """What one of the hub's sites is answered, from its own address: 401 by the SuperLink, to a call without a
    signature.
    """
    shown = json.loads(hub.inside("supernode-1", probe({"hub": hub.from_site}, ["POST " + ALLOWED])))
    return str(shown["hub"] if isinstance(shown["hub"], str) else shown["hub"]["POST " + ALLOWED][0])


@attack("load", f"slow header: {SLOW} connections, a byte a second")
def slow_header(hub: Hub) -> Result:
    return slow(hub, slice(0, SLOW))


@attack("load", f"slow body: {SLOW} connections, a byte a second")
def slow_body(hub: Hub) -> Result:
    return slow(hub, slice(SLOW, None))


@attack("load", "all of that, to put one of the hub's own sites offline", "operator")
def sites_afterwards(hub: Hub) -> Result:
    online = {node for node, status in hub.sites().items() if status == "online"} & hub.own
    return Result.of(online != hub.own, f"{len(online)} of {len(hub.own)} online")
