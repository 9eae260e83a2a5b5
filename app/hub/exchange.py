"""One message to every site that is there, and what came back in time.

Enters: an adapter and Flower's Grid. Leaves: the valid replies by site name, the refused ones with their reasons.
A round is as many tries (attempt.py) as the run's config allows. Errors: HUB-01, HUB-02.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from app import lora, model, wire
from app.config import RunConfig
from app.errors import BouquetError, HubError, public
from app.hub import guard
from app.hub.attempt import Take, Try
from app.hub.bounds import bound_replies
from app.hub.history import Refused
from app.hub.sites import Sites, listed

LEAST = 60.0  # seconds that a round may always take
REST = 2**20  # bytes of a reply beside its adapter: names, numbers, the objects' frames


class Exchange(Sites):
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
        super().__init__(grid, config, folder, admitted)
        self.base, self.bounds = base_fingerprint, bounds
        self.summed: list[guard.Reply] = []  # one in place of a round's, where the sites hide theirs (sums.py)
        self.took: list[float] = []  # seconds of the rounds that went well
        self.norms: dict[str, list[float]] = {}  # lengths of the accepted updates, by the half that was trained

    def round(self, number: int, adapter: model.Adapter) -> tuple[list[guard.Reply], list[Refused]]:
        """A round's valid replies, after as many tries as the config allows. Errors: HUB-01, HUB-02."""
        all_refused = []
        for attempt in range(self.config.round_retries + 1):
            start = time.monotonic()
            kept, refused = self.attempt(number, adapter, attempt)
            all_refused += refused
            if len(kept) >= self.config.min_sites:
                self.took.append(time.monotonic() - start)
                self.remember(number, kept)
                return kept, all_refused
            if refused and all(entry.reason.startswith("TRUST-01") for entry in refused):
                break  # an unsigned bundle stays unsigned
            if self.declined and len(kept) + len(refused) + len(self.undecided) < self.config.min_sites:
                break  # nobody else is there
            if attempt < self.config.round_retries:
                print(f"bouquet: round {number} again  {len(kept)} of {self.config.min_sites} needed", flush=True)
        raise self._too_few(number, len(kept), refused)

    def remember(self, number: int, kept: list[guard.Reply]) -> None:
        """How long a round's updates were, of the last three: what the next ones are measured by. Not while the rate
        still rises from 0, where each round's are longer than those of the one before.
        """
        if number * self.config.local_steps > self.config.warmup_steps:
            half = lora.half(self.config, number)
            self.norms[half] = (self.norms.get(half, []) + [reply.pace for reply in kept])[-3 * len(kept) :]

    def attempt(self, number: int, adapter: model.Adapter, attempt: int) -> tuple[list[guard.Reply], list[Refused]]:
        """One try of a round: the replies that hold."""
        replies, refused = self.send("train", number, adapter, attempt)
        kept, long = guard.guard_norms(
            replies, self.norms.get(lora.half(self.config, number), ()), self.config.norm_bound
        )
        return kept, refused + [self.refuse(reply.site, reason) for reply, reason in long]

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
        accept: Take | None = None,
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
        self.undecided, self.declined = set(), set()
        one = Try(self, kind, number, content, nodes, timeout)
        most = 2 * len(arrays[wire.NAME].data)
        wire.bound_arrays(most)
        bound_replies(most + REST, one.end)
        what = {"kind": one.asked_for, "round": number, "attempt": attempt}
        self.note(state="waiting", since=one.began, deadline=one.end, refused=tuple(one.refused), **what)
        self.note_who(one.replies, one.missing.values())
        how: dict[str, Any] = {"training": kind == "train", "half": lora.half(self.config, number)}
        one.collect(accept or (lambda reply, node: self.accept(reply, node, adapter, sent, **how)))
        self.note(state="working", refused=tuple(one.refused))
        return sorted(one.replies, key=lambda reply: reply.site), one.refused

    def accept(
        self,
        message: Message,
        node: int,
        adapter: model.Adapter,
        sent: str,
        *,
        training: bool,
        like: model.Adapter | None = None,
        half: str = "",
    ) -> guard.Reply:
        """The node's reply. Errors: guard.accept's; HUB-05 for what it cannot read, as a site chooses every byte."""
        how: dict[str, Any] = {"site": self.site_of(node), "precision": self.config.wire_precision}
        how |= {"training": training, "like": like, "half": half, "lower": self.config.strategy == "svd"}
        try:
            reply = guard.accept(message, adapter, sent, **how)
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

    def _too_few(self, number: int, valid: int, refused: list[Refused]) -> HubError:
        consent = [Refused(site, public("TRUST-11")) for site in sorted(self.undecided)]
        consent += [Refused(site, public("TRUST-12")) for site in sorted(self.declined)]
        refused = refused + consent
        reasons = listed((f"{r.site}: {r.reason}" for r in refused), "; ")
        return HubError(
            "HUB-02",
            number=number,
            valid=valid,
            needed=self.config.min_sites,
            reasons=reasons,
            found=f"{valid} valid, {len(refused)} refused or missing",
            fix=(
                'mend the sites named above, or lower min-sites, and run again with resume="latest" and the rest of its'
                " configuration"
            ),
        )
