"""The sites as a run's hub sees them: who is there, by which name, what came of them, and what is said of them.

Enters: Flower's Grid, the names that were admitted. Leaves: node ids and names, replies as they came, `status.json` on
the shared volume (who has replied, who is missing and since when, the deadline, how long the missing ones took the last
time) and lines on the run's output. More is not known while a site works: Flower's SuperNode takes no other message
until it has replied to the one that it has. Errors: HUB-01 (too few came), HUB-05 (unreadable), HUB-10 (unknown names).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from flwr.app import Message
from flwr.serverapp import Grid

from app import text
from app.config import RunConfig
from app.errors import BouquetError, HubError
from app.hub import guard, history
from app.hub.history import STATUS, Refused, Status
from app.hub.spool import Spool

PATIENCE = 60.0  # seconds for which a SuperLink that cannot answer now is asked again
MOST_NAMED = 20  # sites in one sentence


def listed(parts: Iterable[str], between: str = ", ") -> str:
    """The first of them, and how many more there are."""
    parts = list(parts)
    more = [f"and {len(parts) - MOST_NAMED} more"] if len(parts) > MOST_NAMED else []
    return between.join(parts[:MOST_NAMED] + more)


class Sites:
    """Who is there, and what of them is written down."""

    def __init__(self, grid: Grid, config: RunConfig, folder: Path, admitted: Iterable[str] = ()) -> None:
        """admitted: names of the sites that may come, where the hub knows them."""
        self.grid, self.config, self.file, self.known = grid, config, folder / STATUS, set(admitted)
        self.admitted = sorted(self.known & (config.chosen or self.known))
        self.undecided: set[str] = set()  # sites whose operator had not decided by the end of the last try
        self.declined: set[str] = set()  # sites whose operator had declined then
        self.lasted: dict[int, float] = {}  # node id -> seconds from its last message to its reply
        self.registered: dict[int, str] = {}  # node id -> the name that the hub's operator gave it, "" for none
        self.told: set[str] = set()  # what is said once a run
        self.status = Status(folder.name)
        self.spool = Spool(folder)

    def wait_for_sites(self) -> list[int]:
        """The nodes that are online, at least `min-sites` of them. Errors: HUB-01, which says who is there and who is
        missing.
        """
        deadline, told = time.time() + self.config.wait_for_sites, False
        while len(nodes := self.online()) < self.config.min_sites:
            came = [self.name(node) for node in nodes]
            here, missing = listed(came) or "none", [name for name in self.admitted if name not in came]
            if time.time() > deadline:
                raise HubError(
                    "HUB-01",
                    came=len(nodes),
                    needed=self.config.min_sites,
                    seconds=self.config.wait_for_sites,
                    who=f"Here: {here}." + (f" Missing: {listed(missing)}." if missing else ""),
                    found=f"{len(nodes)} SuperNodes online: {here}",
                    fix=(
                        "start the missing sites (bouquet hub sites shows which), raise wait-for-sites, or lower"
                        " min-sites"
                    ),
                )
            if not told:
                print(
                    f"bouquet: waiting for sites  {len(nodes)} of {self.config.min_sites} are here: {here}", flush=True
                )
                self.note(
                    state="waiting for sites", since=time.time(), deadline=deadline, replied=(), missing=tuple(missing)
                )
                told = True
            time.sleep(1)
        return nodes

    def online(self) -> list[int]:
        """The nodes that are there; notes the names they were registered under."""
        known = self.ask(self.grid.get_nodes)
        self.registered |= {info.node_id: text.line(info.name, guard.NAME) for info in known}
        asked = self.config.chosen
        return sorted(n for n in self.ask(self.grid.get_node_ids) if not asked or self.name(n) in asked)

    def check_chosen(self) -> None:
        """Every site that the run names is one of the hub's. Errors: HUB-10."""
        if not self.config.chosen:
            return
        self.online()
        known = self.known or set(filter(None, self.registered.values()))
        if unknown := sorted(self.config.chosen - known):
            raise HubError(
                "HUB-10",
                names=listed(unknown),
                found=f"sites = {self.config.sites!r}; the hub knows {listed(sorted(known)) or 'none by name'}",
                fix="name them as bouquet hub sites does, or leave sites out for all",
            )

    def name(self, node: int) -> str:
        """The name a node was registered under, else its number."""
        return self.registered.get(node) or f"node {node}"

    def site_of(self, node: int) -> str:
        """The name that a node's replies go by; "" for the one that it gives itself."""
        return "" if self.by_own_name else self.name(node)

    @property
    def by_own_name(self) -> bool:
        """Whether a site goes by the name it gives itself: only where the hub has no names, as in a simulation."""
        return not self.admitted and not any(self.registered.values())

    def ask(self, call: Callable[..., Any], *args: Any) -> Any:
        """What the SuperLink answers; where it cannot answer now (its database is locked), it is asked again for a
        minute.
        """
        end = time.time() + PATIENCE
        while True:
            try:
                return call(*args)
            except httpx.HTTPStatusError as error:
                if error.response.status_code < 500 or time.time() > end:
                    raise
                time.sleep(1)

    def pull(self, message_id: str) -> Message | None:
        """The reply to one message, or None as long as there is none. Errors: HUB-05 when Flower cannot make a message
        of it.
        """
        try:
            return next(iter(self.ask(self.grid.pull_messages, [message_id])), None)
        except (httpx.HTTPError, BouquetError):
            raise
        except Exception as error:  # a site chooses the bytes, and Flower's readers fail on them in as many ways
            raise guard.unreadable(type(error).__name__, error) from None

    def say(self, line: str, more: str = "") -> None:
        """A line on the run's output, once a run whatever `more` is by then."""
        if line not in self.told:
            self.told.add(line)
            print(line + more, flush=True)

    def note(self, **news: Any) -> None:
        """Say on the shared volume what the run is doing; a full disk does not stop it."""
        self.status = replace(self.status, **news, time=time.time())
        with contextlib.suppress(OSError):
            history.write(self.file, self.status)

    def note_who(self, replies: Iterable[guard.Reply], missing: Iterable[int]) -> None:
        took = {self.name(node): round(self.lasted[node], 1) for node in missing if node in self.lasted}
        here = tuple(sorted(reply.site for reply in replies))
        waits, declined = tuple(sorted(self.undecided)), tuple(sorted(self.declined))
        who = tuple(sorted(map(self.name, missing)))
        self.note(replied=here, missing=who, took=took, undecided=waits, declined=declined)

    def tell_of_wait(self, kind: str, number: int, seconds: float, replied: int, missing: Iterable[int]) -> None:
        """All that a hub knows of sites that work: how long already, and how long the last time."""
        last = {node: f" ({seconds:.0f} s the last time)" for node, seconds in self.lasted.items()}
        names = sorted(self.name(node) + last.get(node, "") for node in missing)
        what = f"round {number}" if kind == "train" else "last evaluation"
        print(f"bouquet: {what} waits  {seconds:.0f} s so far  replied {replied}  not yet {listed(names)}", flush=True)

    def refuse(self, site: str, reason: str) -> Refused:
        print(f"bouquet: refused  {site}: {reason}", flush=True)
        return Refused(site, reason)
