"""What an attack is, and whether it got through: the hub under attack, an attack's result, the list of attacks.

Enters: a Hub. Leaves: a Result an attack. "Got through" is decided by what exists afterwards wherever something can:
try_all() compares the hub's sites and runs, as its own operator sees them, before and after every attack. The attacks
themselves: join.py, run.py, door.py, load.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.proto.control_pb2 import ListNodesRequest, ListNodesResponse, ListRunsRequest, ListRunsResponse
from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse

from app.errors import BouquetError
from benchmarks.hostile import CONTROL, FLEET, Answer, Door, Key, public, signed

REFUSED, THROUGH, REMAINS, UNTRIED = "refused", "got through", "remains", "not tried"


@dataclass(frozen=True)
class Result:
    verdict: str
    got: str

    @classmethod
    def of(cls, through: object, got: object) -> Result:
        return cls(THROUGH if through else REFUSED, str(got))


@dataclass(eq=False)  # each is itself: what an attack found may be kept for the next
class Hub:
    """A hub under attack. What is None or empty is unknown, and the attacks that need it are not tried."""

    door: Door
    operator: Door | None = None  # where the hub's operator sees sites and runs
    site_key: Key | None = None  # an admitted site that attacks
    inside: Callable[[str, list[str]], str] | None = None  # (service, command) -> its output in that container
    # command -> its output in a container of a network that is none of the hub's
    elsewhere: Callable[[list[str]], str] | None = None
    # the same, each time with an address of its own, on the network of the hub's own sites
    beside: Callable[[list[str]], str] | None = None
    others: dict[str, str] = field(default_factory=dict)  # what else a stranger might reach: name -> host:port
    from_site: str = ""  # the hub's address for its own SuperNodes
    supernode: list[str] = field(default_factory=list)  # the command that starts a SuperNode
    publisher: Ed25519PrivateKey | None = None  # whose signature the hub's sites trust
    signatures: Path | None = None  # where the hub takes signatures from
    started: set[int] = field(default_factory=set)  # runs that its own operator started, for an attack on the sites

    def must_answer(self) -> None:
        """A door that is shut to everybody would refuse every attack. Errors: HOST-12."""
        answer = self.door.send("POST", FLEET + "pull-messages")
        if answer.status in (0, 502, 503, 504):
            found = f"{self.door.host}:{self.door.port} answers an ordinary call with: {answer}"
            raise BouquetError(
                "HOST-12",
                found=found,
                fix="is it up, and is --ca its CA? A hub that answers nobody proves nothing",
            )

    def sites(self) -> dict[int, str]:
        """Registered sites: node id -> status, as the operator sees them."""
        answer = self.operator.call(CONTROL + "list-nodes", ListNodesRequest())
        assert answer.status == 200, answer
        return {node.node_id: node.status for node in ListNodesResponse.FromString(answer.body).nodes_info}

    def runs(self) -> dict[int, tuple[str, str]]:
        """Run id -> (status, details)."""
        answer = self.operator.call(CONTROL + "list-runs", ListRunsRequest())
        assert answer.status == 200, answer
        return {
            number: (run.status.status, run.status.details)
            for number, run in ListRunsResponse.FromString(answer.body).run_dict.items()
        }

    @cached_property
    def site_id(self) -> int:
        """The attacker's own site: what activate-node answers its key. An online site's second activation is refused,
        so once.
        """
        answer = self.fleet(
            "activate-node", ActivateNodeRequest(public_key=public(self.site_key), heartbeat_interval=30), self.site_key
        )
        assert answer.status == 200, f"the attacker's own site must be admitted: {answer}"
        return ActivateNodeResponse.FromString(answer.body).node_id

    def fleet(self, call: str, message, key: Key | None = None, **how) -> Answer:
        return self.door.call(FLEET + call, message, signed(key, **how) if key else {})

    @cached_property
    def own(self) -> set[int]:
        """The sites that are online before anything is tried."""
        return {node for node, status in self.sites().items() if status == "online"}

    def peak(self) -> int:
        """The SuperLink's highest resident memory so far, MB."""
        lines = self.inside("superlink", ["sh", "-c", "grep -h VmHWM /proc/[0-9]*/status"]).splitlines()
        return max(int(line.split()[1]) for line in lines) // 1024

    def links(self) -> int:
        """Connections that the SuperLink holds on its port 8000 (0x1F40)."""
        lines = self.inside("superlink", ["cat", "/proc/net/tcp", "/proc/net/tcp6"]).splitlines()
        return sum(line.split()[1].endswith(":1F40") and line.split()[3] == "01" for line in lines)


@dataclass(frozen=True)
class Attack:
    group: str
    name: str
    needs: tuple[str, ...]
    run: Callable[[Hub], Result]


ATTACKS: list[Attack] = []


def attack(group: str, name: str, *needs: str) -> Callable:
    """Puts a function into the list; needs: what the Hub must know for it."""
    return lambda function: ATTACKS.append(Attack(group, name, needs, function)) or function


def try_all(hub: Hub, groups: set[str], tell: Callable[[str], None]) -> dict[str, Result]:
    """Every attack of these groups (none: of all), one after the other; a site or a run that is there afterwards and
    was not before is one that got through.
    """
    results = {}
    hub.must_answer()
    assert not hub.operator or len(hub.own) == 2, "the hub's two sites must be online"
    for each in (each for each in ATTACKS if not groups or each.group in groups):
        if missing := [need for need in each.needs if not getattr(hub, need)]:
            results[each.name] = Result(UNTRIED, f"needs {', '.join(missing)}")
            continue
        hub.must_answer()
        before, start = hub.operator and (set(hub.sites()), set(hub.runs())), time.monotonic()
        result = each.run(hub)
        if before:
            sites, runs = set(hub.sites()) - before[0], set(hub.runs()) - before[1] - hub.started
            grown = ", ".join(f"{len(new)} new {what}" for what, new in (("sites", sites), ("runs", runs)) if new)
            result = Result(THROUGH, f"{result.got}; {grown} at the hub") if grown else result
        results[each.name] = result
        tell(f"{time.monotonic() - start:3.0f} s  {each.group}: {each.name}: {result.verdict}, {result.got}")
    return results
