"""A hub and three sites as processes, made to be broken.

Enters: an empty folder. Leaves: everything that ran, ended. The base model is models/mini, a site has a dozen pictures of noise, and a
round takes seconds. Whatever ends is started again at once, as Docker's restart policy does; a process that is being held is not.
Runs are started and judged over the Control API itself, which costs nothing, where `flwr` would cost a process each time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
from flwr.common.serde import user_config_to_proto
from flwr.proto.control_pb2 import ListNodesRequest, ListNodesResponse, ListRunsRequest, ListRunsResponse, StartRunRequest, StartRunResponse
from flwr.proto.fab_pb2 import Fab
from PIL import Image

from scripts import _check
from scripts._deployment import ROOT, Processes, free_port
from scripts._hostile import CONTROL, Door
from scripts._sign import bundle

PHOTOS = {"site-1": 12, "site-2": 15, "site-3": 18}
RUN = {
    "rounds": 3, "local-steps": 16, "batch-size": 4, "lora-rank": 4, "validation-timesteps": 1, "sample-prompts": "",
    "min-sites": 3, "wait-for-sites": 180, "round-timeout": 100,
}  # fmt: skip
HOSTILE = Path(__file__).parent / "hostile"
LIMIT = 420  # seconds in which a run must have ended, whatever happened to it
BACK = 150  # seconds in which every site must be online again


class Late(Exception):
    """Something did not happen in its time."""


class Bench(Processes):
    """The deployment; its state lies under `home`."""

    def __init__(self, home: Path, env: Mapping[str, str] = {}, site_3: Mapping[str, str] = {}, hub_for_site_3: str = "") -> None:
        """env: additions to every process's environment; site_3: to that site's alone; hub_for_site_3: where it finds the hub."""
        certs = certificates(home)
        sites = {name: pictures(home / "data" / name, count, seed) for seed, (name, count) in enumerate(PHOTOS.items())}
        super().__init__(home, certs, free_port(), sites, {"BOUQUET_KEEP_SENT": "1", "BOUQUET_ADMITTED": "", "OMP_NUM_THREADS": "1", **env})
        self.pids = home / "pids.json"  # not on the volume that may be full
        self.certs_ca = certs / "ca.crt"
        self.door = Door("127.0.0.1", self.port, self.certs_ca)
        self.caches = {name: home / "cache" / name for name in PHOTOS}
        self.extra, self.hub_for_site_3 = dict(site_3), hub_for_site_3
        self.commands: dict[str, tuple[list, Mapping[str, str]]] = {}
        self.held: set[str] = set()  # not to be started again
        self.born: dict[str, float] = {}
        self.delay: dict[str, float] = {}
        self.closing = threading.Event()
        self.keeper = threading.Thread(target=self._keep, daemon=True)

    # --- up and down ----------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Bench:
        try:
            self.start_hub()
            self.register()
            for site in self.sites:
                self.start_site(site, self.hub_for_site_3 if site == "site-3" else "")
            self.keeper.start()
            self.all_online()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        if self.keeper.is_alive():
            self.keeper.join()
        for process in self.running.values():  # one that was stopped hears no SIGTERM
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGCONT)
        self.stop()

    def _spawn(self, name: str, command: list, env: Mapping[str, str] = {}) -> None:
        """As in Processes, but its log goes on, and it can be started again."""
        self.commands[name] = command, env
        env = {**self.env, **env, **(self.extra if name == "site-3" else {})}
        with (self.logs / f"{name}.log").open("a") as log:
            self.running[name] = subprocess.Popen(
                [str(part) for part in command], cwd=self.home, env=env, stdout=log, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self.born[name] = time.monotonic()
        self._note_pids()

    def _keep(self) -> None:
        """Start again what has ended: at once, and with twice the delay each time while it does not live for 10 s, as Docker does."""
        while not self.closing.wait(0.05):
            for name, process in list(self.running.items()):
                if name in self.held or process.poll() is None:
                    continue
                lived = time.monotonic() - self.born[name]
                self.delay[name] = 0.1 if lived > 10 else min(60.0, 2 * self.delay.get(name, 0.05))
                if lived >= self.delay[name] or not self.closing.wait(self.delay[name]):
                    self._spawn(name, *self.commands[name])

    # --- processes ------------------------------------------------------------------------------------------------------------

    def signal(self, name: str, number: int) -> None:
        """Send a signal to the one process `name`, by its id."""
        os.kill(self.running[name].pid, number)

    def signal_all(self, name: str, number: int) -> None:
        """The same to it and to all that it started, as `docker pause` and `docker unpause` do."""
        os.killpg(self.running[name].pid, number)

    def child(self, name: str, program: str) -> int:
        """The id of the process that runs `program` for `name`. Errors: Late, when there is none within 30 s."""
        return self.until(lambda: next(_running(self.running[name].pid, program), 0), 30, f"{name}'s {program}")

    def log(self, name: str) -> str:
        file = self.logs / f"{name}.log"
        return file.read_text(errors="replace") if file.is_file() else ""

    # --- what the hub says ----------------------------------------------------------------------------------------------------

    def until(self, what: Callable[[], object], seconds: float, name: str) -> object:
        """The first true answer of `what`. Errors: Late."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := what():
                return found
            time.sleep(0.02)
        raise Late(f"{name}: not within {seconds:.0f} s")

    def online(self) -> int:
        """Sites that are online; -1 while the hub does not answer."""
        answer = self.door.call(CONTROL + "list-nodes", ListNodesRequest())
        if answer.status != 200:
            return -1
        return sum(node.status == "online" for node in ListNodesResponse.FromString(answer.body).nodes_info)

    def all_online(self, seconds: float = BACK) -> None:
        while_waiting = lambda: self.online() == len(self.sites) or time.sleep(0.5)  # noqa: E731
        self.until(while_waiting, seconds, "every site online")

    def start_run(self, config: Mapping[str, object], app: Path = ROOT) -> str:
        """What `flwr run` sends; the run's id."""
        content = bundled(app)
        fab = Fab(hash_str=hashlib.sha256(content).hexdigest(), content=content)
        answer = self.door.call(CONTROL + "start-run", StartRunRequest(fab=fab, override_config=user_config_to_proto(dict(config))))
        assert answer.status == 200, answer
        return str(StartRunResponse.FromString(answer.body).run_id)

    def state(self, run: str) -> str:
        """As `flwr ls` says it; '' while the hub does not answer."""
        answer = self.door.call(CONTROL + "list-runs", ListRunsRequest(run_id=int(run)))
        if answer.status != 200:
            return ""
        status = ListRunsResponse.FromString(answer.body).run_dict[int(run)].status
        return f"{status.status}:{status.sub_status}".rstrip(":")

    def wait_for_end(self, run: str, seconds: float = LIMIT) -> str:
        """The state in which a run ended. Errors: Late."""
        ended = lambda: (state if (state := self.state(run)).startswith("finished") else time.sleep(0.3))  # noqa: E731
        return str(self.until(ended, seconds, f"run {run}'s end"))

    def said(self, run: str) -> dict:
        """The run's status.json; {} while there is none."""
        try:
            return json.loads((self.adapters / run / "status.json").read_text())
        except (OSError, ValueError):
            return {}

    def mid_round(self, run: str, number: int, site: str = "site-3") -> None:
        """Wait until that site works on round `number`: its ClientApp has read the photos, and trains."""
        waiting = lambda: (self.said(run).get("round"), self.said(run).get("state")) == (number, "waiting")  # noqa: E731
        self.until(waiting, 200, f"round {number}")
        heard = self.log(site).count("usable .png")
        self.until(lambda: self.log(site).count("usable .png") > heard, 60, f"{site} at work in round {number}")

    def evidence(self, run: str, **other) -> _check.Evidence:
        return _check.Evidence(self.adapters / run, self.caches, ROOT / "models", **other)


def _running(group: int, program: str) -> Iterator[int]:
    """Processes of a group whose command line or name has `program`."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (folder / "cmdline").read_bytes()  # empty: it has ended, and nobody has asked how
            names = command + (folder / "comm").read_bytes()  # a forked ClientApp has a name alone
            if command and program.encode() in names and os.getpgid(int(folder.name)) == group:
                yield int(folder.name)


@cache
def bundled(app: Path) -> bytes:
    return bundle(app)


def certificates(home: Path) -> Path:
    """certs/ of a hub of its own: scripts/certs works in the folder above it."""
    scripts = home / "scripts"
    if not scripts.is_dir():
        scripts.mkdir(parents=True)
        for name in ("certs", "_lib.sh"):
            shutil.copy(ROOT / "scripts" / name, scripts / name)
        subprocess.run([scripts / "certs", *PHOTOS], check=True, stdout=subprocess.DEVNULL, env=os.environ | {"HUB_HOST": ""})
    return home / "certs"


def pictures(folder: Path, count: int, seed: int) -> Path:
    """A site's data folder: noise with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    for number in range(count):
        Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    lines = [json.dumps({"file_name": f"{number}.png", "text": f"a flower, background {number % 3}"}) for number in range(count)]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder
