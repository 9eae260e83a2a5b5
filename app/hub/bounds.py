"""How large a reply may be that the hub builds out of what a site sent, and how long it waits for all of it.

Enters: a bound and a time. Leaves: Flower's Grid, which fetches no more. Errors: HUB-05.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from flwr.supercore.inflatable.inflatable_utils import pull_objects
from flwr.superlink.grid import http_grid

from app.hub.guard import unreadable

FIRST = 0.05  # seconds until a part that is not there yet is asked for again


def bound_replies(most: int, end: float) -> None:
    """From now on a reply that Flower's Grid fetches is at most `most` bytes and one array, and is waited for until
    `end`.

    A reply is there before what is in it; Flower looks again after 1 s, 2 s, … up to 10, for two hours at most.
    Errors (of Grid.pull_messages): HUB-05.
    """

    def pull(object_ids: list[str], pull_object_fn: Callable[[str], bytes]) -> dict[str, bytes]:
        left, lock = most, threading.Lock()

        def counted(object_id: str) -> bytes:
            nonlocal left
            content = pull_object_fn(object_id)
            with lock:
                left -= len(content)
            if left < 0:
                raise unreadable("it is too large", f"more than {most} bytes")
            return content

        found = pull_objects(
            object_ids,
            counted,
            initial_backoff=FIRST,
            backoff_cap=1.0,
            max_tries_per_object=None,
            max_time=max(1.0, end - time.time()),
        )
        if (arrays := sum(content.startswith(b"Array ") for content in found.values())) > 1:
            raise unreadable("it has more than one array", f"{arrays} arrays")
        return found

    http_grid.pull_objects = pull  # type: ignore[attr-defined, assignment]
