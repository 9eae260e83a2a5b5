"""A SuperLink that sends the publisher's signatures along with the app, and takes a reply from nobody but its sender.

Flower's SuperLink has signatures only for apps of Flower's own app hub: a bundle that `flwr run .` uploads reaches the sites
without one, and a SuperNode that pins publishers (--trusted-entities) refuses it. Here the answer to every site that fetches
a bundle carries what lies in BOUQUET_SIGNATURES/<SHA-256 of the bundle>.json, which scripts/_sign.py writes.
Nothing is trusted of the hub by that: a site verifies the signature over the bytes it received, with the key it pinned.
Flower's SuperLink believes the sender that is written in a reply; here it must be the site whose key signed the request.
Enters: flower-superlink's own arguments. Leaves: its exit code.
"""

import json
import os
import sys
from collections.abc import Awaitable, Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any

from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore import sql_mixin
from flwr.superlink import main as superlink_main
from flwr.superlink.cli import flower_superlink
from flwr.superlink.servicer.fleet import fleet_handlers
from sqlalchemy.exc import OperationalError
from starlette.requests import Request
from starlette.responses import Response


def signatures(bundle: str, folder: Path) -> dict[str, str]:
    """What Flower's Fab carries for the bundle of that SHA-256: publisher -> JSON of signature and signed_at."""
    try:
        signed = json.loads((folder / f"{bundle}.json").read_text())
    except (OSError, ValueError) as error:
        tell(f"bouquet: bundle {bundle[:12]} has no signature here, sites refuse it; scripts/hub sign signs it ({type(error).__name__})")
        signed = {}
    # valid_license: how Flower's app hub says that it was asked; without it a site logs that this hub cannot verify apps
    return {publisher: json.dumps(record) for publisher, record in signed.items()} | {"valid_license": "Valid"}


@cache
def tell(line: str) -> None:
    """Print a line once."""
    print(line, flush=True)


def send_signatures(folder: Path) -> None:
    """From now on fleet_handlers.get_fab, the SuperLink's answer to a site that fetches a bundle, has its signatures."""
    get_fab = fleet_handlers.get_fab

    @wraps(get_fab)
    def signed(*args: Any, **kwargs: Any) -> Any:
        answer = get_fab(*args, **kwargs)
        answer.fab.verifications.update(signatures(answer.fab.hash_str, folder))
        return answer

    fleet_handlers.get_fab = signed


def refuse_impostors() -> None:
    """From now on fleet_handlers.push_messages, where a site's replies arrive, refuses one in another site's name, with 403."""
    push_messages = fleet_handlers.push_messages

    @wraps(push_messages)
    def own(request: Any, *args: Any, **kwargs: Any) -> Any:
        for message in request.messages_list:
            if message.metadata.src_node_id != request.node.node_id:
                tell(f"bouquet: node {request.node.node_id} sent a reply as node {message.metadata.src_node_id}; refused")
                raise FlowerError(ApiErrorCode.FORBIDDEN_ACTION, "a reply in another SuperNode's name")
        return push_messages(request, *args, **kwargs)

    fleet_handlers.push_messages = own


def wait_for_database() -> None:
    """Wait 25 s for a locked database, not 5: its clients wait 30, and Flower's SuperExec ends, with the run, on the first error 500."""
    sql_mixin.SQLITE_PRAGMAS = (*sql_mixin.SQLITE_PRAGMAS, ("busy_timeout", "25000"))


def ask_to_come_back() -> None:
    """Answer 503 when the database cannot be written (a full volume, a lock that stays): Flower's programs ask again after a 503.

    After a 500 its SuperExec ends, with the run, and a SuperNode's heartbeat ends, which leaves that site offline for ever.
    """
    translate = superlink_main.http_error_translator

    async def translated(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        async def asked(request: Request) -> Response:
            try:
                return await call_next(request)
            except OperationalError as error:
                print(f"bouquet: {request.url.path} was answered with 503: {error.orig}", flush=True)
                return Response(status_code=503)

        return await translate(request, asked)

    superlink_main.http_error_translator = translated


if __name__ == "__main__":
    wait_for_database()
    ask_to_come_back()
    refuse_impostors()
    send_signatures(Path(os.environ["BOUQUET_SIGNATURES"]))
    sys.exit(flower_superlink())
