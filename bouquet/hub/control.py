"""One question to the hub's Control API: a call over TLS, where a `flwr` command would be a process of seconds.

Enters: the address and the CA of `flwr run . remote-deployment`, from Flower's config.toml. Leaves: the answer, or what
the hub says of a run. Errors: HOST-08, no answer or a refusal, with the hub's own words; `Unanswered` is one of which
to ask again may help.
"""

from __future__ import annotations

import hashlib
import http.client
import importlib
import importlib.util
import json
import os
import ssl
import sys
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from app import text
from app.errors import BouquetError
from bouquet.hub.runs import CONNECTION

PATH, MEDIA = "/v1/control/", "application/protobuf"
LONGEST = 30.0  # seconds without a word; the hub's database may be locked for 25 (superlink.py)
LARGEST = 64 << 20  # bytes of an answer, or of a message of a stream
MOST = 2**64 - 1  # a run's number
FRAME = 4  # bytes before each message of a stream: its size (flwr.supercore.protobuf.framing)
NOT_NOW = (502, 503, 504)  # HTTP: a gateway whose hub is away, a hub whose database is busy
LOOK = "docker compose logs superlink, or .bouquet/logs/superlink.log, says why"
IN_USE = "[code: 23]"  # flwr.supercore.error.ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE
Answer = TypeVar("Answer", bound=Message)


class Unanswered(BouquetError):
    """HOST-08 of a hub that is away, or busy, for now."""


@dataclass(frozen=True)
class Told:
    """Of a run. state: pending, starting, running or finished:completed|failed|stopped; since: ISO 8601."""

    run: str
    state: str
    details: str
    since: str


def messages() -> ModuleType:
    """Flower's messages of the Control API, without the rest of Flower, which takes ten times as long as all else here.

    While they are loaded, two empty modules are in the place of its packages.
    """
    if "flwr" not in sys.modules and (found := importlib.util.find_spec("flwr")):
        [root] = found.submodule_search_locations or [""]
        packages = {"flwr": root, "flwr.proto": f"{root}/proto"}
        for name, folder in packages.items():
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__path__ = [folder]
        try:
            return importlib.import_module("flwr.proto.control_pb2")
        finally:
            for name in packages:
                del sys.modules[name]
    return importlib.import_module("flwr.proto.control_pb2")


control = messages()


def ask(call: str, request: Message, answer: type[Answer]) -> Answer:
    """The answer to `request`. Errors: HOST-08."""
    with named():
        status, body = post(call, request.SerializeToString())
    if status == 200:
        try:
            found: Answer = answer.FromString(body)
            return found
        except DecodeError:
            pass
    raise refusal(call, status, body)


@contextmanager
def named() -> Iterator[None]:
    """HOST-08 of whatever is no answer."""
    try:
        yield
    except (OSError, http.client.HTTPException, DecodeError, KeyError, ValueError) as error:
        # a ValueError: another hub's certificate, no hub that is configured, or what no hub says
        again = not isinstance(error, DecodeError | KeyError | ValueError)
        why, fix = (
            text.line(str(error) or type(error).__name__),
            "is the deployment up? docker compose ps, or scripts/demo",
        )
        raise (Unanswered if again else BouquetError)("HOST-08", did="does not answer", found=why, fix=fix) from None


def refusal(call: str, status: int, body: bytes) -> BouquetError:
    """Of an answer that is none, in the hub's own words."""
    try:
        answered = json.loads(body)
        said = f"[code: {answered['code']}] {answered['detail']}" if "code" in answered else answered["detail"]
    except (ValueError, KeyError, TypeError, RecursionError):
        said = "without a word that we know"
    kind = Unanswered if status in NOT_NOW else BouquetError
    return kind("HOST-08", did=f"refused {call}", found=f"{status} {text.line(said)}", fix=LOOK)


def post(call: str, body: bytes) -> tuple[int, bytes]:
    """(HTTP status, body). Errors: OSError and HTTPException; KeyError and ValueError for what config.toml lacks, and
    ValueError for more than LARGEST.
    """
    with answered(call, body) as answer:
        if len(found := answer.read(LARGEST + 1)) > LARGEST:
            raise ValueError(f"more than {LARGEST >> 20} MiB in one answer")
        return answer.status, found


@contextmanager
def answered(call: str, body: bytes) -> Iterator[http.client.HTTPResponse]:
    """The answer as it begins; the link is closed afterwards. Errors: those of post()."""
    settings = connection()
    host, _, port = settings["address"].rpartition(":")
    if settings.get("insecure"):
        link: http.client.HTTPConnection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=LONGEST)
    else:
        tls = ssl.create_default_context(cafile=settings.get("root-certificates"))
        link = http.client.HTTPSConnection(host.strip("[]"), int(port), timeout=LONGEST, context=tls)
    with closing(link):
        link.request("POST", PATH + call, body, {"Content-Type": MEDIA})
        with link.getresponse() as answer:
            yield answer


