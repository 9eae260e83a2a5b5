"""The hub's SuperExec: a run's process that is slow to start keeps its task, and one that has died gives it back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from benchmarks.control import Control
from benchmarks.faults.bench import _running, certificates
from benchmarks.hostile import Door
from bouquet import ROOT
from bouquet.flower import serverapp
from bouquet.hub.deployment import Processes, free_port
from tests.kit.wait import PATIENT, until


class Line:
    """A run's process that has not begun, seen from the SuperExec: the end of a pipe that it closes."""

    def __init__(self) -> None:
        self.mine, self.theirs = os.pipe()
        self.said, self.enough = 0, threading.Event()

    def speak(self) -> None:
        self.said += 1
        if self.said == 3:
            self.enough.set()
        raise OSError("no answer")  # whatever becomes of one sign of life, there is another

    def kept(self) -> threading.Thread:
        thread = threading.Thread(target=serverapp.keep, args=(self.mine, lambda: self.speak), daemon=True)
        thread.start()
        return thread


def test_a_task_is_kept_until_its_process_begins(monkeypatch, capsys):
    monkeypatch.setattr(serverapp, "BEAT", 0.01)
    line = Line()
    thread = line.kept()
    assert line.enough.wait(PATIENT)
    os.close(line.theirs)
    thread.join(30)
    assert not thread.is_alive() and "(OSError)" in capsys.readouterr().out


def test_a_process_that_begins_in_time_is_not_spoken_for():
    line = Line()
    os.close(line.theirs)
    line.kept().join(30)
    assert line.said == 0


def test_a_process_that_never_begins_is_given_up(monkeypatch):
    monkeypatch.setattr(serverapp, "BEAT", 0.01)
    monkeypatch.setattr(serverapp, "LONGEST", 0.05)
    line = Line()
    line.kept().join(30)
    with pytest.raises(OSError):
        os.fstat(line.mine)  # it has hung up
    os.close(line.theirs)


def test_a_process_whose_superexec_has_gone_does_not_begin(tmp_path):
    """Its task is, or will be, another process's; to take it up would end the run."""
    mine, theirs = os.pipe()
    flags = ["--runtime-api-address=127.0.0.1:1", "--token=x", "--insecure", "--parent-pid=1"]
    command = [sys.executable, "-m", "bouquet.flower.serverapp", "flwr-serverapp", str(theirs), *flags]
    done = subprocess.run(command, pass_fds=[theirs], capture_output=True, text=True, timeout=120)
    os.close(theirs)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    assert os.read(mine, 1) == b""


def test_every_place_in_flower_where_a_run_is_started_is_there_and_runs_alone_are_asked_for():
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import json
from bouquet.flower import serverapp, superexec
from flwr.supercore.superexec.plugin import AutoExecPlugin
superexec.adopt(serverapp.Runs())
print(json.dumps([str(kind) for kind in AutoExecPlugin.supported_task_types]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["flwr-serverapp"]


# --- a real hub ------------------------------------------------------------------------------------------------------

LEASE, BEAT = 2, 0.3  # seconds: of a task without a sign of life, and between two of them; else 30 and 10
SLOW = """
import os, sys, time
if "flwr-serverapp" in sys.orig_argv:
    with open(os.environ["SLOW"] + "/starts", "a") as file:
        file.write(f"{os.getpid()}\\n")
    while not os.path.exists(os.environ["SLOW"] + "/go"):
        time.sleep(0.05)
"""
COUNTED = """
import os
def counted(run, speaker=serverapp.speaker):
    speak = speaker(run)
    return lambda: speak().success and open(os.environ["SLOW"] + "/signs", "a").write("x")
serverapp.speaker = counted
"""


def changed(command: list, code: str) -> list:
    """The same command, with another number in one of its modules."""
    beside = f"import sys; del sys.argv[:2]; sys.path.insert(0, {str(ROOT)!r})"
    return [command[0], "-c", f"{beside}\n{code}", *command[1:]]


class Hub(Control, Processes):
    """A hub whose leases are short and whose runs' processes start when they are let."""

    def __init__(self, home: Path) -> None:
        (home / "slow").mkdir()
        (home / "slow" / "sitecustomize.py").write_text(SLOW)
        env = {"PYTHONPATH": f"{home / 'slow'}:{ROOT}", "SLOW": str(home / "slow")}
        super().__init__(home, certificates(home), free_port(), {}, env)
        self.door = Door("127.0.0.1", self.port, self.certs / "ca.crt")

    def superlink(self) -> list:
        less = f"from flwr.supercore.corestate import sql_corestate as it; it.HEARTBEAT_DEFAULT_INTERVAL = {LEASE}"
        return changed(super().superlink(), f"{less}\nimport runpy\nrunpy.run_module(sys.argv[0], run_name='__main__')")

    def serverapp(self) -> list:
        return changed(
            super().serverapp(),
            f"from bouquet.flower import serverapp; serverapp.BEAT = {BEAT}\n{COUNTED}\nserverapp.main()",
        )

    def starts(self) -> list[str]:
        file = self.home / "slow" / "starts"
        return file.read_text().split() if file.exists() else []

    def signs(self) -> int:
        """How often the SuperLink was told that a task is being worked on, and took it."""
        return (self.home / "slow" / "signs").stat().st_size if (self.home / "slow" / "signs").exists() else 0


def wait(hub: Hub, what) -> None:
    log = hub.logs / "superlink.log"
    until(what, lambda: log.read_text()[-2000:], over=lambda: hub.running["superlink"].poll() is not None)


@pytest.mark.slow
def test_a_slow_start_happens_once_and_one_that_died_is_followed_by_another(tmp_path):
    hub = Hub(tmp_path)
    try:
        hub.start_hub()
        run = hub.start_run({"rounds": 1, "min-sites": 1, "wait-for-sites": 60, "sample-prompts": ""})
        wait(hub, lambda: hub.signs() > 3 * LEASE / BEAT)  # three leases later
        assert hub.state(run) == "starting" and len(hub.starts()) == 1
        os.kill(int(hub.starts()[0]), signal.SIGKILL)
        wait(hub, lambda: len(hub.starts()) == 2)
        (tmp_path / "slow" / "go").touch()
        wait(hub, lambda: hub.state(run) == "running")
        named = next(_running(hub.running["serverapp"].pid, "flwr-serverapp"))  # as ps shows it
        assert named == int(hub.starts()[1])
    finally:
        hub.stop()
    assert len(hub.starts()) == 2
