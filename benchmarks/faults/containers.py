"""The hub and three sites as containers, and what happens to containers: kills, pauses, networks that are taken away,
an engine that restarts.

Enters: an empty folder. Leaves: a Compose project of its own, removed with its volumes. Everything is the product's:
compose.yaml, the image, scripts/setup, scripts/add-site, signed code, Docker's restart policy; only that volumes are
folders here, for the checker to read. Needs a Docker Engine on this host and root, since a container's process is
killed by its id: `docker kill` would tell Docker not to start it again. Restarting the engine stops every container of
the host, so BOUQUET_ENGINE_RESTART must name the command that does it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

from benchmarks.faults.bench import PHOTOS, pictures
from benchmarks.faults.case import Case
from benchmarks.faults.hub import Hub
from benchmarks.hostile import Door
from bouquet.hub.deployment import clone, free_port

OVERLAY = ".bouquet/faults.json"
RESTART = "BOUQUET_ENGINE_RESTART"


class Containers(Hub):
    """The deployment; everything of it lies under `home`."""

    def __init__(self, home: Path) -> None:
        self.home = self.app = home / "bouquet"
        self.adapters = home / "adapters"
        self.caches = {site: home / "cache" / site for site in PHOTOS}
        self.sites = {
            site: pictures(home / "data" / site, count, seed) for seed, (site, count) in enumerate(PHOTOS.items())
        }
        self.project, self.control = f"bouquet-faults-{os.getpid()}", free_port()
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("COMPOSE_", "SITE_"))}
        self.env["FLWR_HOME"] = str(home / "operator")
        self.door = Door("127.0.0.1", self.control, self.home / "certs" / "ca.crt")

    def up(self) -> None:
        clone(self.home)
        settings = {
            "COMPOSE_PROJECT_NAME": self.project,
            "IMAGE": "bouquet:faults",
            "HUB_PORT": free_port(),
            "CONTROL_PORT": self.control,
            "SITE_THREADS": 1,
        }
        settings |= {f"SITE_{number}_DATA": self.sites[f"site-{number}"] for number in (1, 2)}
        (self.home / ".env").write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
        self.sh("scripts/setup", "--engine", "docker")
        self.sh("scripts/add-site", "3", "--data", str(self.sites["site-3"]))
        self.overlay()
        self.compose("up", "-d", "--wait")

    def down(self) -> None:
        self.compose("down", "--volumes", "--timeout", "5")

    def overlay(self) -> None:
        """Volumes that are folders of this host, and sites that keep a journal of what they sent."""
        folders = {"adapters": self.adapters} | {f"cache-{site[-1]}": folder for site, folder in self.caches.items()}
        user, _, group = self.setting("BOUQUET_USER").partition(":")
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
            os.chown(folder, int(user), int(group))
        volumes = {
            name: {"driver_opts": {"type": "none", "o": "bind", "device": str(folder)}}
            for name, folder in folders.items()
        }
        services = {
            service(site): {"environment": {"BOUQUET_KEEP_SENT": "1", "OMP_NUM_THREADS": "1"}} for site in self.sites
        }
        (self.home / OVERLAY).write_text(json.dumps({"services": services, "volumes": volumes}, indent=1))
        file = self.home / ".env"
        file.write_text(
            file.read_text().replace(files := f"COMPOSE_FILE={self.setting('COMPOSE_FILE')}", f"{files}:{OVERLAY}")
        )

    def setting(self, key: str) -> str:
        lines = (self.home / ".env").read_text().splitlines()
        return next(line.partition("=")[2] for line in reversed(lines) if line.startswith(f"{key}="))

    # --- Docker
    # -----------------------------------------------------------------------------------------------------------------

    def sh(self, *command: str) -> str:
        """Errors: OSError with the command's last words."""
        done = subprocess.run(command, cwd=self.home, env=self.env, capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"{' '.join(command)}: {(done.stdout + done.stderr)[-2000:]}")
        return done.stdout

    def compose(self, *command: str) -> str:
        return self.sh("docker", "compose", "--progress", "quiet", *command)

    def container(self, name: str) -> str:
        """The container's name of `site-3`, `superlink` or `serverapp`."""
        return f"{self.project}-{service(name)}-1"

    def pid(self, name: str) -> int:
        """The container's first process, as this host sees it."""
        return int(self.sh("docker", "inspect", "--format", "{{.State.Pid}}", self.container(name)))

    def log(self, name: str) -> str:
        done = subprocess.run(
            ["docker", "logs", self.container(name)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        return done.stdout


def service(name: str) -> str:
    return name.replace("site-", "supernode-")


@cache
def no_docker() -> str:
    """Why containers cannot be harmed here; '' where they can."""
    if os.geteuid():
        return "killing a container's process takes root"
    try:
        done = subprocess.run(["docker", "compose", "ls", "-q"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no Docker Engine answers ({type(error).__name__})"
    return "" if done.returncode == 0 else f"no Docker Engine answers ({done.stderr.strip().splitlines()[-1]})"


def no_restart() -> str:
    return no_docker() or (
        "" if os.environ.get(RESTART) else f"{RESTART} does not name the command that restarts the engine"
    )


# --- faults
# ----------------------------------------------------------------------------------------------------------------------

Fault = Callable[[Containers, str], None]


def killed(name: str) -> Fault:
    return lambda bench, run: os.kill(bench.pid(name), signal.SIGKILL)


Command = Callable[[Containers], tuple[str, ...]]


def for_a_while(do: Command, undo: Command, seconds: float) -> Fault:
    """One Docker command, and after some seconds the one that takes it back."""

    def fault(bench: Containers, run: str) -> None:
        bench.sh("docker", *do(bench))
        try:
            time.sleep(seconds)
        finally:
            bench.sh("docker", *undo(bench))

    return fault


def paused(name: str, seconds: float) -> Fault:
    return for_a_while(
        lambda bench: ("pause", bench.container(name)), lambda bench: ("unpause", bench.container(name)), seconds
    )


def cut_off(seconds: float) -> Fault:
    """Docker takes the network of a site's container away, and gives it back."""
    end: Command = lambda bench: (f"{bench.project}_sites", bench.container("site-3"))  # noqa: E731
    return for_a_while(
        lambda bench: ("network", "disconnect", *end(bench)), lambda bench: ("network", "connect", *end(bench)), seconds
    )


def engine(bench: Containers, run: str) -> None:
    """Every container of the host stops, and Docker starts those again that it is to start."""
    bench.sh("bash", "-c", os.environ[RESTART])
    bench.until(lambda: not subprocess.run(["docker", "info"], capture_output=True).returncode, 120, "the engine")


def case(name: str, fault: Fault, needs: Callable[[], str] = no_docker, most: int = 5) -> Case:
    return Case("docker", name, fault, Containers, needs=needs, most=most)


CASES = [
    case("SIGKILL of a site's container", killed("site-3")),
    case("SIGKILL of the SuperLink's container", killed("superlink")),
    case("SIGKILL of the ServerApp's container", killed("serverapp")),
    case("docker pause of a site for 20 s", paused("site-3", 20)),
    case("docker pause of a site for 90 s", paused("site-3", 90), most=3),
    case("docker pause of the SuperLink for 20 s", paused("superlink", 20)),
    case("docker pause of the SuperLink for 90 s", paused("superlink", 90), most=3),
    case("a site's container without its network for 20 s", cut_off(20)),
    case("a site's container without its network for 90 s", cut_off(90), most=3),
    case("the engine restarts", engine, no_restart),
]
