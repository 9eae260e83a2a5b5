"""A SuperLink that sends the publisher's signatures along with the app, and takes a reply from nobody but its sender.

Flower's SuperLink has signatures only for apps of Flower's own app hub: a bundle that `flwr run .` uploads reaches the
sites without one, and a SuperNode that pins publishers (--trusted-entities) refuses it. Here the answer to every site
that fetches a bundle carries what lies in BOUQUET_SIGNATURES/<SHA-256 of the bundle>.json, which bouquet/hub/sign.py
writes. Nothing is trusted of the hub by that: a site verifies the signature over the bytes it received, with the key
it pinned. Flower's SuperLink believes the sender that is written in a reply; here it must be the site whose key signed
the request, and a reply is made of at most MOST_OBJECTS pieces. What a site chose is harmless in the log, and no site
fills it. Its database is made, or brought to this version, before Flower opens it (database.py). A request meets the
layers of its own API alone. How all of that is put into Flower: seams.py.
Enters: flower-superlink's own arguments. Leaves: its exit code.
Errors: STATE-01 to -03 and FLWR-01 at the start.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import wraps
from itertools import islice
from pathlib import Path
from typing import Any

from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.superlink.cli import flower_superlink
from sqlalchemy.exc import OperationalError
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from app import text
from app.errors import BouquetError
from bouquet.flower import seams

MOST_OBJECTS = 1000  # Flower cuts an adapter into objects of 5 MiB: 5 GB in one reply
BUSY = 25_000  # milliseconds that a locked database is waited for; its clients wait 30 s
MOST_TOLD = 1000  # things that are told of, before the counts start again
LAYERS = {  # of Flower's, which of them look at the requests of one API alone
    "ControlSensitiveResponseMiddleware": "/v1/control/",
    "ControlAuthenticationMiddleware": "/v1/control/",
    "ControlLicenseMiddleware": "/v1/control/",
    "ControlEventLogMiddleware": "/v1/control/",
    "RuntimeTracingMiddleware": "/v1/runtime/",
    "NodeAuthMiddleware": "/v1/fleet/",
    "FleetEventLogMiddleware": "/v1/fleet/",
}
seen: Counter[str] = Counter()


def signatures(bundle: str, folder: Path) -> dict[str, str]:
    """What Flower's Fab carries for the bundle of that SHA-256: publisher -> JSON of signature and signed_at."""
    try:
        signed = json.loads((folder / f"{bundle}.json").read_text())
    except (OSError, ValueError) as error:
        tell(
            f"bouquet: bundle {bundle[:12]} has no signature here, sites refuse it; bouquet hub sign signs it"
            f" ({type(error).__name__})"
        )
        signed = {}
    # valid_license: how Flower's app hub says that it was asked; without it a site logs that this hub cannot verify
    # apps
    return {publisher: json.dumps(record) for publisher, record in signed.items()} | {"valid_license": "Valid"}


def tell(what: str) -> None:
    """Print a line the 1st, 10th, 100th, … time: nothing in `what` is a site's choice, but who it is."""
    if what not in seen and len(seen) >= MOST_TOLD:
        seen.clear()
    seen[what] += 1
    if (count := seen[what]) == 10 ** (len(str(count)) - 1):
        print(text.printable(what) + (f" ({count} times by now)" if count > 1 else ""), flush=True)


