"""docker/health.py, by its exit code: what answers is well; what is silent, refuses or says something else is not."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bouquet import ROOT
from bouquet.hub.deployment import free_port


@pytest.fixture
def server() -> Iterator[int]:
    """Says 200 of /health and 503 of all else."""

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 503)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running.server_address[1]
        running.shutdown()


def health(*checks: str) -> tuple[int, str]:
    env = os.environ | {"http_proxy": f"http://127.0.0.1:{free_port()}"}  # where nobody is
    done = subprocess.run(
        [sys.executable, ROOT / "docker/health.py", *checks], env=env, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stderr


def test_what_answers_is_well_whatever_proxy_the_environment_names(server: int) -> None:
    assert health(f"http://127.0.0.1:{server}/health", f"tcp://127.0.0.1:{server}") == (0, "")


def test_another_answer_than_200_is_not_and_is_told(server: int) -> None:
    assert health(f"http://127.0.0.1:{server}/") == (1, f"127.0.0.1:{server}/ answers 503\n")


def test_one_check_that_does_not_hold_is_enough(server: int) -> None:
    code, said = health(f"tcp://127.0.0.1:{server}", f"tcp://127.0.0.1:{free_port()}")
    assert code == 1 and "ConnectionRefusedError" in said
    assert health(f"https://127.0.0.1:{server}/health")[0] == 1  # it speaks no TLS


def test_a_site_that_has_not_heard_from_the_hub_for_two_and_a_half_heartbeats_is_not_well(tmp_path: Path) -> None:
    heard = tmp_path / "heard"
    assert health(f"heard:{heard}")[0] == 1
    heard.touch()
    assert health(f"heard:{heard}") == (0, "")
    os.utime(heard, (time.time() - 80, time.time() - 80))
    assert health(f"heard:{heard}") == (1, "nothing heard from the hub for 80 s\n")
