"""One message to every site that is there, and what came back in time.

Enters: an adapter and Flower's Grid. Leaves: the valid replies by site name, the refused ones with their reasons, and,
while it waits, `status.json` on the shared volume: who has replied, who is missing and since when, the deadline, how
long the missing ones took the last time. A wait that lasts is told on the run's output too, ever less often. More is
not known while a site works: Flower's SuperNode takes no other message until it has replied to the one that it has.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from app import model, text, wire
from app.config import RunConfig
from app.errors import BouquetError, HubError, public
from app.hub import guard, history
from app.hub.bounds import bound_replies
from app.hub.history import STATUS, Refused, Status
from app.hub.spool import Spool

# seconds between looks for replies, or as many as a look took: with hundreds of sites each look is hundreds of calls
POLL = 0.5
UNSENT = "because the SuperLink did not take its message"
LEAST = 60.0  # seconds that a round may always take
MOST_NAMED = 20  # sites in one sentence
FIRST_WORD = 20.0  # seconds of a wait before a word of it
LONGEST_SILENCE = 320.0  # seconds between two words, each silence being twice the one before
AGAIN, LONGEST_PAUSE = 10.0, 60.0  # seconds until a site whose operator has not decided is asked again, first and last
REST = 2**20  # bytes of a reply beside its adapter: names, numbers, the objects' frames


def _listed(parts: Iterable[str], between: str = ", ") -> str:
    """The first of them, and how many more there are."""
    parts = list(parts)
    more = [f"and {len(parts) - MOST_NAMED} more"] if len(parts) > MOST_NAMED else []
    return between.join(parts[:MOST_NAMED] + more)


class Exchange:
    """A run's conversation with its sites."""

    def __init__(
        self,
        grid: Grid,
        config: RunConfig,
        base_fingerprint: str,
        folder: Path,
        admitted: Iterable[str] = (),
        bounds: Mapping[str, int] = {},
    ) -> None:
        """admitted: names of the sites that may come, where the hub knows them; bounds: the images of some."""
        self.grid, self.config, self.base, self.file = grid, config, base_fingerprint, folder / STATUS
        self.known, self.bounds = set(admitted), bounds
        self.admitted = sorted(self.known & (config.chosen or self.known))
        self.summed: list[guard.Reply] = []  # one in place of a round's, where the sites hide theirs (sums.py)
        self.undecided: set[str] = set()  # sites whose operator had not decided by the end of the last try
        self.declined: set[str] = set()  # sites whose operator had declined then
        self.spool = Spool(folder)
        self.took: list[float] = []  # seconds of the rounds that went well
        self.lasted: dict[int, float] = {}  # node id -> seconds from its last message to its reply
        self.norms: list[float] = []  # lengths of the accepted updates
        self.registered: dict[int, str] = {}  # node id -> the name that the hub's operator gave it, "" for none
        self.told: set[str] = set()  # what is said once a run
        self.status = Status(folder.name)

    def round(self, number: int, adapter: model.Adapter) -> tuple[list[guard.Reply], list[Refused]]:
        """A round's valid replies, after as many tries as the config allows. Errors: HUB-01, HUB-02."""
        all_refused = []
        for attempt in range(self.config.round_retries + 1):
            start = time.monotonic()
            kept, refused = self.attempt(number, adapter, attempt)
            all_refused += refused
            if len(kept) >= self.config.min_sites:
                self.took.append(time.monotonic() - start)
                # of the last three rounds
                self.norms = (self.norms + [reply.norm for reply in kept])[-3 * len(kept) :]
                return kept, all_refused
            if refused and all(entry.reason.startswith("TRUST-01") for entry in refused):
                break  # an unsigned bundle stays unsigned
            if self.declined and len(kept) + len(refused) + len(self.undecided) < self.config.min_sites:
                break  # nobody else is there
            if attempt < self.config.round_retries:
                print(f"bouquet: round {number} again  {len(kept)} of {self.config.min_sites} needed", flush=True)
        raise self._too_few(number, len(kept), refused)

    def attempt(self, number: int, adapter: model.Adapter, attempt: int) -> tuple[list[guard.Reply], list[Refused]]:
        """One try of a round: the replies that hold."""
        replies, refused = self.send("train", number, adapter, attempt)
        kept, long = guard.guard_norms(replies, self.norms, self.config.norm_bound)
        return kept, refused + [self._refuse(reply.site, reason) for reply, reason in long]

    def last(self, number: int, adapter: model.Adapter) -> tuple[list[guard.Reply], list[Refused]]:
        """What the sites say of the result. Errors: HUB-01, HUB-02."""
        replies, refused = self.send("evaluate", number, adapter)
        if len(replies) < self.config.min_sites:
            raise self._too_few(number, len(replies), refused)
        return replies, refused

    def send(
        self,
        kind: str,
        number: int,
        adapter: model.Adapter,
        attempt: int = 0,
        *,
        nodes: list[int] | None = None,
        order: Mapping[str, Any] = {},
        accept: Callable[[Message, int], guard.Reply] | None = None,
    ) -> tuple[list[guard.Reply], list[Refused]]:
        """One try: every site that is there gets one message; who has not answered by the deadline is refused.

        nodes: these sites alone; order: what the message says besides; accept: what takes a reply, in place of ours.
        A query has no adapter.
        """
        nodes = self.wait_for_sites() if nodes is None else nodes
        sent, timeout = model.adapter_hash(adapter), self.deadline()
        arrays = wire.pack(adapter, self.config.wire_precision)
        content = RecordDict({"config": ConfigRecord({"round": number, "base-fingerprint": self.base, **order})})
        if kind != "query":
            content["arrays"] = arrays
        waits_for = "train" if kind == "query" else kind  # it is a round's first half

        def push(to: list[int]) -> dict[str, int]:
            how: dict[str, Any] = {"message_type": kind, "ttl": timeout + 60, "group_id": str(number)}
            messages = [Message(content, dst_node_id=node, **how) for node in to]
            # '' where the SuperLink did not take one, [] where it took none
            ids = list(self._ask(self.grid.push_messages, messages)) if messages else []
            return {message_id: node for message_id, node in zip(ids, to, strict=False) if message_id}

        missing = push(nodes)
        undecided: dict[int, float] = {}  # node id -> when it is asked again
        pauses: dict[int, float] = {}
        self.undecided, self.declined = set(), set()
        most, end = 2 * len(arrays[wire.NAME].data), time.time() + timeout
        wire.bound_arrays(most)
        bound_replies(most + REST, end)
        replies: list[guard.Reply] = []
        untaken = [node for node in nodes if node not in missing.values()]
        refused = [self._refuse(self.name(node), public("HUB-03", why=UNSENT)) for node in untaken]
        began = time.time()
        self.note(
            state="waiting",
            kind=waits_for,
            round=number,
            attempt=attempt,
            since=began,
            deadline=end,
            refused=tuple(refused),
        )
        self._note_who(replies, missing.values())
        late, word, silence = False, began + FIRST_WORD, FIRST_WORD
        while (missing or (undecided and len(replies) < self.config.min_sites)) and not late:
            # one more look at the end: a reply that came slowly may have hidden another
            look, late = time.monotonic(), time.time() >= end
            if again := push([n for n, when in undecided.items() if when <= time.time() and not late]):
                missing |= again
                undecided = {n: when for n, when in undecided.items() if n not in again.values()}
            # one at a time: a reply that cannot be read spoils no other
            for message_id, node in list(missing.items()):
                try:
                    if (message := self._pull(message_id)) is None:
                        continue
                    if accept:
                        reply = accept(message, node)
                    else:
                        reply = self.accept(message, node, adapter, sent, training=kind == "train")
                    if reply.site in {other.site for other in replies}:
                        raise HubError(
                            "HUB-07",
                            found=reply.site,
                            fix="give each SuperNode its own site-name",
                        )
                except BouquetError as error:
                    if error.code == "TRUST-11":
                        pauses[node] = min(2 * pauses.get(node, AGAIN / 2), LONGEST_PAUSE)
                        undecided[node] = time.time() + pauses[node]
                        self.say(f"bouquet: waits for consent  {self.name(node)}: its operator has not decided yet")
                    elif error.code == "TRUST-12":
                        self.declined.add(self.name(node))
                        self.say(f"bouquet: declined  {self.name(node)}: its operator wants no part in this run")
                    else:
                        refused.append(self._refuse(self.name(node), str(error)))
                else:
                    replies.append(
                        replace(reply, adapter=self.spool.keep(node, reply.adapter)) if reply.adapter else reply
                    )
                    if kind != "query":
                        self.lasted[node] = time.time() - began
                del missing[message_id]
                self.undecided = set(map(self.name, undecided))
                self._note_who(replies, missing.values())
            if (missing or undecided) and not late:
                if missing and time.time() >= word:
                    self._tell_of_wait(waits_for, number, time.time() - began, len(replies), missing.values())
                    word, silence = time.time() + silence, min(2 * silence, LONGEST_SILENCE)
                time.sleep(max(POLL, time.monotonic() - look))
        reason = public("HUB-03", why=f"within {timeout:.0f} s")
        refused += [self._refuse(self.name(node), reason) for node in missing.values()]
        self.note(state="working", refused=tuple(refused))
        return sorted(replies, key=lambda reply: reply.site), refused

    def accept(
        self,
        message: Message,
        node: int,
        adapter: model.Adapter,
        sent: str,
        *,
        training: bool,
        like: model.Adapter | None = None,
    ) -> guard.Reply:
        """The node's reply. Errors: guard.accept's; HUB-05 for what it cannot read, as a site chooses every byte."""
        site, precision = self.site_of(node), self.config.wire_precision
        try:
            reply = guard.accept(message, adapter, sent, training=training, site=site, precision=precision, like=like)
        except BouquetError:
            raise
        except Exception as error:
            raise guard.unreadable(type(error).__name__, error) from None
        if reply.left_out:
            what = "numbers that no site of this version sends, or that cannot be true"
            self.say(f"bouquet: left out  {reply.site}: {what}", f": {reply.left_out}")
        return reply

    def deadline(self) -> float:
        """Seconds that the sites have: a multiple of the median earlier round, never more than `round-timeout`."""
        if not self.took or not self.config.round_patience:
            return float(self.config.round_timeout)
        return min(
            float(self.config.round_timeout), max(LEAST, self.config.round_patience * statistics.median(self.took))
        )

    def wait_for_sites(self) -> list[int]:
        """The nodes that are online, at least `min-sites` of them. Errors: HUB-01, which says who is there and who is
        missing.
        """
        deadline, told = time.time() + self.config.wait_for_sites, False
        while len(nodes := self.online()) < self.config.min_sites:
            came = [self.name(node) for node in nodes]
            here, missing = _listed(came) or "none", [name for name in self.admitted if name not in came]
            if time.time() > deadline:
                raise HubError(
                    "HUB-01",
                    came=len(nodes),
                    needed=self.config.min_sites,
                    seconds=self.config.wait_for_sites,
                    who=f"Here: {here}." + (f" Missing: {_listed(missing)}." if missing else ""),
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
        known = self._ask(self.grid.get_nodes)
        self.registered |= {info.node_id: text.line(info.name, guard.NAME) for info in known}
        asked = self.config.chosen
        return sorted(n for n in self._ask(self.grid.get_node_ids) if not asked or self.name(n) in asked)

    def check_chosen(self) -> None:
        """Every site that the run names is one of the hub's. Errors: HUB-10."""
        if not self.config.chosen:
            return
        self.online()
        known = self.known or set(filter(None, self.registered.values()))
        if unknown := sorted(self.config.chosen - known):
            raise HubError(
                "HUB-10",
                names=_listed(unknown),
                found=f"sites = {self.config.sites!r}; the hub knows {_listed(sorted(known)) or 'none by name'}",
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

    def _ask(self, call: Callable[..., Any], *args: Any) -> Any:
        """What the SuperLink answers; where it cannot answer now (its database is locked), it is asked again for a
        minute.
        """
        end = time.time() + LEAST
        while True:
            try:
                return call(*args)
            except httpx.HTTPStatusError as error:
                if error.response.status_code < 500 or time.time() > end:
                    raise
                time.sleep(1)

    def _pull(self, message_id: str) -> Message | None:
        """The reply to one message, or None as long as there is none. Errors: HUB-05 when Flower cannot make a message
        of it.
        """
        try:
            return next(iter(self._ask(self.grid.pull_messages, [message_id])), None)
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

    def _note_who(self, replies: Iterable[guard.Reply], missing: Iterable[int]) -> None:
        took = {self.name(node): round(self.lasted[node], 1) for node in missing if node in self.lasted}
        here = tuple(sorted(reply.site for reply in replies))
        waits, declined = tuple(sorted(self.undecided)), tuple(sorted(self.declined))
        who = tuple(sorted(map(self.name, missing)))
        self.note(replied=here, missing=who, took=took, undecided=waits, declined=declined)

    def _tell_of_wait(self, kind: str, number: int, seconds: float, replied: int, missing: Iterable[int]) -> None:
        """All that a hub knows of sites that work: how long already, and how long the last time."""
        last = {node: f" ({seconds:.0f} s the last time)" for node, seconds in self.lasted.items()}
        names = sorted(self.name(node) + last.get(node, "") for node in missing)
        what = f"round {number}" if kind == "train" else "last evaluation"
        print(f"bouquet: {what} waits  {seconds:.0f} s so far  replied {replied}  not yet {_listed(names)}", flush=True)

    def _refuse(self, site: str, reason: str) -> Refused:
        print(f"bouquet: refused  {site}: {reason}", flush=True)
        return Refused(site, reason)

    def _too_few(self, number: int, valid: int, refused: list[Refused]) -> HubError:
        consent = [Refused(site, public("TRUST-11")) for site in sorted(self.undecided)]
        consent += [Refused(site, public("TRUST-12")) for site in sorted(self.declined)]
        refused = refused + consent
        reasons = _listed((f"{r.site}: {r.reason}" for r in refused), "; ")
        return HubError(
            "HUB-02",
            number=number,
            valid=valid,
            needed=self.config.min_sites,
            reasons=reasons,
            found=f"{valid} valid, {len(refused)} refused or missing",
            fix='mend the sites named above, or lower min-sites, and run again with resume="latest"',
        )
