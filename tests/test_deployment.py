"""A hub that starts is waited for while it works, and named when it is stuck; and which containers are a folder's."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import copy_project, sh

from app.errors import BouquetError
from benchmarks.faults.bench import certificates
from bouquet import ROOT
from bouquet.hub import deployment, kit
from bouquet.hub.deployment import Alive, Processes, end_group, free_port


@pytest.fixture
def hub(tmp_path):
    """A hub whose SuperLink is another program: `hub.program(code)`."""

    class Hub(Processes):
        def program(self, code: str) -> subprocess.Popen:
            self._spawn("superlink", [sys.executable, "-uc", code])
            return self.running["superlink"]

    running = Hub(tmp_path, certificates(tmp_path), free_port(), {})
    for folder in (running.logs, running.pids.parent):
        folder.mkdir(parents=True)
    yield running
    running.stop()


def test_a_superlink_that_lives_and_does_nothing_is_named_and_not_ended_by_the_wait(hub):
    stuck = hub.program("import signal; print('migrating'); signal.pause()")
    with pytest.raises(BouquetError) as caught:
        hub._wait_for_superlink(timeout=0.5)
    assert caught.value.code == "HOST-06" and "migrating" in caught.value.found and stuck.poll() is None


def test_a_superlink_that_has_ended_is_named_at_once(hub):
    hub.program("print('STATE-02  of a newer version')").wait()
    with pytest.raises(BouquetError) as caught:
        hub._wait_for_superlink()
    assert caught.value.code == "HOST-06" and "STATE-02" in caught.value.found


def test_while_it_starts_the_hubs_own_last_line_is_shown(hub, monkeypatch, capsys):
    monkeypatch.setattr(deployment, "TELL", 0.0)
    hub.program("import signal; print('bouquet: the database: step 3\\x1b[2J'); signal.pause()")
    with pytest.raises(BouquetError):
        hub._wait_for_superlink(timeout=1.5)
    assert "it says: bouquet: the database: step 3\ufffd[2J" in capsys.readouterr().err


def test_a_disk_without_room_is_named_at_the_start_and_keeps_nothing_from_being_stopped(hub):
    hub.program("import signal; signal.pause()")
    hub.pids.unlink()
    hub.pids.with_suffix(".new").symlink_to("/dev/full")  # as a full disk: every byte that is written is refused
    with pytest.raises(BouquetError) as caught:
        hub._spawn("serverapp", [sys.executable, "-c", ""])
    assert caught.value.code == "HOST-06" and "No space left on device" in caught.value.found
    hub.stop()
    assert hub.running == {}


@pytest.mark.parametrize("torn", ["", '{"superlink": 12', "[]"])
def test_a_torn_list_of_processes_does_not_keep_the_next_start_from_starting(hub, torn):
    hub.pids.write_text(torn)
    hub.stop_leftovers()
    assert not hub.pids.exists()


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(deployment.time, "monotonic", lambda: now[0])
    return now


def test_what_grows_its_log_or_uses_the_processor_is_not_silent(tmp_path, clock, monkeypatch):
    log = tmp_path / "log"
    alive = Alive(os.getpid())
    used = iter(["00:00:01", "00:00:01", "00:00:01", "00:00:02", "00:00:02"])
    ps = lambda *_, **__: subprocess.CompletedProcess([], 0, stdout=next(used))  # noqa: E731
    monkeypatch.setattr(deployment.subprocess, "run", ps)
    silent = []
    for write in ("a", "", "b", "", ""):  # then the same, more in the log, more of the processor, the same
        clock[0] += 10
        with log.open("a") as out:
            out.write(write)
        silent.append(alive.silent(log))
    assert silent == [0, 10, 0, 0, 10]


def test_the_processor_time_of_a_process_is_what_the_system_says(tmp_path, monkeypatch):
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
    try:
        alive = Alive(busy.pid)
        monkeypatch.setattr(Alive, "LOOK", -1.0)
        alive.silent(tmp_path / "log")
        first = alive.seen
        while alive.seen == first:  # until it has used another second
            alive.silent(tmp_path / "log")
            assert busy.poll() is None
    finally:
        end_group(busy.pid)
        busy.wait()


# --- whose containers these are --------------------------------------------------------------------------------------

DOCKER = """#!/bin/sh
# in place of docker: containers as `id project folder`, volumes as `name project`, a line each
case "$1 $2" in
  'ps -aq') grep -s " ${4##*=} " "$STATE/containers" | cut -d' ' -f1 ;;
  'inspect --format') shift 3; for id; do grep "^$id " "$STATE/containers" | cut -d' ' -f3-; done ;;
  'volume ls') grep -s " ${5##*=}\\$" "$STATE/volumes" | cut -d' ' -f1 ;;
  *) echo "docker $*" >&2; exit 9 ;;
