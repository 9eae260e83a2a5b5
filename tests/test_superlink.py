"""What bouquet/flower/superlink.py and bouquet/flower/supernode.py change in Flower, by its effect on real SuperLinks
and SuperNodes.

Each of these could stop to work while the rest goes on as if nothing were; none needs a run.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.control_pb2 import RegisterNodeRequest, StopRunRequest, UnregisterNodeRequest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.superlink import main
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from starlette.requests import Request
from starlette.responses import Response

from benchmarks.control import Control
from benchmarks.faults.bench import certificates
from benchmarks.hostile import CONTROL, MEDIA, Door, Key, new_key, parse, public
from bouquet import ROOT
from bouquet.flower import superlink, supernode
from bouquet.hub.deployment import Processes, free_port
from bouquet.hub.following import follow
from bouquet.hub.runs import connect
from tests.kit.wait import until

BUSY = 2000  # milliseconds that the SuperLink waits for its database here; else 25000, and Flower's own 5000
HUB = f"""
from flwr.supercore import sql_mixin
sql_mixin.SQLITE_PRAGMAS = (("busy_timeout", "0"), *sql_mixin.SQLITE_PRAGMAS[1:])  # no patience of Flower's own
from bouquet.flower import superlink
superlink.BUSY = {BUSY}
from starlette.middleware.base import BaseHTTPMiddleware
called = BaseHTTPMiddleware.__call__
async def told(self, scope, receive, send):
    print(f"{{type(self).__name__}} has {{scope.get('path')}}", flush=True)
    await called(self, scope, receive, send)
BaseHTTPMiddleware.__call__ = told
superlink.main()
"""
SITE = """
import threading, time
slept = time.sleep
def sleep(seconds):
    if threading.current_thread() is threading.main_thread():
        print(f"sleeps {seconds}", flush=True)
    slept(seconds)
