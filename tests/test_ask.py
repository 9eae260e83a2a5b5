"""Asking the hub without `flwr`: what is made of its answers, and that Flower's own modules stay what they are."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace

import pytest
from flwr.proto import control_pb2
from flwr.proto.control_pb2 import ListRunsRequest, ListRunsResponse
from flwr.proto.run_pb2 import Run, RunStatus
from flwr.supercore.protobuf import framing

from app import bundle
from app.errors import BouquetError
from bouquet import ROOT
from bouquet.hub import control, runs
from tests.kit.wait import PATIENT

SECTION = "[superlink.remote-deployment]\n"
NOON = "2026-01-02T12:00:00"


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[SimpleNamespace]:
    """A hub on loopback that says what it is told to; `asked` is what it was asked."""
    hub = SimpleNamespace(status=200, body=b"", asked=[], silence=0.0)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            hub.asked.append((self.path, self.headers["Content-Type"], body))
            self.send_response(hub.status)
            self.end_headers()
            time.sleep(hub.silence)
            with suppress(ConnectionError):  # it was left
                self.wfile.write(hub.body)

        def log_message(self, *_) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    (tmp_path / "config.toml").write_text(f'{SECTION}address = "127.0.0.1:{server.server_port}"\ninsecure = true\n')
    yield hub
    server.shutdown()
    server.server_close()


def known(*found: Run) -> bytes:
    return ListRunsResponse(run_dict={run.run_id: run for run in found}).SerializeToString()


def error() -> BouquetError:
    with pytest.raises(BouquetError) as caught:
        control.run("7")
    assert caught.value.code == "HOST-08"
    return caught.value


def test_the_newest_run_is_asked_for_with_one_call(hub):
    hub.body = known(Run(run_id=7, pending_at="earlier", starting_at=NOON, status=RunStatus(status="starting")))
    assert control.run() == control.Told("7", "starting", "", NOON)
    [(path, kind, body)] = hub.asked
    assert (path, kind) == ("/v1/control/list-runs", "application/protobuf")
    assert ListRunsRequest.FromString(body) == ListRunsRequest(limit=1)


def test_a_run_that_ended_says_how(hub):
    status = RunStatus(status="finished", sub_status="fai\nled", details="\x1b[2Jno")
    hub.body = known(Run(run_id=7, pending_at="a", finished_at=NOON, status=status))
    assert control.run("7") == control.Told("7", "finished:fai led", "\ufffd[2Jno", NOON)


@pytest.mark.parametrize(("since", "shown"), [("", "never"), ("\x1b[2Jnow", "\ufffd[2Jnow")])
def test_a_run_that_began_at_no_time_is_named(hub, since, shown):
    hub.body = known(Run(run_id=7, pending_at=since))
    assert error().found == f"run 7 since {shown}"


def test_no_run_is_none(hub):
    hub.body = known()
    assert control.run() is None and control.run("../7") is None
    assert control.run(str(2**64)) is None and control.run("9" * 5000) is None and len(hub.asked) == 1
    hub.status, hub.body = 404, b'{"detail": "Run ID not found.", "code": 2}'
    assert control.run("7") is None


@pytest.mark.parametrize(
    ("body", "said"), [({"detail": "No \x1b[2Jnodes."}, "No \ufffd[2Jnodes."), (["x"], ""), ({}, ""), (3, "")]
)
def test_a_refusal_is_told_in_the_hubs_own_words(hub, body, said):
    hub.status, hub.body = 400, json.dumps(body).encode()
    assert error().found == f"400 {said or 'without a word that we know'}"


def test_an_answer_without_an_end_is_left(hub, monkeypatch):
    monkeypatch.setattr(control, "LARGEST", 1 << 20)
    hub.body = bytes((1 << 20) + 1)
    assert error().found == "more than 1 MiB in one answer"


@pytest.mark.parametrize(("status", "again"), [(400, False), (403, False), (502, True), (503, True)])
def test_of_a_hub_that_is_away_or_busy_asking_again_may_help(hub, status, again):
    hub.status, hub.body = status, b"[" * 100_000
    assert isinstance(error(), control.Unanswered) == again


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # flwr 1.41 with pathspec 1.1
def test_a_run_is_started_by_the_very_bytes_that_flwr_run_sends(hub, tmp_path):
    shutil.copytree(ROOT / "app", (app := tmp_path / "checkout") / "app", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", app)
    (app / ".venv/app").mkdir(parents=True)
    (app / ".venv/app/config.py").write_text("")
    hub.body = control_pb2.StartRunResponse(run_id=7).SerializeToString()
    changes = {"rounds": 3, "sample-prompts": "a rose", "ema-decay": 0.5}
    assert control.start_run(bundle.build(app), changes) == "7"
    words = " ".join(
        f"{key}='{value}'" if isinstance(value, str) else f"{key}={value}" for key, value in changes.items()
    )
    command = [runs.BIN / "flwr", "run", app, runs.CONNECTION, "--run-config", words]
    subprocess.run(command, env=os.environ | runs.QUIET, check=True, timeout=PATIENT)
    ours, theirs = hub.asked
    assert ours[0] == theirs[0] == "/v1/control/start-run"
    assert control_pb2.StartRunRequest.FromString(ours[2]) == control_pb2.StartRunRequest.FromString(theirs[2])


def test_a_runs_log_comes_in_pieces_each_with_its_moment(hub):
    pieces = [("bouquet: ro", 2.5), ("und 1/2\n", 3.5)]
    said = [control_pb2.StreamLogsResponse(log_output=text, latest_timestamp=at) for text, at in pieces]
    hub.body = b"".join(map(framing.frame_message, said))
    assert [*control.log("7", 1.5)] == pieces
    [(path, _, body)] = hub.asked
    asked = control_pb2.StreamLogsRequest(run_id=7, after_timestamp=1.5)
    assert path == "/v1/control/stream-logs" and control_pb2.StreamLogsRequest.FromString(body) == asked


def test_of_a_runs_log_that_is_no_good_it_is_said_whether_to_ask_again(hub):
    first, second = (
        framing.frame_message(control_pb2.StreamLogsResponse(log_output=text, latest_timestamp=1.0)) for text in "ab"
    )

    def ends(body: bytes, status: int = 200, said: str = "") -> BouquetError:
        hub.body, hub.status, came = body, status, []
        with pytest.raises(BouquetError, match="HOST-08") as caught:
            for piece in control.log("7", 0.0):
                came.append(piece)
        assert came == [(text, 1.0) for text in said]
        return caught.value

    for cut in (first + second[:-3], first + second[:2]):  # in a message, and in its size
        assert (why := ends(cut, said="a")).found == "it was cut" and isinstance(why, control.Unanswered)
    assert isinstance(ends(b"{}", 503), control.Unanswered)
    for wrong in (ends(b"\xff\xff\xff\xff" + bytes(99)), ends(b"\0\0\0\2\xff\xff")):
        assert not isinstance(wrong, control.Unanswered)
    assert ends(b'{"detail": "Run ID not found.", "code": 2}', 404).found == "404 [code: 2] Run ID not found."


def test_a_log_of_nothing_new_is_over_after_a_silence(hub, monkeypatch):
    monkeypatch.setattr(control, "LONGEST", 0.05)
    hub.silence = 1.0
    assert [*control.log("7", 0.0)] == []


def test_a_hub_that_starts_no_run_is_quoted(hub):
    hub.body = control_pb2.StartRunResponse(note="not \x1b[2Jnow").SerializeToString()
    with pytest.raises(BouquetError, match="HOST-08  The hub started no run") as caught:
        control.start_run(b"", {})
    assert caught.value.found == "not \ufffd[2Jnow"


def test_an_answer_of_another_kind_is_no_answer(hub):
    hub.body = b"\xff\xff\xff"
    assert "200" in error().found


def test_a_hub_that_is_not_there_is_named(hub, tmp_path):
    (tmp_path / "config.toml").write_text(f'{SECTION}address = "127.0.0.1:1"\ninsecure = true\n')
    assert "refused" in error().found.lower()


@pytest.mark.parametrize("text", [None, "", "[superlink]\ndefault = 'local'\n", SECTION, "= no toml", "superlink = 3"])
def test_without_a_connection_the_command_that_writes_one_is_named(hub, tmp_path, text):
    file = tmp_path / "config.toml"
    file.unlink() if text is None else file.write_text(text)
    assert error().headline == "The hub does not answer."


def test_flower_itself_is_whole_after_its_messages_were_taken_out_of_it():
    code = """
from bouquet.hub import control, runs
import sys
assert "flwr" not in sys.modules
import flwr, flwr.cli.build
from flwr.proto import control_pb2
from flwr.proto.control_pb2 import ListRunsRequest
from flwr.supercore.control import ControlHttpClient
assert control_pb2 is control.control and flwr.__version__
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=PATIENT)


def test_where_flower_is_in_memory_its_messages_are_taken_from_there():
    assert control.messages() is control_pb2


@pytest.mark.parametrize("command", ["admission", "status"])
def test_the_hubs_commands_wait_for_neither_flower_nor_torch(command):
    code = f"import bouquet.hub.{command}, sys; print(*({{'flwr', 'httpx', 'numpy', 'torch'}} & sys.modules.keys()))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, timeout=PATIENT).split() == []