esac
exit 0
"""


class Host:
    """A host with Docker, which knows these containers and volumes, and a clone of the project."""

    def __init__(self, folder: Path) -> None:
        self.state, self.clone = folder / "docker", copy_project(folder / "second clone" / "bouquet")
        (self.state).mkdir()
        (self.state / "docker").write_text(DOCKER)
        (self.state / "docker").chmod(0o755)

    def has(self, containers: list[tuple[str, Path]] | None = None, volumes: tuple[str, ...] = ()) -> None:
        lines = [f"c{number} {project} {folder}\n" for number, (project, folder) in enumerate(containers or [])]
        (self.state / "containers").write_text("".join(lines))
        (self.state / "volumes").write_text("".join(f"{project}_state {project}\n" for project in volumes))

    def project(self, **env: str) -> str:
        env = {"PATH": f"{self.state}:{os.environ['PATH']}", "STATE": str(self.state), **env}
        return sh("scripts/_project", self.clone, check=False, **env).stdout.strip()

    def was_set_up(self) -> None:
        for name, text in (("certs/ca.crt", ""), (".bouquet/engine", "docker\n")):
            (self.clone / name).parent.mkdir(exist_ok=True)
            (self.clone / name).write_text(text)


@pytest.fixture
def host(tmp_path, monkeypatch) -> Host:
    monkeypatch.delenv("COMPOSE_PROJECT_NAME", raising=False)
    return Host(tmp_path)


def test_the_first_clone_on_a_host_is_bouquet_and_stays_it(host):
    host.has()
    assert host.project() == "bouquet"
    host.has([("bouquet", host.clone)], ("bouquet",))
    assert host.project() == "bouquet"
    link = host.state / "link"
    link.symlink_to(host.clone)
    host.has([("bouquet", link)], ("bouquet",))  # it was started by another name of the same folder
    assert host.project() == "bouquet"


def test_a_second_clone_has_a_name_of_its_own_whether_the_first_one_runs_or_not(host, tmp_path):
    (first := tmp_path / "first").mkdir()
    host.has([("bouquet", first)], ("bouquet",))
    name = host.project()
    assert name.startswith("bouquet-") and name == name.lower() and len(name) == len("bouquet-") + 8
    host.has(volumes=("bouquet",))  # after `docker compose down` its volumes are all that is left
    assert host.project() == name
    host.has([("bouquet", first), (name, host.clone)], ("bouquet", name))
    assert host.project() == name


def test_an_older_deployment_keeps_its_volumes_when_it_is_down_or_has_moved(host, tmp_path):
    host.was_set_up()
    host.has(volumes=("bouquet",))
    assert host.project() == "bouquet"
    host.has([("bouquet", tmp_path / "where it was before")], ("bouquet",))
    assert host.project() == "bouquet"


def test_a_name_that_was_chosen_is_kept_unless_another_folder_has_it(host, tmp_path):
    (host.clone / ".env").write_text("COMPOSE_PROJECT_NAME=flowers\n")
    host.has([("bouquet", tmp_path)])
    assert host.project() == "flowers" and host.project(COMPOSE_PROJECT_NAME="mine") == "mine"
    host.has([("flowers", tmp_path)])  # this clone's .env is a copy of that one's
    refused = host.project()
    assert refused.startswith("PROJECT-01  ") and f"are of {tmp_path}\n" in refused
    host.has([("flowers", tmp_path / "gone")])
    assert host.project() == "flowers"


# --- the image of a project
# ----------------------------------------------------------------------------------------------------


def image(host: Host, **env: str) -> str:
    env = {"PATH": f"{host.state}:{os.environ['PATH']}", "STATE": str(host.state), "TORCH": "cpu", "IMAGE": "", **env}
    return sh("bash -c 'set -euo pipefail; . scripts/_lib.sh; image'", host.clone, **env).stdout.strip()


def test_every_clone_has_its_own_image_and_keeps_it(host, tmp_path):
    host.has()
    assert image(host) == "bouquet:cpu"
    (first := tmp_path / "first").mkdir()
    host.has([("bouquet", first)], ("bouquet",))
    assert image(host) == f"{host.project()}:cpu" != "bouquet:cpu"
    (host.clone / ".env").write_text("COMPOSE_PROJECT_NAME=flowers\n")
    assert image(host) == "flowers:cpu" and image(host, TORCH="cuda") == "flowers:cuda"
    assert image(host, IMAGE="registry.example.org/bouquet:1") == "registry.example.org/bouquet:1"


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, "bouquet:cuda"),
        ({"COMPOSE_PROJECT_NAME": "flowers", "TORCH": "cpu"}, "flowers:cpu"),
        ({"IMAGE": "r/b:1", "TORCH": "cpu"}, "r/b:1"),
    ],
)
def test_a_kit_and_compose_name_the_same_image(tmp_path, monkeypatch, env, expected):
    """Compose's own reading of compose.yaml, where it is here; every service has it, and the operator's container hands
    it on.
    """
    for name in ("COMPOSE_PROJECT_NAME", "IMAGE", "TORCH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(kit, "ROOT", tmp_path)
    assert kit.image() == expected
    if not shutil.which("docker"):
        pytest.skip("there is no docker command")
    services = json.loads(
        sh("docker compose -f compose.yaml --profile '*' config --format json --no-path-resolution", ROOT).stdout
    )["services"]
    assert (
        {service["image"] for service in services.values()}
        == {services["operator"]["environment"]["IMAGE"]}
        == {expected}
    )


def test_no_service_asks_a_proxy_for_a_neighbour_or_for_itself():
    """Docker's config.json may give every container a proxy; what a service says of NO_PROXY counts more than that
    file.
    """
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    servers = {"superlink", "gateway", "127.0.0.1", "localhost", "::1"}  # serverapp answers nobody but itself
    for name, service in services.items():
        for variable in ("NO_PROXY", "no_proxy"):
            assert servers <= set(re.split(r"[,}]", service["environment"][variable])), (name, variable)


# --- folders as people name them
# ---------------------------------------------------------------------------------------------------


def test_a_site_finds_folders_whose_names_would_mean_something_else(hub, monkeypatch):
    from flwr.common.config import parse_config_args

    odd = Path("/srv/a \"b\" $HOME ${HOME} \\n `id` 'c' = ü\t!")
    told = []
    monkeypatch.setattr(hub, "_spawn", lambda name, command, env: told.extend(command))
    hub.sites, hub.models, hub.home = {"garden": odd}, odd / "models", odd / "home"
    hub.certs, hub.trusted = odd / "certs", odd / "trusted.yaml"
    hub.start_site("garden")
    for name, value in ({"SITE_LIMITS": "min-photos=4", "SITE_PEERS": "rose=SHA256:a+/b"} | hub.site_env).items():
        monkeypatch.setenv(name, value)
    # as bouquet/flower/supernode.py does
    given = dict(os.path.expandvars(part).split("=", 1) for part in map(str, told) if part.startswith("--"))
    assert (
        given["--root-certificates"] == f"{odd}/certs/ca.crt"
        and given["--auth-supernode-private-key"] == f"{odd}/certs/garden.key"
    )
    assert given["--trusted-entities"] == f"{odd}/trusted.yaml"
    assert parse_config_args([given["--node-config"]]) == {
        "site-name": "garden", "data-path": str(odd), "models-path": f"{odd}/models",
        "cache-path": f"{odd}/home/cache/garden", "limits": "min-photos=4", "peers": "rose=SHA256:a+/b",
        "key-path": f"{odd}/certs/garden.key",
    }  # fmt: skip


def test_an_archives_folder_has_the_same_files_as_the_clone_that_it_was_made_of(tmp_path, monkeypatch):
    """`git archive`, or a host without git: the rules of .gitignore decide, and what set-up made is no file of the
    project.
    """
    copy = copy_project(tmp_path / "bouquet")
    names = {
        str(path.relative_to(copy))
        for path in copy.rglob("*")
        if path.is_file() and ".venv" not in path.relative_to(copy).parts
    }
    for made in (
        ".env",
        "certs/site-1.key",
        "certs/admitted/a.pub",
        ".bouquet/kits/a.tar.gz",
        "models/big/unet/x.safetensors",
        "app/__pycache__/x.pyc",
    ):
        (copy / made).parent.mkdir(parents=True, exist_ok=True)
        (copy / made).write_text("made")
    monkeypatch.setattr(deployment, "ROOT", copy)
    assert set(deployment.files()) == names and "models/mini/model_index.json" in names and "certs/README.md" in names
