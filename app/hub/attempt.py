"""One try: a message to every site that is asked, and what comes back until the deadline.

A site whose operator has not decided on the run is asked again, ever less often, while the others work; who has not
answered by the deadline is refused. Enters: the sites, a message's content. Leaves: the replies that were taken, the
refused sites with their reasons, and a word on who is waited for, on the volume and, ever less often, on the run's
output.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from flwr.app import Message, RecordDict

from app.errors import BouquetError, HubError, public
from app.hub import guard
from app.hub.history import Refused
from app.hub.sites import Sites

# seconds between looks for replies, or as many as a look took: with hundreds of sites each look is hundreds of calls
POLL = 0.5
UNSENT = "because the SuperLink did not take its message"
FIRST_WORD = 20.0  # seconds of a wait before a word of it
LONGEST_SILENCE = 320.0  # seconds between two words, each silence being twice the one before
AGAIN, LONGEST_PAUSE = 10.0, 60.0  # seconds until a site whose operator has not decided is asked again, first and last
Take = Callable[[Message, int], guard.Reply]  # a node's message -> its reply, or the reason why it counts for nothing


class Try:
    """What has been sent, and who has said what to it."""

    def __init__(
        self, sites: Sites, kind: str, number: int, content: RecordDict, nodes: list[int], timeout: float
    ) -> None:
        """kind: train, evaluate, or query, which has no adapter. The messages are on their way when this returns."""
        self.sites, self.kind, self.number, self.content, self.timeout = sites, kind, number, content, timeout
        self.replies: list[guard.Reply] = []
        self.undecided: dict[int, float] = {}  # node id -> when it is asked again
        self.pauses: dict[int, float] = {}
        self.missing = self.push(nodes)
        self.began = time.time()
        self.end = self.began + timeout
        self.word, self.silence = self.began + FIRST_WORD, FIRST_WORD
        self.late = False
        untaken = [node for node in nodes if node not in self.missing.values()]
        self.refused: list[Refused] = [self.refusal(node, public("HUB-03", why=UNSENT)) for node in untaken]

    def push(self, nodes: list[int]) -> dict[str, int]:
        """Send it to these; message id -> node id of what the SuperLink took."""
        how: dict[str, Any] = {"message_type": self.kind, "ttl": self.timeout + 60, "group_id": str(self.number)}
        messages = [Message(self.content, dst_node_id=node, **how) for node in nodes]
        # '' where the SuperLink did not take one, [] where it took none
        ids = list(self.sites.ask(self.sites.grid.push_messages, messages)) if messages else []
        return {message_id: node for message_id, node in zip(ids, nodes, strict=False) if message_id}

    def collect(self, take: Take) -> None:
        """Until all have answered, or time is up."""
        while (self.missing or self._waits_for_consent()) and not self.late:
            # one more look at the end: a reply that came slowly may have hidden another
            look, self.late = time.monotonic(), time.time() >= self.end
            self._ask_again()
            for message_id, node in list(self.missing.items()):
                self._look(message_id, node, take)
            if (self.missing or self.undecided) and not self.late:
                self._tell()
                time.sleep(max(POLL, time.monotonic() - look))
        reason = public("HUB-03", why=f"within {self.timeout:.0f} s")
        self.refused += [self.refusal(node, reason) for node in self.missing.values()]

    def refusal(self, node: int, reason: str) -> Refused:
        return self.sites.refuse(self.sites.name(node), reason)

    @property
    def asked_for(self) -> str:
        """train or evaluate; a query is a round's first half."""
        return "train" if self.kind == "query" else self.kind

    def _waits_for_consent(self) -> bool:
        return bool(self.undecided) and len(self.replies) < self.sites.config.min_sites

    def _ask_again(self) -> None:
        """Those who had not decided, where it is time."""
        if again := self.push([n for n, when in self.undecided.items() if when <= time.time() and not self.late]):
            self.missing |= again
            self.undecided = {n: when for n, when in self.undecided.items() if n not in again.values()}

    def _look(self, message_id: str, node: int, take: Take) -> None:
        """Whether a node has answered. One at a time: a reply that cannot be read spoils no other."""
        try:
            if (message := self.sites.pull(message_id)) is None:
                return
            reply = take(message, node)
            if reply.site in {other.site for other in self.replies}:
                raise HubError("HUB-07", found=reply.site, fix="give each SuperNode its own site-name")
        except BouquetError as error:
            self._no(node, error)
        else:
            adapter = self.sites.spool.keep(node, reply.adapter) if reply.adapter else reply.adapter
            self.replies.append(replace(reply, adapter=adapter))
            if self.kind != "query":
                self.sites.lasted[node] = time.time() - self.began
        del self.missing[message_id]
        self.sites.undecided = set(map(self.sites.name, self.undecided))
        self.sites.note_who(self.replies, self.missing.values())

    def _no(self, node: int, error: BouquetError) -> None:
        """A site that waits for its operator, wants no part, or is refused."""
        name = self.sites.name(node)
        if error.code == "TRUST-11":
            self.pauses[node] = min(2 * self.pauses.get(node, AGAIN / 2), LONGEST_PAUSE)
            self.undecided[node] = time.time() + self.pauses[node]
            self.sites.say(f"bouquet: waits for consent  {name}: its operator has not decided yet")
        elif error.code == "TRUST-12":
            self.sites.declined.add(name)
            self.sites.say(f"bouquet: declined  {name}: its operator wants no part in this run")
        else:
            self.refused.append(self.sites.refuse(name, str(error)))

    def _tell(self) -> None:
        """A word about a wait that lasts, ever less often."""
        if self.missing and time.time() >= self.word:
            so_far = time.time() - self.began
            self.sites.tell_of_wait(self.asked_for, self.number, so_far, len(self.replies), self.missing.values())
            self.word, self.silence = time.time() + self.silence, min(2 * self.silence, LONGEST_SILENCE)