def connection() -> dict[str, Any]:
    """[superlink.remote-deployment]. Errors: OSError, ValueError."""
    file = Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr", "config.toml")
    try:
        known: dict[str, Any] = tomllib.loads(file.read_text())["superlink"][CONNECTION]
    except (FileNotFoundError, KeyError, TypeError):
        raise ValueError(f"no [superlink.{CONNECTION}] in {file}; scripts/setup writes it") from None
    return known


def nodes() -> list[Any]:
    """Every registration that the hub remembers, oldest first."""
    answer = ask("list-nodes", control.ListNodesRequest(), control.ListNodesResponse)
    return sorted(answer.nodes_info, key=lambda node: node.registered_at)


def register(name: str, pem: bytes) -> None:
    """Let the SuperNode in that has the key to this public one. Errors: HOST-08, with IN_USE for a key that the hub
    knows already.
    """
    ask("register-node", control.RegisterNodeRequest(public_key=pem, name=name), control.RegisterNodeResponse)


def unregister(node: int) -> None:
    """Cut a SuperNode off for good."""
    ask("unregister-node", control.UnregisterNodeRequest(node_id=node), control.UnregisterNodeResponse)


def order(bundle: bytes, changes: Mapping[str, Any]) -> Any:
    """What `flwr run` sends: a run of this bundle under its own config with these changes."""
    from flwr.common.serde import user_config_to_proto

    request = control.StartRunRequest(override_config=user_config_to_proto(dict(changes)))
    request.fab.hash_str, request.fab.content = hashlib.sha256(bundle).hexdigest(), bundle
    return request


def start_run(bundle: bytes, changes: Mapping[str, Any]) -> str:
    """The id of the run that is started. Errors: HOST-08."""
    answer = ask("start-run", order(bundle, changes), control.StartRunResponse)
    if not answer.HasField("run_id"):
        raise BouquetError("HOST-08", did="started no run", found=text.line(answer.note), fix=LOOK)
    return str(answer.run_id)


def run(number: str = "") -> Told | None:
    """What the hub says of a run, or of the newest one; None where it knows none."""
    if number and not (number.isdecimal() and len(number) <= len(str(MOST)) and int(number) <= MOST):
        return None
    request = control.ListRunsRequest(run_id=int(number)) if number else control.ListRunsRequest(limit=1)
    try:
        found = ask("list-runs", request, control.ListRunsResponse).run_dict.values()
    except BouquetError as error:
        if number and error.found.startswith("404"):
            return None
        raise
    return next(map(told, found), None)


def log(number: str, after: float) -> Iterator[tuple[str, float]]:
    """What a run says after a moment, as it comes: (text, its moment). Over when the run is, and when nothing is said
    for LONGEST; who asks again with the last moment misses nothing. Errors: HOST-08, Unanswered where it is cut.
    """
    call, request = "stream-logs", control.StreamLogsRequest(run_id=int(number), after_timestamp=after)
    with named(), suppress(TimeoutError), answered(call, request.SerializeToString()) as answer:
        if answer.status != 200:
            raise refusal(call, answer.status, answer.read(text.LONGEST))
        while size := answer.read(FRAME):
            said = control.StreamLogsResponse.FromString(whole(answer, size))
            yield said.log_output, said.latest_timestamp


def whole(answer: http.client.HTTPResponse, size: bytes) -> bytes:
    """The message that follows on its size. Errors: OSError where it was cut, ValueError for more than LARGEST."""
    if (length := int.from_bytes(size, "big")) > LARGEST:
        raise ValueError(f"more than {LARGEST >> 20} MiB in one message")
    if len(size) < FRAME or len(body := answer.read(length)) < length:
        raise ConnectionError("it was cut")
    return body


def told(run: Any) -> Told:
    """Errors: HOST-08 for a run that began at no time."""
    since = run.finished_at or run.running_at or run.starting_at or run.pending_at
    try:
        datetime.fromisoformat(since)
    except ValueError:
        said = f"run {run.run_id} since {text.line(since) or 'never'}"
        raise BouquetError("HOST-08", did="says what cannot be", found=said, fix=LOOK) from None
    state = text.line(f"{run.status.status}:{run.status.sub_status}".rstrip(":"))
    return Told(str(run.run_id), state, text.printable(run.status.details[: text.LONGEST]), since)
