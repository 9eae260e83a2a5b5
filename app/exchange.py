"""One message to every site that is there, and what came back in time.

Enters: an adapter and Flower's Grid. Leaves: the valid replies by site name, the refused ones with their reasons, and, while it
waits, `status.json` on the shared volume: who has replied, who is missing and since when, the deadline.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import pull_objects
from flwr.superlink.grid import http_grid

from app import aggregate, checkpoint, model, wire
from app.config import RunConfig
from app.errors import BouquetError, HubError
from app.spool import Spool

POLL = 0.5  # seconds between looks for replies, or as many as a look took: with hundreds of sites each look is hundreds of calls
LEAST = 60.0  # seconds that a round may always take
# A reply is there before what is in it; Flower's Grid looks again after 1 s, 2 s, … up to 10, 500 times, for two hours at most.
http_grid.pull_objects = partial(pull_objects, initial_backoff=POLL / 10, backoff_cap=1.0, max_tries_per_object=None)


class Exchange:
    """A run's conversation with its sites."""

    def __init__(self, grid: Grid, config: RunConfig, base_fingerprint: str, folder: Path, admitted: Iterable[str] = ()) -> None:
        """admitted: names of the sites that may come, where the hub knows them."""
        self.grid, self.config, self.base, self.file = grid, config, base_fingerprint, folder / "status.json"
        self.admitted = sorted(admitted)
        self.spool = Spool(folder)
        self.took: list[float] = []  # seconds of the rounds that went well
        self.norms: list[float] = []  # lengths of the accepted updates
        self.status: dict[str, Any] = {"run": folder.name}

    def round(self, number: int, adapter: model.Adapter) -> tuple[list[aggregate.Reply], list[dict[str, str]]]:
        """A round's valid replies, after as many tries as the config allows. Errors: HUB-01, HUB-02."""
        all_refused = []
        for attempt in range(self.config.round_retries + 1):
            start = time.monotonic()
            replies, refused = self.send("train", number, adapter, attempt)
            kept, long = aggregate.guard_norms(replies, self.norms, self.config.norm_bound)
            refused += [self._refuse(reply.site, reason) for reply, reason in long]
            all_refused += refused
            if len(kept) >= self.config.min_sites:
                self.took.append(time.monotonic() - start)
                self.norms = (self.norms + [reply.norm for reply in kept])[-3 * len(kept) :]  # of the last three rounds
                return kept, all_refused
            if refused and all(entry["reason"].startswith("TRUST-01") for entry in refused):
                break  # an unsigned bundle stays unsigned
            if attempt < self.config.round_retries:
                print(f"bouquet: round {number} again  {len(kept)} of {self.config.min_sites} needed", flush=True)
        raise self._too_few(number, len(kept), refused)

    def last(self, number: int, adapter: model.Adapter) -> tuple[list[aggregate.Reply], list[dict[str, str]]]:
        """What the sites say of the result. Errors: HUB-01, HUB-02."""
        replies, refused = self.send("evaluate", number, adapter)
        if len(replies) < self.config.min_sites:
            raise self._too_few(number, len(replies), refused)
        return replies, refused

    def send(self, kind: str, number: int, adapter: model.Adapter, attempt: int = 0) -> tuple[list[aggregate.Reply], list[dict[str, str]]]:
        """One try: every site that is there gets one message; those that have not answered by the deadline are refused."""
        nodes, sent, timeout = self.wait_for_sites(), model.adapter_hash(adapter), self.deadline()
        names = self.names()
        arrays = wire.pack(adapter, self.config.wire_precision)
        content = RecordDict({"arrays": arrays, "config": ConfigRecord({"round": number, "base-fingerprint": self.base})})
        messages = [Message(content, dst_node_id=n, message_type=kind, ttl=timeout + 60, group_id=str(number)) for n in nodes]
        ids = list(self._ask(self.grid.push_messages, messages))  # '' where the SuperLink did not take one, [] where it took none
        missing = {message_id: node for message_id, node in zip(ids, nodes, strict=False) if message_id}
        wire.bound_arrays(2 * len(arrays[wire.NAME].data))
        replies: list[aggregate.Reply] = []
        refused = [self._refuse(names[node], "HUB-03  The SuperLink did not take its message.") for node in nodes if node not in missing.values()]
        end = time.time() + timeout
        self.note(state="waiting", kind=kind, round=number, attempt=attempt, since=time.time(), deadline=end, refused=refused)
        self._note_who(replies, [names[node] for node in missing.values()])
        while missing and time.time() < end:
            look = time.monotonic()
            for message_id, node in list(missing.items()):  # one at a time: a reply that cannot be read spoils no other
                name = names[node]
                try:
                    if (message := self._pull(message_id)) is None:
                        continue
                    site, precision = "" if name.isdecimal() else name, self.config.wire_precision
                    reply = aggregate.accept(message, adapter, sent, training=kind == "train", site=site, precision=precision)
                    if reply.site in {other.site for other in replies}:
                        raise HubError("HUB-07", "Another site has the same name.", found=reply.site, fix="give each SuperNode its own site-name")
                except BouquetError as error:
                    refused.append(self._refuse(name, str(error)))
                else:
                    replies.append(replace(reply, adapter=self.spool.keep(node, reply.adapter)) if reply.adapter else reply)
                del missing[message_id]
                self._note_who(replies, [names[node] for node in missing.values()])
            if missing:
                time.sleep(max(POLL, time.monotonic() - look))
        refused += [self._refuse(names[node], f"HUB-03  No reply within {timeout:.0f} s.") for node in missing.values()]
        self.note(state="working", refused=refused)
        return sorted(replies, key=lambda reply: reply.site), refused

    def deadline(self) -> float:
        """Seconds that the sites have: a multiple of the median earlier round, never more than `round-timeout`."""
        if not self.took or not self.config.round_patience:
            return float(self.config.round_timeout)
        return min(float(self.config.round_timeout), max(LEAST, self.config.round_patience * statistics.median(self.took)))

    def wait_for_sites(self) -> list[int]:
        """The nodes that are online, at least `min-sites` of them. Errors: HUB-01, which says who is there and who is missing."""
        deadline, told = time.time() + self.config.wait_for_sites, False
        while len(nodes := sorted(self._ask(self.grid.get_node_ids))) < self.config.min_sites:
            names = self.names()
            came = [names[node] for node in nodes]
            here, missing = ", ".join(came) or "none", [name for name in self.admitted if name not in came]
            if time.time() > deadline:
                raise HubError(
                    "HUB-01",
                    f"Only {len(nodes)} of {self.config.min_sites} sites came within {self.config.wait_for_sites} s. Here: {here}."
                    + (f" Missing: {', '.join(missing)}." if missing else ""),
                    found=f"{len(nodes)} SuperNodes online: {here}",
                    fix="start the missing sites (scripts/hub sites shows which), raise wait-for-sites, or lower min-sites",
                )
            if not told:
                print(f"bouquet: waiting for sites  {len(nodes)} of {self.config.min_sites} are here: {here}", flush=True)
                self.note(state="waiting for sites", since=time.time(), deadline=deadline, replied=[], missing=missing)
                told = True
            time.sleep(1)
        return nodes

    def names(self) -> dict[int, str]:
        """Node id -> the name a site was registered under, where the hub knows it; else the id as text."""
        known = {info.node_id: info.name for info in self._ask(self.grid.get_nodes)}
        return {node: known.get(node) or str(node) for node in {*known, *self._ask(self.grid.get_node_ids)}}

    def _ask(self, call: Callable[..., Any], *args: Any) -> Any:
        """What the SuperLink answers; where it cannot answer now (its database is locked), it is asked again for a minute."""
        end = time.time() + LEAST
        while True:
            try:
                return call(*args)
            except httpx.HTTPStatusError as error:
                if error.response.status_code < 500 or time.time() > end:
                    raise
                time.sleep(1)

    def _pull(self, message_id: str) -> Message | None:
        """The reply to one message, or None as long as there is none. Errors: HUB-05 when Flower cannot make a message of it."""
        try:
            return next(iter(self._ask(self.grid.pull_messages, [message_id])), None)
        except httpx.HTTPError:
            raise
        except Exception as error:  # a site chooses the bytes, and Flower's readers fail on them in as many ways
            fix = "update that site to the hub's version"
            raise HubError("HUB-05", f"The reply could not be read ({type(error).__name__}).", found=str(error), fix=fix) from error

    def note(self, **news: Any) -> None:
        """Say on the shared volume what the run is doing; a full disk does not stop it."""
        self.status |= news | {"time": time.time()}
        try:
            checkpoint.write_json(self.file, self.status)
        except OSError:
            pass

    def _note_who(self, replies: list[aggregate.Reply], missing: list[str]) -> None:
        self.note(replied=sorted(reply.site for reply in replies), missing=sorted(missing))

    def _refuse(self, site: str, reason: str) -> dict[str, str]:
        print(f"bouquet: refused  {site}: {reason}", flush=True)
        return {"site": site, "reason": reason}

    def _too_few(self, number: int, valid: int, refused: list[dict[str, str]]) -> HubError:
        reasons = "; ".join(f"{r['site']}: {r['reason']}" for r in refused)
        return HubError(
            "HUB-02",
            f"Too few valid replies in round {number}: {valid} of {self.config.min_sites} needed. {reasons}",
            found=f"{valid} valid, {len(refused)} refused or missing",
            fix="mend the sites named above, or lower min-sites, and run again with resume=\"latest\"",
        )
