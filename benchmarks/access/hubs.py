"""Two hubs to attack, made for it from the image that is here and removed afterwards: this project's, and Flower's
quickstart (stock.yaml).

Enters: a folder and a network of their own; nothing of this checkout's .env, certificates or data is used or changed.
Leaves: a Hub each. Their ports are bound to the address of a network made for this, which no other host has. Errors:
HOST-11.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2 import RegisterNodeFleetRequest

from app.errors import BouquetError
from benchmarks.access.attacks import Hub
from benchmarks.hostile import FLEET, Door, new_key, public, signed
from bouquet import ROOT
from bouquet.hub import kit
from bouquet.hub.deployment import free_port
from bouquet.hub.runs import BIN
from bouquet.hub.sign import publisher_key

PARTS = (
    "compose.yaml", "pyproject.toml", "app", "bouquet", "docker", "scripts", "certs/README.md",
    "benchmarks/access/stock.yaml",
)  # fmt: skip


def sh(*command: str, cwd: Path = ROOT, **env: str) -> str:
    """A command's output; HOST-11 with its last words when it fails."""
    done = subprocess.run(command, cwd=cwd, env=clean() | env, capture_output=True, text=True)
    if done.returncode:
        found = " ".join((done.stderr or done.stdout)[-900:].split())
        raise BouquetError(
            "HOST-11",
            found=f"{' '.join(command[:4])}: {found}",
            fix="scripts/setup builds the image; then try again",
        )
    return done.stdout


def clean() -> dict[str, str]:
    """This environment without a deployment's settings: those belong to somebody's real hub."""
    ours = ("COMPOSE_", "SITE_", "HUB_", "CONTROL_PORT", "MODELS", "IMAGE", "BOUQUET_USER")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


def image() -> str:
    """The image of this host: what .env says, or what there is."""
    wanted = [kit.image(), "bouquet:cpu", "bouquet:cuda"]
    for name in filter(None, wanted):
        if subprocess.run(["docker", "image", "inspect", name], capture_output=True).returncode == 0:
            return name
    raise BouquetError(
        "HOST-11",
        found="no image bouquet:cpu or bouquet:cuda",
        fix="scripts/setup builds it; or IMAGE=NAME",
    )


class Project:
    """One Compose project of this run, in `folder`; removed with its volumes by down()."""

    def __init__(self, folder: Path, name: str, files: str, env: dict[str, str]) -> None:
        self.folder, self.name, self.env = folder, name, {"COMPOSE_PROJECT_NAME": name, "COMPOSE_FILE": files} | env

    def compose(self, *args: str) -> str:
        return sh("docker", "compose", "--progress", "quiet", *args, cwd=self.folder, **self.env)

    def inside(self, service: str, command: list[str]) -> str:
        return self.compose("exec", "-T", service, *command)

    def addresses(self) -> dict[str, str]:
        """service/network -> address of every container."""
        found = json.loads(sh("docker", "inspect", *self.compose("ps", "-q").split()))
        addresses = {}
        for each in found:
            service = each["Config"]["Labels"]["com.docker.compose.service"]
            for network, settings in each["NetworkSettings"]["Networks"].items():
                addresses[f"{service} on {network.removeprefix(self.name + '_')}"] = settings["IPAddress"]
        return addresses

    def down(self) -> None:
        self.compose("down", "--volumes", "--timeout", "3")


@contextmanager
def outside(name: str) -> Iterator[str]:
    """A Docker network that is none of the hubs'; the host's address in it, where the hubs' public ports are."""
    sh("docker", "network", "create", name)
    try:
        yield json.loads(sh("docker", "network", "inspect", name))[0]["IPAM"]["Config"][0]["Gateway"]
    finally:
        sh("docker", "network", "rm", name)


def prepare(folder: Path, host: str) -> dict[str, str]:
    """A hub's folder as scripts/setup leaves it, with a few drawings: files, certificates for `host`, an admitted
    attacker. Its settings.
    """
    for part in PARTS:
        to = folder / part
        to.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, to)
    sh("scripts/bouquet", "data", "partition", "--sites=2", "--images-per-site=4", f"--out={folder / 'data'}")
    open_up(folder)
    user = "10001:10001" if os.getuid() == 0 else f"{os.getuid()}:{os.getgid()}"
    sh("scripts/certs", "site-1", "site-2", "attacker", cwd=folder, HUB_HOST=host, BOUQUET_USER=user)
    sh(sys.executable, "-m", "bouquet", "hub", "sign", cwd=folder)
    open_up(folder / ".bouquet", folder / "certs")
    return {"IMAGE": image(), "BOUQUET_USER": user, "HUB_BIND": host, "HUB_HOST": host, "CERTS": str(folder / "certs")}


