"""Attacks on who may take part: keys that nobody admitted, other sites' keys and ids, headers that were said before."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric import ed25519
from flwr.proto.control_pb2 import RegisterNodeRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node

from benchmarks.access.attacks import REFUSED, REMAINS, Hub, Result, attack
from benchmarks.hostile import CONTROL, FLEET, new_key, public, signed

SITES_CALLS = (
    "activate-node", "confirm-message-received", "deactivate-node", "get-fab", "get-run", "pull-messages",
    "pull-object", "push-messages", "push-object", "send-node-heartbeat",
)  # fmt: skip


@attack("join", "a key that nobody admitted: a SuperNode's register-node, then activate-node")
def stranger_joins(hub: Hub) -> Result:
    key = new_key()
    registered = hub.fleet("register-node", RegisterNodeFleetRequest(public_key=public(key)), key)
    active = hub.fleet("activate-node", ActivateNodeRequest(public_key=public(key), heartbeat_interval=30), key)
    return Result.of(active.status == 200, f"{registered}; then {active}")


@attack("join", "self-registration from outside, as `flwr supernode register`: POST /v1/control/register-node")
def registers_itself(hub: Hub) -> Result:
    answer = hub.door.call(CONTROL + "register-node", RegisterNodeRequest(public_key=public(new_key()), name="site-9"))
    return Result.of(answer.status == 200, answer)


@attack("join", "wrong key: an admitted site's public key, the timestamp signed by another", "site_key")
def wrong_key(hub: Hub) -> Result:
    request = PullMessagesRequest(node=Node(node_id=hub.site_id))
    assert hub.fleet("pull-messages", request, hub.site_key).status == 200, "the right key must be let in"
    other = ed25519.Ed25519PrivateKey.generate()
    headers = [signed(new_key(), claims=hub.site_key), signed(new_key()), signed(new_key(), claims=other)]
    headers.append({**signed(hub.site_key), "flwr-signature": ""})
    answers = [hub.door.call(FLEET + "pull-messages", request, each) for each in headers]
    return Result.of(
        any(answer.status == 200 for answer in answers), "; ".join(sorted({str(answer) for answer in answers}))
    )


@attack(
    "join",
    "another node's id: an admitted site asks for another site's messages and beats its heart",
    "site_key",
    "operator",
)
def another_id(hub: Hub) -> Result:
    own = hub.site_id
    for_itself = hub.fleet("pull-messages", PullMessagesRequest(node=Node(node_id=own)), hub.site_key)
    assert for_itself.status == 200, for_itself
    [other, *_] = set(hub.sites()) - {own}
    requests = {
        "pull-messages": PullMessagesRequest(node=Node(node_id=other)),
        "send-node-heartbeat": SendNodeHeartbeatRequest(node=Node(node_id=other), heartbeat_interval=1800),
    }
    answers = [hub.fleet(call, request, hub.site_key) for call, request in requests.items()]
    return Result.of(any(answer.status == 200 for answer in answers), f"{answers[0]}; for its own id 200")


@attack("join", "no key: each of the 10 calls of a SuperNode without a signature")
def no_key(hub: Hub) -> Result:
    answers = [hub.door.send("POST", FLEET + call) for call in SITES_CALLS]
    return Result.of(
        any(answer.status < 400 for answer in answers), "; ".join(sorted({str(answer) for answer in answers}))
    )


@attack("join", "replayed signed header after its window: signed 310 s ago, and 60 s ahead", "site_key")
def late_replay(hub: Hub) -> Result:
    request = PullMessagesRequest(node=Node(node_id=hub.site_id))
    answers = [hub.fleet("pull-messages", request, hub.site_key, age=age) for age in (310, -60)]
    return Result.of(any(answer.status == 200 for answer in answers), answers[0])


@attack(
    "join",
    "replayed signed header within its window: one header 2 s old, ten connections, ten different calls",
    "site_key",
)
def replay(hub: Hub) -> Result:
    """Flower's signature covers the timestamp alone: who reads one header (broke TLS, or owns the gateway) is that site
    while it holds.
    """
    own, header = Node(node_id=hub.site_id), signed(hub.site_key, age=2)
    named = {
        "activate-node": ActivateNodeRequest(public_key=public(hub.site_key)),
        "deactivate-node": DeactivateNodeRequest(node_id=own.node_id),
    }
    any_other = PullMessagesRequest(node=own)  # the first field of every other request: who asks
    answers = {call: hub.door.call(FLEET + call, named.get(call, any_other), header) for call in SITES_CALLS}
    believed = [call for call, answer in answers.items() if answer.status not in (0, 401, 404)]
    return Result(
        REMAINS if believed else REFUSED,
        f"{len(believed)} of {len(SITES_CALLS)} calls believed, until 305 s after it was signed",
    )
