"""The hub's SuperExec: a run's process has the libraries from the start, and whatever becomes of it, the next run has
one of its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.control import Control
from benchmarks.faults.bench import _running, certificates
from benchmarks.hostile import Door
from bouquet import ROOT
from bouquet.hub.deployment import Processes, free_port
from tests.kit.wait import PATIENT, until


def said(code: str) -> list:
    """By a fresh Python, as JSON, a line each; it ends with 0."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from bouquet.flower import serverapp, superexec\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENT)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_place_in_flower_where_a_run_is_started_is_there_and_runs_alone_are_asked_for():
    kinds = said("""
import json
from flwr.supercore.superexec.plugin import AutoExecPlugin
superexec.adopt(serverapp.Runs(None))
print(json.dumps([str(kind) for kind in AutoExecPlugin.supported_task_types]))
""")
    assert kinds == [["flwr-serverapp"]]


@pytest.mark.slow
def test_a_runs_process_has_the_libraries_and_flowers_command_but_no_app_and_is_forked_from_one_thread():
    looks = (
        "import json, sys; wanted = {'torch', 'peft', 'diffusers', 'flwr.superlink.cli.flwr_serverapp', 'app'}; "
        "print(json.dumps(sorted(wanted & sys.modules.keys())), flush=True)"
    )
    loaded, threads = said(f"""
import json, multiprocessing.forkserver as forkserver, os
process = superexec.server(serverapp.COMMAND).Process(target=exec, args=({looks!r}, {{}}))
process.start()
process.join()
print(json.dumps(len(os.listdir(f"/proc/{{forkserver._forkserver._forkserver_pid}}/task"))))
""")
    assert (loaded, threads) == (["diffusers", "flwr.superlink.cli.flwr_serverapp", "peft", "torch"], 1)


# --- a real hub ------------------------------------------------------------------------------------------------------

ALONE = {"rounds": 1, "min-sites": 1, "wait-for-sites": 600, "sample-prompts": ""}  # a run that waits for a first site


class Hub(Control, Processes):
    def __init__(self, home: Path) -> None:
        super().__init__(home, certificates(home), free_port(), {})
        self.door = Door("127.0.0.1", self.port, self.certs / "ca.crt")

    def reaches(self, run: str, state: str) -> None:
        log = self.logs / "superlink.log"
        ended = lambda: any(one.poll() is not None for one in self.running.values())  # noqa: E731
        until(lambda: self.state(run) == state, lambda: (self.state(run), log.read_text()[-2000:]), over=ended)

    def process(self, program: str) -> int:
        """As ps shows it; 0 where there is none."""
        return next(_running(self.running["serverapp"].pid, program), 0)


@pytest.mark.slow
def test_after_a_runs_process_and_the_fork_server_were_killed_the_next_run_has_a_process_of_its_own(tmp_path):
    hub = Hub(tmp_path)
    try:
        hub.start_hub()
        hub.reaches(hub.start_run(ALONE), "running")
        os.kill(killed := hub.process("flwr-serverapp"), signal.SIGKILL)
        os.kill(server := hub.process("forkserver"), signal.SIGKILL)  # on a busy host it is there for a moment yet
        hub.reaches(hub.start_run(ALONE), "running")
        assert hub.process("flwr-serverapp") not in (0, killed)
        assert hub.process("forkserver") not in (0, server)
    finally:
        group = hub.running["serverapp"].pid
        hub.stop()
    assert not list(_running(group, "flwr-serverapp"))