def open_up(*folders: Path) -> None:
    """Folders, and files that are no secret, readable by the containers' own user."""
    for path in (
        path for folder in folders for path in (folder, *folder.rglob("*")) if path.suffix not in {".key", ".secret"}
    ):
        path.chmod(path.stat().st_mode | (0o755 if path.is_dir() else 0o444))


def ours(folder: Path, network: str, host: str, settings: dict[str, str], stack: ExitStack) -> Hub:
    ports = {"HUB_PORT": str(free_port()), "CONTROL_PORT": str(free_port())}
    data = {
        "MODELS": str(ROOT / "models"),
        "SITE_1_DATA": str(folder / "data/site-1"),
        "SITE_2_DATA": str(folder / "data/site-2"),
    }
    project = Project(folder, f"{network}-ours", "compose.yaml:docker/cpu.yaml", settings | ports | data)
    stack.callback(project.down)
    project.compose("up", "-d", "--wait")
    ca = folder / "certs/ca.crt"
    others = {f"control at {address}": f"{address}:{ports['CONTROL_PORT']}" for address in (host, docker0())}
    return Hub(
        Door(host, int(ports["HUB_PORT"]), ca), Door("127.0.0.1", int(ports["CONTROL_PORT"]), ca),
        load_ssh_private_key((folder / "certs/attacker.key").read_bytes(), None), project.inside,
        stranger(network, settings["IMAGE"]), stranger(f"{project.name}_sites", settings["IMAGE"]),
        others | services(project, "gateway"), "gateway:8443",
        [sys.executable, "-m", "bouquet.flower.supernode", "--auth-supernode-private-key=SITE_KEY", "--host=127.0.0.1"],
        publisher_key(folder / "certs/publisher.key"), folder / ".bouquet/signatures",
    )  # fmt: skip


def stock(folder: Path, network: str, host: str, settings: dict[str, str], stack: ExitStack) -> Hub:
    """Flower's quickstart, benchmarks/access/stock.yaml; its attacker's site has registered itself, as every SuperNode
    does there.
    """
    port = str(free_port())
    project = Project(folder, f"{network}-stock", "benchmarks/access/stock.yaml", settings | {"HUB_PORT": port})
    stack.callback(project.down)
    project.compose("up", "-d", "--wait")
    door, key = Door(host, int(port), folder / "certs/ca.crt"), new_key()
    wait_until(
        lambda: (
            door.call(FLEET + "register-node", RegisterNodeFleetRequest(public_key=public(key)), signed(key)).status
            == 200
        )
    )
    hub = Hub(
        door, door, key, project.inside, stranger(network, settings["IMAGE"]),
        stranger(f"{project.name}_default", settings["IMAGE"]), {}, "superlink:8000",
        [str(BIN / "flower-supernode"), "--host=127.0.0.1"],
    )  # fmt: skip
    wait_until(lambda: list(hub.sites().values()).count("online") == 2)
    hub.others = services(project, "")
    return hub


def stranger(network: str, image: str) -> Callable[[list[str]], str]:
    """Runs a command in a container on that network, which may nothing and goes away."""
    may_nothing = [
        "--read-only",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
        "--memory=256m",
        "--pids-limit=64",
    ]
    return lambda command: sh("docker", "run", "--rm", "--network", network, *may_nothing, image, *command)


def docker0() -> str:
    return json.loads(sh("docker", "network", "inspect", "bridge"))[0]["IPAM"]["Config"][0]["Gateway"]


def services(project: Project, door: str) -> dict[str, str]:
    """Every container's address with the port its program listens on, but for the door's."""
    ports = {"superlink": 8000, "serverapp": 8001, "supernode-1": 9094, "supernode-2": 9094, "gateway": 8080}
    return {
        f"{name}:{ports[name.split()[0]]}": f"{address}:{ports[name.split()[0]]}"
        for name, address in project.addresses().items()
    }


def wait_until(holds: Callable[[], bool], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            if holds():
                return
        except (OSError, AssertionError):
            pass
        if time.monotonic() > end:
            raise BouquetError(
                "HOST-11",
                found="Flower's own hub is not up after ten minutes",
                fix="docker compose ls; try again",
            )
        time.sleep(0.5)
