"""Rounds in which the hub sees no site's adapter, but the mean of all: the hub's part in app/masks.py.

Two messages a try: every site offers a key, with the images that it counts for; then each gets everybody's, trains, and
sends its update hidden. One that does not come back spoils the sum, so the next try is without it, where enough are
left. What a guard asks of one site's adapter cannot be asked of a hidden one; of the mean, that it is no longer than a
mean of clipped updates can be, which a sum of masks that do not cancel never is.
Enters: Exchange's. Leaves: the replies, which hold numbers alone, and `summed`, one reply in place of all.
Errors: those of Exchange; HUB-11 in a try's reasons.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from app import lora, masks, model
from app.errors import HubError
from app.hub import guard
from app.hub.exchange import Exchange
from app.hub.guard import Reply
from app.hub.history import Refused
from app.model import Adapter


class Sums(Exchange):
    """A run's conversation with sites that hide their updates."""

    left_out: frozenset[int] = frozenset()  # nodes that spoilt this round's last try

    def attempt(self, number: int, adapter: Adapter, attempt: int) -> tuple[list[Reply], list[Refused]]:
        """One try, whose replies are valid together or not at all."""
        self.summed = []
        left_out, self.left_out = self.left_out if attempt else frozenset(), frozenset()
        nodes = self.wait_for_sites()
        if len(fit := [node for node in nodes if node not in left_out]) >= self.config.min_sites:
            nodes = fit

        node_of: dict[str, int] = {}

        def take_offer(message: Any, node: int) -> Reply:
            reply = guard.accept_offer(message, self.site_of(node), (self.status.run, number, attempt), self.bounds)
            node_of.setdefault(reply.site, node)
            return reply

        asked: dict[str, Any] = {"attempt": attempt}
        offers, refused = self.send("query", number, adapter, attempt, nodes=nodes, order=asked, accept=take_offer)
        if len(offers) < self.config.min_sites:
            return [], refused
        offered = {node_of[reply.site]: reply for reply in offers}
        trained = lora.part(adapter, lora.half(self.config, number))
        hidden = {masks.NAME: torch.zeros(sum(value.numel() for value in trained.values()), dtype=torch.int32)}
        came: set[int] = set()
        sent = model.adapter_hash(adapter)

        def take_hidden(message: Any, node: int) -> Reply:
            reply = self.accept(message, node, adapter, sent, training=True, like=hidden)
            came.add(node)
            return replace(reply, site=offered[node].site, images=offered[node].images, offer=offered[node].offer)

        order = asked | {"offers": [reply.offer for reply in offers]}
        replies, gone = self.send(
            "train", number, adapter, attempt, nodes=sorted(offered), order=order, accept=take_hidden
        )
        if len(replies) < len(offered):
            self.left_out = frozenset(offered.keys() - came)
            return [], refused + gone
        try:
            mean = lora.filled(total(replies, trained, self.config.update_clip), adapter)
        except HubError as error:
            return [], [*refused, self.refuse("the sum", str(error))]
        self.summed = [Reply("sum", mean, sum(reply.images for reply in replies), {})]
        return replies, refused


def total(replies: Sequence[Reply], adapter: Adapter, clip: float) -> Adapter:
    """The mean of the sites' adapters, whose updates are clipped. Errors: HUB-11."""
    mean = masks.mean((masks.unpacked(reply.trained) for reply in replies), clip)
    length = float(np.linalg.norm(mean))
    if length > clip + math.sqrt(len(mean)) * len(replies) * masks.step(clip):
        raise HubError(
            "HUB-11",
            why="it is longer than a mean of clipped updates can be",
            found=f"length {length:.3g}, update-clip {clip:g}",
            fix="look at the sites' logs; one of them sent what its masks do not fit",
        )
    return masks.moved(adapter, mean)
