"""What a SuperNode of ours does that Flower's does not: it answers for a ClientApp that left no reply, and leaves no
SuperExec behind that takes messages of the next one.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import httpx
import pytest
from flwr.app import Message, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode, SubStatus
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

from bouquet import ROOT
from bouquet.flower import superexec, supernode
from tests.kit import tiny
from tests.kit.wait import PATIENT

RUN = 7


@pytest.fixture
def node(monkeypatch) -> InMemoryNodeState:
    """The state of a SuperNode of ours: a run's message has come, and its ClientApp is at work on it."""
    monkeypatch.setattr(InMemoryNodeState, "finish_task", InMemoryNodeState.finish_task)  # back afterwards
    supernode.answer_for_the_dead()
    state = InMemoryNodeState(ObjectStoreFactory().store())
    state.set_node_id(1)
    return state


def comes(state: InMemoryNodeState, name: str) -> tuple[int, Message]:
    """A message of the run reaches the site: (its task, the message)."""
    metadata = Metadata(RUN, name, SUPERLINK_NODE_ID, 1, "", "1", 1e9, 1e9, "train")
    message = make_message(metadata=metadata, content=RecordDict())
    task = state.create_task(TaskType.CLIENT_APP, RUN)
    state.store_message(message)
    return task, message


def begins(state: InMemoryNodeState, task: int) -> None:
    assert state.claim_task(task) and state.activate_task(task)


def read(state: InMemoryNodeState) -> None:
    [message] = state.get_messages_legacy(run_ids=[RUN], is_reply=False)
    state.record_message_processing_start(message.metadata.message_id)


def replies(state: InMemoryNodeState) -> list[tuple[str, int]]:
    return [
        (reply.metadata.reply_to_message_id, reply.error.code) for reply in state.get_messages_legacy(is_reply=True)
    ]


@pytest.mark.parametrize("looked", [True, False])
@pytest.mark.parametrize("said", [SubStatus.FAILED, SubStatus.COMPLETED])
def test_a_client_app_that_is_over_without_a_reply_gets_one_whatever_it_says_of_itself(node, looked, said):
    task, _ = comes(node, "a")
    begins(node, task)
    if looked:
        read(node)
    assert node.finish_task(task, said, "")
    assert replies(node) == [("a", ErrorCode.CLIENT_APP_CRASHED)]
    assert not node.get_messages_legacy(is_reply=False)  # the next ClientApp would take it for its own


def test_a_reply_that_is_there_stays_the_only_one(node):
    task, message = comes(node, "a")
    begins(node, task)
    read(node)
    reply = Message(RecordDict(), reply_to=message)
    reply.metadata.__dict__["_message_id"] = "b"
    node.store_message(reply)
    assert node.finish_task(task, SubStatus.COMPLETED, "")
    assert [each.metadata.message_id for each in node.get_messages_legacy(is_reply=True)] == ["b"]


@pytest.mark.parametrize("looked", [True, False])
def test_the_next_message_of_a_run_is_not_answered_for_the_last_ones_client_app(node, looked):
    """Its reply has gone, and its process says that it is over only after that."""
    task, _ = comes(node, "a")
    begins(node, task)
    read(node)
    node.delete_messages(message_ids=["a"])
    later, _ = comes(node, "b")
    if looked:
        begins(node, later)
        read(node)
    assert node.finish_task(task, SubStatus.COMPLETED, "")
    assert replies(node) == []
    assert len(node.get_messages_legacy(is_reply=False)) == (not looked)


ORDERED = """
import multiprocessing, sys
from bouquet.flower import superexec
ours, theirs = multiprocessing.Pipe()
ours.send(sys.argv[1:])
superexec.run(theirs, checks=False)
"""