def send_signatures(folder: Path) -> None:
    """From now on the SuperLink's answer to a site that fetches a bundle has its signatures."""

    def with_signatures(get_fab: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(get_fab)
        def signed(*args: Any, **kwargs: Any) -> Any:
            answer = get_fab(*args, **kwargs)
            answer.fab.verifications.update(signatures(answer.fab.hash_str, folder))
            return answer

        return signed

    seams.take(seams.GET_FAB, with_signatures)


def refuse_impostors() -> None:
    """From now on a site's replies are refused with 403 where they are what no site sends.

    That is a reply in another site's name, and one of more than MOST_OBJECTS pieces.
    """

    def from_its_sender(push_messages: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(push_messages)
        def own(request: Any, *args: Any, **kwargs: Any) -> Any:
            node = request.node.node_id
            if any(message.metadata.src_node_id != node for message in request.messages_list):
                raise refused(node, "a reply in another SuperNode's name")
            trees = map(iterate_object_tree, request.message_object_trees)
            if any(next(islice(pieces, MOST_OBJECTS, None), None) for pieces in trees):
                raise refused(node, f"a reply of more than {MOST_OBJECTS} pieces")
            return push_messages(request, *args, **kwargs)

        return own

    seams.take(seams.PUSH_MESSAGES, from_its_sender)


def refused(node: int, what: str) -> FlowerError:
    """Tell of a node that misbehaves, by the number that its key stands for."""
    tell(f"bouquet: node {node} sent {what}; refused")
    return FlowerError(ApiErrorCode.FORBIDDEN_ACTION, what)


def wait_for_database() -> None:
    """Wait longer for a locked database than Flower's 5 s: its SuperExec ends, and the run, on the first error 500."""
    seams.take(seams.SQLITE_PRAGMAS, lambda flowers: (*flowers, ("busy_timeout", str(BUSY))))


def ask_to_come_back() -> None:
    """Answer 503 when the database cannot be written (a full volume, a lock that stays): Flower's programs ask again
    after a 503.

    After a 500 its SuperExec ends, with the run, and a SuperNode's heartbeat ends, which leaves that site offline for
    ever.
    """

    def with_503(translate: Callable[..., Awaitable[Response]]) -> Callable[..., Awaitable[Response]]:
        @wraps(translate)
        async def translated(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
            async def asked(request: Request) -> Response:
                try:
                    return await call_next(request)
                except OperationalError as error:
                    print(text.line(f"bouquet: {request.url.path} was answered with 503: {error.orig}"), flush=True)
                    return Response(status_code=503)

            return await translate(request, asked)

        return translated

    seams.take(seams.ERROR_TRANSLATOR, with_503)


class Within:
    """ASGI: a layer for the requests of one API, past which go all others, which it would only hand on.

    `path` is what the router takes a request by, too: nothing of that API can be reached past the layer.
    Flower's layers read a path without its tabs and newlines; one that is spelled with them has no handler anyway.
    """

    def __init__(self, app: ASGIApp, layer: Middleware, path: str) -> None:
        self.past, self.through, self.path = app, layer.cls(app, *layer.args, **layer.kwargs), path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        within = scope["type"] != "http" or scope["path"].startswith(self.path)
        await (self.through if within else self.past)(scope, receive, send)


def spare_layers() -> None:
    """Flower's SuperLink takes every request through all of its nine layers, of which two to six are about it."""

    def own(layers: Callable[[], list[Middleware]]) -> Callable[[], list[Middleware]]:
        def within(layer: Middleware) -> Middleware:
            path = LAYERS.get(getattr(layer.cls, "__name__", ""))
            return Middleware(Within, layer=layer, path=path) if path else layer

        return wraps(layers)(lambda: [*map(within, layers())])

    seams.take(seams.MIDDLEWARE, own)


def prepare_database(arguments: list[str]) -> None:
    """The file that Flower will open, where there is one; ends here where it cannot."""
    from bouquet.flower import database

    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--database", default="")
    where = options.parse_known_args(arguments)[0].database.strip()
    if not where or where == ":memory:" or "://" in where:
        return
    try:
        database.prepare(Path(where).resolve())
    except BouquetError as error:
        sys.exit(error.report())


def main() -> None:
    text.tidy_log("flwr", "uvicorn.error")
    prepare_database(sys.argv[1:])
    signed = Path(os.environ["BOUQUET_SIGNATURES"])
    seams.begin(wait_for_database, ask_to_come_back, spare_layers, refuse_impostors, lambda: send_signatures(signed))
    flower_superlink()


if __name__ == "__main__":
    main()
