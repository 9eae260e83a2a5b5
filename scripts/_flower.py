"""What the hub's operator does with `flwr`: connect, start a run, follow it to its real end.

A run is judged by `flwr ls --format json`, because `flwr run --stream` ends with 0 whatever happened.

  python scripts/_flower.py connect 127.0.0.1:8443     write the connection that `flwr run . remote-deployment` uses
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from app import text  # noqa: E402
from app.errors import BouquetError  # noqa: E402

BIN = Path(sys.executable).parent
CONNECTION = "remote-deployment"
OURS = re.compile(r"bouquet: |[A-Z]+-\d\d  |  (found|fix|help) ")  # the server's progress lines and its named errors
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


def flwr(*args: str) -> dict:
    """One `flwr` command as JSON. Raises HOST-08 with flwr's own words when it fails."""
    done = subprocess.run(
        [BIN / "flwr", *args, "--format", "json"], cwd=ROOT, env=os.environ | QUIET, capture_output=True, text=True
    )
    try:
        answer = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        answer = {"success": False, "error-message": done.stdout + done.stderr}
    if not answer.get("success"):
        found = " ".join(str(answer.get("error-message", answer)).split())
        fix = "is the deployment up? docker compose ps, or scripts/demo"
        raise BouquetError("HOST-08", f"flwr {args[0]} was refused.", found=found, fix=fix)
    return answer


def start_run(run_config: str = "") -> str:
    """`flwr run . remote-deployment`, after a check of the run config that names the wrong key. Returns the run's id."""
    from flwr.common.config import flatten_dict, get_project_config, parse_config_args

    from app.config import RunConfig

    overrides = ["--run-config", run_config] if run_config else []
    defaults = flatten_dict(get_project_config(ROOT)["tool"]["flwr"]["app"].get("config", {}))
    RunConfig.read(defaults | parse_config_args([run_config] if run_config else None))
    return flwr("run", str(ROOT), CONNECTION, *overrides)["run-id"]


def status(run_id: str) -> tuple[str, str]:
    """(state, details) of a run; state is pending, starting, running or finished:completed|failed|stopped."""
    run = flwr("ls", CONNECTION, "--run-id", run_id)["runs"][0]
    return run["status"], run["status-details"]


def nodes_online() -> int:
    return sum(node["status"] == "online" for node in flwr("supernode", "ls", CONNECTION)["nodes"])


def follow(run_id: str, show: Callable[[str], None], timeout: float = 3600) -> tuple[str, str]:
    """Pass on the server's own lines as they come, until the run has really ended; its (state, details)."""
    shown, end = 0, time.monotonic() + timeout
    while True:
        command = [BIN / "flwr", "log", run_id, CONNECTION, "--stream"]
        with subprocess.Popen(command, env=os.environ | QUIET, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as log:
            try:
                ours = 0
                for line in log.stdout:
                    if OURS.match(line):
                        ours += 1
                        if ours > shown:  # a stream that was cut starts again from the first line
                            show(text.printable(line.rstrip()))
                shown = max(shown, ours)
            finally:
                log.kill()
        state, details = status(run_id)
        if state.startswith("finished") or time.monotonic() > end:
            return state, details
        time.sleep(2)


def connect(address: str, ca: Path) -> None:
    """Write [superlink.remote-deployment] to Flower's config.toml; everything else in the file stays as it is."""
    from flwr.cli.flower_config import init_flwr_config
    from flwr.supercore.utils import get_flwr_home

    init_flwr_config()
    file = get_flwr_home() / "config.toml"
    section = f"[superlink.{CONNECTION}]\naddress = {json.dumps(address)}\nroot-certificates = {json.dumps(str(ca))}\n"
    before = file.read_text()
    rest = re.sub(rf"(?ms)^\[superlink\.{CONNECTION}\]\n.*?(?=^\[|\Z)", "", before).rstrip()
    if before != (after := f"{rest}\n\n{section}"):
        file.write_text(after)


if __name__ == "__main__":
    assert sys.argv[1] == "connect", __doc__
    connect(sys.argv[2], ROOT / "certs" / "ca.crt")