@pytest.mark.slow
def test_a_superexec_whose_supernode_ended_while_it_started_asks_nobody_for_work():
    """The next SuperNode may have the same address, and would wait for the reply to what this one took along."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        asked = threading.Thread(target=door.accept, daemon=True)
        asked.start()
        address = f"127.0.0.1:{door.getsockname()[1]}"
        ended = subprocess.Popen(["true"])
        ended.wait()
        told = ["--insecure", "--runtime-api-address", address, "--parent-pid", str(ended.pid)]
        command = [sys.executable, "-c", ORDERED, *told]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENT)
        assert done.returncode == 1 and asked.is_alive(), done.stdout + done.stderr


# --- the site's own checks, before it goes online ---------------------------------------------------------------------


@pytest.mark.slow
def test_a_site_whose_checks_fail_never_goes_online_and_leaves_no_process(tmp_path):
    """HUB is not set, so that its check fails; Flower's own SuperNode, with these arguments, would ask for ever."""
    (cache := tmp_path / "cache").mkdir()
    site = {"BOUQUET_DATA": tiny.site(tmp_path / "photos"), "BOUQUET_MODELS": tiny.models(), "BOUQUET_CACHE": cache}
    site |= {"SITE_NAME": "site-1", "SITE_GPU": "none", "RUN_CONFIG": "base-model='tiny' resolution=16"}
    site |= {"BOUQUET_PREFLIGHT": "1", "FLWR_HOME": tmp_path / "flwr"}
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SITE_", "BOUQUET_"))}
    env |= {name: str(value) for name, value in site.items()}
    command = [sys.executable, "-m", "bouquet.flower.supernode", "--insecure", "--superlink=127.0.0.1:1"]
    node = subprocess.Popen(command, cwd=ROOT, env=env, stdout=-1, stderr=subprocess.STDOUT, text=True)
    said, _ = node.communicate(timeout=PATIENT)  # to the end of its output: nobody has that any more
    lines = {line.split()[1]: line.split()[0] for line in said.splitlines() if re.match("(pass|warn|fail|skip) ", line)}
    assert node.returncode == 1 and "not ready: " in said and "SuperNode ID" not in said
    assert (lines["name"], lines["model"], lines["data"], lines["memory"]) == ("pass", "warn", "pass", "pass"), said
    assert (lines["hub"], lines["key"]) == ("fail", "skip")


class Answers:
    """What a hub answers to an activation, one after the other: a code of Flower's, an HTTP status, or a node."""

    def __init__(self, monkeypatch, *given: int) -> None:
        hub, self.given, self.asked, self.now = self, [*given], [], 0.0
        monkeypatch.setattr(FleetHttpClient, "ActivateNode", lambda self, request: hub.to(request))
        monkeypatch.setattr(supernode.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(supernode.time, "sleep", self.later)
        supernode.outlast_the_last_session()

    def later(self, seconds: float) -> None:
        self.now += seconds

    def to(self, request: ActivateNodeRequest) -> str:
        self.asked.append(request.heartbeat_interval)
        if (answer := self.given.pop(0)) == ADMITTED:
            return "a node"
        status, body = (answer, {}) if answer < 1000 else (400, {"code": answer, "detail": "no"})
        response = httpx.Response(status, json=body, request=httpx.Request("POST", "http://hub"))
        raise httpx.HTTPStatusError("", request=response.request, response=response)

    def come(self) -> str:
        return FleetHttpClient.ActivateNode(None, ActivateNodeRequest(public_key=b"k", heartbeat_interval=30))


ADMITTED, BUSY = 0, 503
AWAY, KNOWN = ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED, ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL


def test_a_hub_that_is_busy_while_a_site_waits_for_its_last_session_is_asked_again_as_flower_does(monkeypatch, capsys):
    """Flower itself comes again after 503, with a new call."""
    hub = Answers(monkeypatch, AWAY, BUSY, AWAY, KNOWN, BUSY, AWAY, KNOWN, ADMITTED)
    for _ in range(2):
        with pytest.raises(httpx.HTTPStatusError) as error:
            hub.come()
        assert error.value.response.status_code == BUSY
    assert hub.come() == "a node" and hub.asked == [30, 0, 30, 0, 30, 30, 0, 30]
    assert capsys.readouterr().out.count("waiting until") == 1


def test_it_waits_no_longer_for_a_link_that_breaks_now_and_then(monkeypatch, capsys):
    """Two seconds a time: 46 times are more than 90 s."""
    hub = Answers(monkeypatch, *[AWAY, KNOWN] * 30, BUSY, *[AWAY, KNOWN] * 17)
    for status in (BUSY, 400):
        with pytest.raises(httpx.HTTPStatusError) as error:
            hub.come()
        assert error.value.response.status_code == status
    assert hub.given == [] and capsys.readouterr().out.endswith("its key is in use elsewhere\n")


@pytest.mark.parametrize("checks", [0, 1, -9])
def test_a_superexec_waits_for_its_orders_while_there_is_a_supernode_whose_checks_have_passed(monkeypatch, checks):
    done = SimpleNamespace(join=lambda: None, exitcode=checks)
    monkeypatch.setattr(superexec, "child", lambda fork, does: done)
    ours, theirs = multiprocessing.Pipe()
    ours.send(["--insecure"])
    if checks:
        with pytest.raises(SystemExit, match="1"):
            superexec.ordered(None, theirs, True)
        assert not ours.poll()
        return
    assert superexec.ordered(None, theirs, True) == ["--insecure"] and ours.recv() is True
    ours, theirs = multiprocessing.Pipe()
    ours.close()
    with pytest.raises(SystemExit, match="1"):
        superexec.ordered(None, theirs, True)
