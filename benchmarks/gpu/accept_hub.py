"""The hub and the two sites of `scripts/bench accept`: started, asked and looked at from outside.

Enters: a folder, certificates, the sites' photos, the base models and the one GPU. Leaves: states, histories, and who
works at a site.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.proto.control_pb2 import StopRunRequest

from benchmarks.control import Control, read
from benchmarks.gpu.accept_desk import Desk, Late, Wrong, kill
from benchmarks.hostile import CONTROL, Door
from benchmarks.speed import watch
from bouquet.hub.deployment import Processes, free_port

IDLE = 20.0  # seconds in which the worker of a run that is over must have ended


class Deployment(Control, Processes):
    """A hub and two sites as processes, started site by site; what has once been ended for good starts nothing more."""

    def __init__(self, home: Path, certs: Path, sites: Mapping[str, Path], models: Path, gpu: str) -> None:
        usual = {"HF_HUB_OFFLINE": "1", "SITE_KEEP": "", "SITE_LIMITS": ""}  # what is accepted is what everybody gets
        super().__init__(home, certs, free_port(), sites, usual, models=models, gpus=dict.fromkeys(sites, gpu))
        self.door = Door("127.0.0.1", self.port, certs / "ca.crt")
        self.caches = {name: home / "cache" / name for name in sites}
        self.closing = threading.Lock()
        self.closed = False
        self.open: set[str] = set()  # runs whose end nobody has seen

    # --- up and down
    # ---------------------------------------------------------------------------------------------------------

    def _spawn(self, *args: Any, **more: Any) -> None:
        with self.closing:
            if self.closed:
                raise Late("the command is ending")
            super()._spawn(*args, **more)

    def down(self) -> None:
        """End everything at once: nobody will miss a goodbye."""
        with self.closing:
            self.closed = True
        for process in self.running.values():
            kill(process)

    def serve(self, names: Sequence[str], desk: Desk) -> None:
        """Have these sites online, and no other, with nothing left of an earlier check: no run, and no worker at a
        site.
        """
        for run in list(self.open):
            self.stop_run(run)
        self._have(names, desk)
        try:
            desk.until(lambda: not self.workers(), IDLE, "an earlier run's workers gone")
        except Late:  # one that does not hear that its run is over
            for name in names:
                self.stop_site(name)
            self._have(names, desk)

    def _have(self, names: Sequence[str], desk: Desk) -> None:
        for name in self.sites:
            if name in self.running and (name not in names or self.running[name].poll() is not None):
                self.stop_site(name)
            if name in names and name not in self.running:
                self.start_site(name)
        desk.until(lambda: self.online() == len(names), 90, f"{', '.join(names)} online, and nobody else", 0.4)

    # --- the hub's answers
    # ---------------------------------------------------------------------------------------------------

    def start_run(self, config: Mapping[str, Any], app: Path | None = None) -> str:
        """The run's id. Errors: Wrong where the hub does not take it."""
        try:
            self.open.add(run := super().start_run(config, app))
        except AssertionError as answer:
            raise Wrong(f"the hub does not start a run: {answer}") from None
        return run

    def stop_run(self, run: str) -> None:
        """What `flwr stop` sends."""
        self.door.call(CONTROL + "stop-run", StopRunRequest(run_id=int(run)))
        self.open.discard(run)

    def state(self, run: str) -> str:
        if (state := super().state(run)).startswith("finished"):
            self.open.discard(run)
        return state

    # --- what can be seen from outside
    # ---------------------------------------------------------------------------------------

    def history(self, run: str) -> dict[str, Any]:
        """The run's history.json; {} where it left none."""
        return read(self.adapters / run / "history.json")

    def log(self, name: str) -> str:
        file = self.logs / f"{name}.log"
        return file.read_text(errors="replace") if file.is_file() else ""

    def workers(self) -> set[int]:
        """Ids of the processes that take messages at any site."""
        sessions = {process.pid: name for name, process in self.running.items() if name in self.sites}
        return {process.pid for _, process in watch.processes(sessions) if process.name == watch.MESSAGE}
