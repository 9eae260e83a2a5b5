"""A hub and three sites as processes, made to be broken.

Enters: an empty folder. Leaves: everything that ran, ended. The base model is models/mini, a site has a dozen pictures
of noise, and a round takes seconds. Whatever ends is started again at once, as Docker's restart policy does; a process
that is being held is not.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from app.site import privacy
from app.site.photos import data
from benchmarks.faults.hub import BACK, Hub
from benchmarks.hostile import Door
from bouquet import ROOT
from bouquet.data import listing
from bouquet.hub.deployment import Processes, free_port
from bouquet.hub.roster import Key

PHOTOS = {"site-1": 12, "site-2": 15, "site-3": 18}
RUN = {
    "rounds": 3, "local-steps": 16, "batch-size": 4, "lora-rank": 4, "validation-timesteps": 1, "sample-prompts": "",
    "min-sites": 3, "wait-for-sites": 180, "round-timeout": 100,
}  # fmt: skip
HOSTILE = Path(__file__).parent / "hostile"


class Bench(Hub, Processes):
    """The deployment; its state lies under `home`."""

    def __init__(
        self, home: Path, env: Mapping[str, str] = {}, site_3: Mapping[str, str] = {}, hub_for_site_3: str = ""
    ) -> None:
        """env: additions to every process's environment; site_3: to that site's alone; hub_for_site_3: where it finds
        the hub.
        """
        certs = certificates(home)
        sites = {name: pictures(home / "data" / name, count, seed) for seed, (name, count) in enumerate(PHOTOS.items())}
        super().__init__(
            home,
            certs,
            free_port(),
            sites,
            {"BOUQUET_KEEP_SENT": "1", "BOUQUET_ADMITTED": "", "OMP_NUM_THREADS": "1", **env},
        )
        keys = {name: Key.read(certs / "admitted" / f"{name}.pub") for name in PHOTOS}
        self.env["SITE_PEERS"] = " ".join(f"{name}={key.fingerprint}" for name, key in keys.items())
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

    # --- up and down
    # ----------------------------------------------------------------------------------------------------------

    def up(self) -> None:
        self.start_hub()
        self.register()
        for site in self.sites:
            self.start_site(site, self.hub_for_site_3 if site == "site-3" else "")
        self.keeper.start()

    def down(self) -> None:
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
        """Start again what has ended: at once, and with twice the delay each time while it does not live for 10 s, as
        Docker does.
        """
        while not self.closing.wait(0.05):
            for name, process in list(self.running.items()):
                if name in self.held or process.poll() is None:
                    continue
                lived = time.monotonic() - self.born[name]
                self.delay[name] = 0.1 if lived > 10 else min(60.0, 2 * self.delay.get(name, 0.05))
                if lived >= self.delay[name] or not self.closing.wait(self.delay[name]):
                    self._spawn(name, *self.commands[name])

    # --- processes
    # ------------------------------------------------------------------------------------------------------------

    def signal(self, name: str, number: int) -> None:
        """Send a signal to the one process `name`, by its id."""
        os.kill(self.running[name].pid, number)

    def signal_all(self, name: str, number: int) -> None:
        """The same to it and to all that it started, as `docker pause` and `docker unpause` do."""
        os.killpg(self.running[name].pid, number)

    def child(self, name: str, program: str) -> int:
        """The id of the process that runs `program` for `name`. Errors: Late, when there is none in BACK seconds."""
        return self.until(lambda: next(_running(self.running[name].pid, program), 0), BACK, f"{name}'s {program}")

    def log(self, name: str) -> str:
        file = self.logs / f"{name}.log"
        return file.read_text(errors="replace") if file.is_file() else ""


def _running(group: int, program: str) -> Iterator[int]:
    """Processes of a group that run `program`: a forked one has its parent's command line, and a name of its own."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (folder / "cmdline").read_bytes()  # empty: it has ended, and nobody has asked how
            name = (folder / "comm").read_bytes()
            shown = command if name.startswith(b"python") else name
            if command and program.encode() in shown and os.getpgid(int(folder.name)) == group:
                yield int(folder.name)


def certificates(home: Path) -> Path:
    """certs/ of a hub of its own: scripts/certs works in the folder above it."""
    scripts = home / "scripts"
    if not scripts.is_dir():
        scripts.mkdir(parents=True)
        for name in ("certs", "_lib.sh"):
            shutil.copy(ROOT / "scripts" / name, scripts / name)
        subprocess.run(
            [scripts / "certs", *PHOTOS], check=True, stdout=subprocess.DEVNULL, env=os.environ | {"HUB_HOST": ""}
        )
    return home / "certs"


def pictures(folder: Path, count: int, seed: int) -> Path:
    """A site's data folder: noise with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    for number in range(count):
        Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    listing.write(folder, ((f"{number}.png", f"a flower, background {number % 3}") for number in range(count)))
    return everybodys(folder) if count > 1 else folder


def everybodys(folder: Path) -> Path:
    """Its photos are public: a run's adapters can be compared with another's to the bit, and a handful is enough."""
    privacy.declare_public(folder, data.scan(folder).photos)
    return folder