time.sleep = sleep
from bouquet.flower import supernode
supernode.SHARE, supernode.GOODBYE = 0, 0  # as if there had been work a moment ago; goodbye at once
supernode.main()
"""
HEARTLESS = """
from flwr.supernode.fleet_http_client import FleetHttpClient
FleetHttpClient.SendNodeHeartbeat = lambda *_: 1 / 0
from bouquet.flower import supernode
supernode.main()
"""


class Hub(Control, Processes):
    """A SuperLink, and SuperNodes as they are asked for; each begins with some lines of a test's."""

    def __init__(self, home: Path) -> None:
        folder = home / "photos"
        folder.mkdir()
        super().__init__(home, certificates(home), free_port(), {"site-1": folder, "site-2": folder})
        self.door = Door("127.0.0.1", self.port, self.certs / "ca.crt")
        self.code = {"superlink": HUB, "site-1": SITE, "site-2": HEARTLESS}

    def _spawn(self, name: str, command: list, env: dict[str, str] | None = None) -> None:
        if name == "serverapp":
            return  # there is no run
        beside = f"import sys; del sys.argv[:2]; sys.path.insert(0, {str(ROOT)!r})"
        super()._spawn(name, [command[0], "-c", f"{beside}\n{self.code[name]}", *command[1:]], env or {})

    def admit(self, key: Key, name: str) -> None:
        answer = self.door.call(CONTROL + "register-node", RegisterNodeRequest(public_key=public(key), name=name))
        assert answer.status == 200, answer

    @contextmanager
    def admitted(self) -> Iterator[tuple[FleetHttpClient, ActivateNodeRequest]]:
        """What one more site's SuperNode talks to the SuperLink with, and how it begins."""
        self.admit(key := new_key(), f"site-{free_port()}")
        own = NodeAuthHttpInterceptor(key, key.public_key())
        authority = (self.certs / "ca.crt").read_bytes()
        with FleetHttpClient.from_server_address(self.address, False, authority, [own]) as client:
            yield client, ActivateNodeRequest(public_key=public(key), heartbeat_interval=1800)

    def log(self, name: str) -> str:
        return (self.logs / f"{name}.log").read_text()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """While somebody else writes to its database."""
        with closing(sqlite3.connect(self.home / "state/superlink.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            yield
            other.execute("ROLLBACK")


def wait(what: Callable[[], object], logs: Callable[[], str]) -> None:
    until(what, lambda: logs()[-3000:])


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    running = Hub(tmp_path_factory.mktemp("hub"))
    try:
        running.start_hub()
        for name in running.sites:
            running.admit(load_ssh_private_key((running.certs / f"{name}.key").read_bytes(), None), name)
        yield running
    finally:
        running.stop()


def test_a_database_that_is_busy_for_a_moment_is_waited_for(hub: Hub) -> None:
    answers = []
    with hub.admitted() as (client, request):
        asking = threading.Thread(target=lambda: answers.append(client.ActivateNode(request).node_id))
        with hub.locked():
            asking.start()
            asking.join(BUSY / 4000)
            assert asking.is_alive() and "was answered with 503" not in hub.log("superlink")
        asking.join(60)
    assert answers and answers[0] > 0, hub.log("superlink")[-2000:]


def test_a_reply_in_another_sites_name_is_refused_by_the_superlink(hub: Hub) -> None:
    def refusal(written: int) -> int:
        message = Message(metadata=Metadata(src_node_id=written, message_type="train", reply_to_message_id="x", ttl=60))
        tree = ObjectTree(object_id="x")
        reply = PushMessagesRequest(node=Node(node_id=own), messages_list=[message], message_object_trees=[tree])
        with pytest.raises(httpx.HTTPStatusError) as refused:
            client.PushMessages(reply)
        error = FlowerError.from_json(refused.value.response.text)
        return error.code if error else refused.value.response.status_code

    with hub.admitted() as (client, request):
        own = client.ActivateNode(request).node_id
        assert refusal(own) != ApiErrorCode.FORBIDDEN_ACTION  # the same in its own name: of no run that there is
        assert refusal(own + 1) == ApiErrorCode.FORBIDDEN_ACTION
    assert f"bouquet: node {own} sent a reply in another SuperNode's name; refused\n" in hub.log("superlink")


EVERYBODYS = {"BaseHTTPMiddleware", "ProtobufTranslationMiddleware"}  # the first translates errors


@pytest.mark.parametrize(
    ("path", "own"),
    [
        (
            "/v1/control/list-nodes",
            ("ControlSensitiveResponse", "ControlAuthentication", "ControlLicense", "ControlEventLog"),
        ),
        ("/v1/fleet/pull-messages", ("NodeAuth",)),  # which refuses it: it has no key
        ("/v1/runtime/get-nodes", ("RuntimeTracing",)),
        ("/health", ()),
    ],
)
def test_a_request_goes_through_the_layers_of_its_own_api_and_past_all_others(
    hub: Hub, path: str, own: tuple[str, ...]
) -> None:
    hub.door.send("GET" if path == "/health" else "POST", path)
    wait(lambda: f"has {path}\n" in hub.log("superlink"), lambda: hub.log("superlink"))
    lines = (line.partition(" has ") for line in hub.log("superlink").splitlines())
    assert {name for name, _, asked in lines if asked == path} == EVERYBODYS | {f"{name}Middleware" for name in own}


@pytest.mark.parametrize("path", ["/v1/fleet/pull-messages", "/v1/fleet/activate-node", "/v1/fleet/push-object"])
@pytest.mark.parametrize(
    "spelled",
    [
        "{path}", "/{path}", "/.{path}", "{path}/", "{path}?x", "{path}%3Fx", "{path}#x", "/%76{rest}",
        "https://other{path}", "/v1/control/..{fleet}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("host", ["hub", "hub/v1/control", "hub?"])
def test_no_spelling_of_a_sites_call_gets_past_the_layer_that_asks_for_its_key(
    hub: Hub, path: str, spelled: str, host: str
) -> None:
    target = spelled.format(path=path, rest=path[2:], fleet=path[3:])
    asked = f"POST {target} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {MEDIA}\r\nConnection: close\r\n"
    answers = parse(hub.door.raw(f"{asked}Content-Length: 0\r\n\r\n".encode(), wait=20))
    assert answers and answers[0].status >= 300, answers  # sent to the other spelling, or refused


def test_a_layer_that_is_passed_would_only_have_handed_the_request_on() -> None:
    """Each of Flower's own that has a path of its own, asked about every path of the other APIs."""
    layers = {layer.cls.__name__: layer for layer in main._get_middleware()}  # type: ignore[attr-defined]
    assert layers.keys() - superlink.LAYERS.keys() == EVERYBODYS
    paths = sorted({path for _, path in PROTOBUF_REQUEST_TYPES} | {"/health", "/docs", "/v1/runtime/responses"})
    assert {path.split("/")[2] for path in paths if path.startswith("/v1/")} == {"control", "fleet", "runtime"}

    async def passes(name: str, path: str) -> None:
        asked, answer = [], Response("as it was", 207, {"x-own": "1"})

        async def call_next(request: Request) -> Response:
            asked.append((request, dict(request.state._state)))
            return answer

        scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b"", "server": ("h", 1)}
        request = Request({**scope, "app": SimpleNamespace(state=SimpleNamespace()), "state": {"protobuf_request": 1}})
        assert await layers[name].cls(None).dispatch(request, call_next) is answer
        assert asked == [(request, {"protobuf_request": 1})] and answer.body == b"as it was"
        assert dict(answer.headers) == {"content-length": "9", "x-own": "1"} and answer.status_code == 207

    for name, own in superlink.LAYERS.items():
        others = [path for path in paths if not path.startswith(own)]
        assert len(others) < len(paths) > 30
        for path in others:
            asyncio.run(passes(name, path))


def test_a_site_that_could_not_take_leave_waits_until_the_hub_has_ended_its_last_session(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FleetHttpClient, "ActivateNode", FleetHttpClient.ActivateNode)  # back afterwards
    supernode.outlast_the_last_session()
    answers: list[int] = []
    with hub.admitted() as (client, request):
        node = client.ActivateNode(request).node_id  # nobody says goodbye for it
        assert capfd.readouterr().out == ""
        coming = threading.Thread(target=lambda: answers.append(client.ActivateNode(request).node_id))
        coming.start()
        wait(lambda: "waiting until" in capfd.readouterr().out, lambda: "it does not say that it waits")
        assert not answers
        client.DeactivateNode(DeactivateNodeRequest(node_id=node))  # as the hub does after 66 s without a heartbeat
        coming.join()
    assert answers == [node] and capfd.readouterr().out == ""


def test_a_key_that_the_hub_does_not_know_and_one_that_somebody_else_uses_are_refused_as_before(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FleetHttpClient, "ActivateNode", FleetHttpClient.ActivateNode)
    monkeypatch.setattr(supernode, "OVER", -1.0)
    supernode.outlast_the_last_session()

    def refused(client: FleetHttpClient, request: ActivateNodeRequest) -> int:
        with pytest.raises(httpx.HTTPStatusError) as error:
            client.ActivateNode(request)
        return supernode.code(error.value)

    with hub.admitted() as (client, request):
        hub.door.call(CONTROL + "unregister-node", UnregisterNodeRequest(node_id=client.ActivateNode(request).node_id))
        assert refused(client, request) == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED
        assert capfd.readouterr().out == ""
    with hub.admitted() as (client, request):
        client.ActivateNode(request)
        assert refused(client, request) == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED
        said = capfd.readouterr().out
        assert said.count("waiting until") == 1 and said.endswith("its key is in use elsewhere\n")


def test_a_hub_that_cannot_write_says_so_and_a_supernode_waits_and_goes_on(hub: Hub) -> None:
    said, before = "bouquet: /v1/fleet/activate-node was answered with 503: database is locked\n", hub.online()
    with hub.locked():
        hub.start_site("site-1")
        wait(
            lambda: said in hub.log("superlink") or hub.running["site-1"].poll() is not None, lambda: hub.log("site-1")
        )
    assert said in hub.log("superlink")
    wait(lambda: hub.online() > before or hub.running["site-1"].poll() is not None, lambda: hub.log("site-1"))
    assert hub.running["site-1"].poll() is None, hub.log("site-1")


def test_a_supernode_asks_at_once_where_work_is_likely(hub: Hub) -> None:
    ended = hub.running["site-1"].poll
    wait(lambda: hub.log("site-1").count("sleeps 0.1\n") > 2 or ended() is not None, lambda: hub.log("site-1"))
    assert ended() is None, hub.log("site-1")
    assert "sleeps 3\n" not in hub.log("site-1")


def test_a_supernode_has_our_superexec_and_ends_with_it(hub: Hub) -> None:
    supernode = hub.running["site-1"]
    [superexec] = [
        int(pid)
        for task in Path(f"/proc/{supernode.pid}/task").iterdir()
        for pid in (task / "children").read_text().split()
    ]
    assert Path(f"/proc/{superexec}/comm").read_text() == "flwr-superexec\n"
    os.kill(superexec, signal.SIGKILL)
    wait(lambda: supernode.poll() is not None, lambda: hub.log("site-1"))
    assert (
        supernode.returncode == 1
        and "bouquet: the SuperExec has ended (-9), and the SuperNode with it\n" in hub.log("site-1")
    )


def test_a_supernode_whose_heartbeat_has_died_ends(hub: Hub) -> None:
    hub.start_site("site-2")
    wait(lambda: hub.running["site-2"].poll() is not None, lambda: hub.log("site-2"))
    assert hub.running["site-2"].returncode == 1 and "ZeroDivisionError" in hub.log("site-2")
    assert "bouquet: a thread of the SuperNode has died, and the SuperNode with it\n" in hub.log("site-2")


def test_a_run_is_followed_through_a_hub_that_is_killed_and_comes_back(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(hub.home / "flwr"))
    connect(hub.address, hub.certs / "ca.crt", lambda line: None)
    run, shown, ends = hub.start_run({}), [], []
    following = threading.Thread(target=lambda: ends.append(follow(run, shown.append)), daemon=True)
    following.start()
    wait(lambda: "StreamLogs" in hub.log("superlink"), lambda: hub.log("superlink"))
    hub.running["superlink"].kill()
    wait(lambda: shown, lambda: "it says nothing of a hub that is away")
    hub.running.pop("superlink").wait()
    hub.start_hub()
    assert hub.door.call(CONTROL + "stop-run", StopRunRequest(run_id=int(run))).status == 200
    wait(lambda: not following.is_alive(), lambda: f"{shown} {hub.log('superlink')}")
    assert ends[0][0] == "finished:stopped"
    assert [line.partition(" (")[0] for line in shown] == ["bouquet: the hub does not answer now"]
