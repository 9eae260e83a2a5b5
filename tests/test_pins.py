"""A site sees its own GPU and no other: as a process of the demo, as a kit without Docker, and what is refused before anything starts.

Stand-ins: an executable that shows its environment in place of Python, and an nvidia-smi that lists GPUs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, copy_project, sh

from scripts import _demo
from scripts._deployment import Processes, free_port, pin
from scripts._sign import publisher_key

ONE = ["0", "17", "GPU-aaaa1111-0000-0000-0000-000000000001", "MIG-aaaa1111-0000-0000-0000-000000000001", "MIG-GPU-aaaa1111/7/0", "none"]
NOT_ONE = ["0,1", "0 1", "0;1", "GPU-aaaa1111,GPU-bbbb2222", "nonsense", "-1", "GPU-", "all", "none,0", "0\n1", "$(id)"]


def executable(file: Path, script: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return file


def environment(text: str) -> dict[str, str]:
    """What `env` prints."""
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


# --- processes -----------------------------------------------------------------------------------------------------


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The environment in which Processes starts a site, given its pins."""
    monkeypatch.setattr("scripts._deployment.sys.executable", str(executable(tmp_path / "python", "env")))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")

    def start(name: str, **gpus: str) -> dict[str, str]:
        sites = {"site-1": tmp_path, "site-2": tmp_path}
        running = Processes(tmp_path, tmp_path, free_port(), sites, gpus={site.replace("_", "-"): gpu for site, gpu in gpus.items()})
        for folder in ("state", "logs"):
            (tmp_path / folder).mkdir(exist_ok=True)
        running.start_site(name)
        running.running[name].wait()
        return environment((tmp_path / f"logs/{name}.log").read_text())

    return start


def test_each_process_of_a_site_sees_the_gpu_that_is_pinned_to_it_under_the_number_that_nvidia_smi_shows(started) -> None:
    for site, gpu in (("site-1", "0"), ("site-2", "GPU-bbbb2222")):
        env = started(site, site_1="0", site_2="GPU-bbbb2222")
        assert (env["CUDA_VISIBLE_DEVICES"], env["CUDA_DEVICE_ORDER"], env["SITE_GPU"]) == (gpu, "PCI_BUS_ID", gpu)


def test_a_site_pinned_to_none_sees_no_gpu_and_one_without_a_pin_what_its_starter_sees(started) -> None:
    env = started("site-1", site_1="none")
    assert (env["CUDA_VISIBLE_DEVICES"], env["SITE_GPU"]) == ("", "none")
    env = started("site-2", site_1="none")
    assert env["CUDA_VISIBLE_DEVICES"] == "5" and "SITE_GPU" not in env


def test_the_hubs_own_processes_get_no_pin(tmp_path: Path) -> None:
    running = Processes(tmp_path, tmp_path, free_port(), {"site-1": tmp_path}, gpus={"site-1": "0"})
    assert running.env.keys().isdisjoint(pin("0").keys() - os.environ.keys())


def test_the_demo_pins_what_env_says_for_each_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["HUB_PORT=8443", "SITE_1_DATA=./one", "SITE_2_DATA=./two", "SITE_3_DATA=./three", "SITE_1_GPU=1", "SITE_2_GPU='GPU-bbbb2222'", "SITE_3_GPU="]
    (tmp_path / ".env").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(_demo, "ROOT", tmp_path)
    running = _demo.engine("process")
    assert running.sites == {f"site-{n}": tmp_path / name for n, name in ((1, "one"), (2, "two"), (3, "three"))}
    assert {site: env["CUDA_VISIBLE_DEVICES"] for site, env in running.pins.items()} == {"site-1": "1", "site-2": "GPU-bbbb2222"}


# --- scripts/setup and scripts/add-site ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project whose packages count as installed, whatever constraints.txt says by now."""
    copy = copy_project(tmp_path_factory.mktemp("setup") / "bouquet")
    (copy / ".venv").unlink()
    (copy / ".venv").mkdir()
    for part in ("bin", "lib", "pyvenv.cfg"):
        (copy / ".venv" / part).symlink_to(ROOT / ".venv" / part)
    sh("{ cat constraints.txt pyproject.toml docker/install; echo cpu; } | cksum >.venv/installed", copy)
    return copy


def set_up(copy: Path, gpus: int, **env: str) -> subprocess.CompletedProcess[str]:
    """`scripts/setup` as processes on a host with so many GPUs."""
    smi = executable(copy.parent / "bin/nvidia-smi", "\n".join(f"echo 'GPU {n}: NVIDIA A10 (UUID: GPU-{n})'" for n in range(gpus)) or "exit 9")
    port = {"TORCH": "cpu", "HUB_PORT": str(free_port()), "FLWR_HOME": str(copy.parent / "flwr"), "PATH": f"{smi.parent}:{os.environ['PATH']}"}
    return sh("scripts/setup --engine process", copy, check=False, **port, **env)


@pytest.mark.parametrize(("gpus", "expected"), [(2, ["SITE_1_GPU=0", "SITE_2_GPU=1"]), (1, ["SITE_1_GPU=0", "SITE_2_GPU=0"]), (0, [])])
def test_setup_pins_the_two_sites_where_there_are_gpus_as_processes_too(copy: Path, gpus: int, expected: list[str]) -> None:
    (copy / ".env").write_text("SITE_1_DATA=./own\n")  # so that nothing is drawn
    done = set_up(copy, gpus)
    assert done.returncode == 0, done.stdout
    assert [line for line in (copy / ".env").read_text().splitlines() if "_GPU=" in line] == expected


def test_setup_leaves_a_persons_pin_as_it_is(copy: Path) -> None:
    (copy / ".env").write_text("SITE_1_DATA=./own\nSITE_2_GPU='GPU-1'\n")
    assert set_up(copy, 2).returncode == 0
    assert {line for line in (copy / ".env").read_text().splitlines() if "_GPU=" in line} == {"SITE_1_GPU=0", "SITE_2_GPU='GPU-1'"}


def test_setup_without_the_publishers_key_goes_on_and_says_that_the_signature_is_to_come(copy: Path) -> None:
    (copy / ".env").write_text("SITE_1_DATA=./own\n")
    publisher_key(copy / "certs/publisher.key")
    (copy / "certs/publisher.key").rename(copy / "publisher.key")
    sh("rm -rf .bouquet/signatures", copy)
    done = set_up(copy, 2)
    (copy / "publisher.key").rename(copy / "certs/publisher.key")
    assert done.returncode == 0 and "setup: ready (process)" in done.stdout, done.stdout
    assert "TRUST-02" in done.stdout and "setup: going on; no site runs the app until its signature is here" in done.stdout


@pytest.mark.parametrize(("line", "env"), [("SITE_2_GPU=0,1", {}), ("SITE_3_GPU='0,1'", {}), ("SITE_1_GPU=nonsense", {}), ("", {"SITE_1_GPU": "0,1"})])
def test_setup_refuses_a_site_of_several_gpus_before_it_makes_anything(copy: Path, line: str, env: dict[str, str]) -> None:
    (copy / ".env").write_text(f"{line}\n")
    refused = set_up(copy, 2, **env)
    assert refused.returncode == 1 and refused.stdout.startswith("GPU-06  A site trains on one GPU.\n"), refused.stdout
    shown = line or "SITE_1_GPU=0,1"
    assert f"found  {shown}\n" in refused.stdout and "scripts/add-site" in refused.stdout and "troubleshooting.md#gpu-06" in refused.stdout
    assert (copy / ".env").read_text() == f"{line}\n"


@pytest.mark.parametrize("gpu", NOT_ONE)
def test_add_site_refuses_what_is_not_one_gpu_before_it_makes_anything(copy: Path, tmp_path: Path, gpu: str) -> None:
    done = subprocess.run(["scripts/add-site", "3", "--data", str(tmp_path), "--gpu", gpu], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("GPU-06  A site trains on one GPU.\n"), done.stderr
    assert not (copy / ".bouquet/supernode-3.json.new").exists() and not (copy / "certs/site-3.key").exists()


@pytest.mark.skipif(not shutil.which("docker"), reason="no docker command, which merges the Compose files")
def test_add_site_pins_the_new_site_or_gives_it_no_gpu_and_does_what_it_was_told_last(copy: Path, tmp_path: Path) -> None:
    (copy / ".env").write_text("COMPOSE_FILE=compose.yaml\n")
    for gpu, device in (("none", None), ("GPU-1", "${SITE_3_GPU:-1}"), ("none", None)):
        sh(f"mkdir -p .bouquet && scripts/add-site 3 --data {tmp_path} --gpu {gpu}", copy)
        service = json.loads((copy / ".bouquet/supernode-3.json").read_text())["services"]["supernode-3"]
        assert service["environment"]["SITE_GPU"] == (device or "none")
        devices = service.get("deploy", {"resources": {"reservations": {"devices": []}}})["resources"]["reservations"]["devices"]
        assert [one["device_ids"] for one in devices] == ([[device]] if device else [])
        assert [line for line in (copy / ".env").read_text().splitlines() if "_GPU=" in line] == [f"SITE_3_GPU={gpu}"]


# --- the kit without Docker ----------------------------------------------------------------------------------------


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """An unpacked kit, photos beside it, and in place of Bouquet's Python something that makes a key and shows its environment."""
    kit = Path(shutil.copytree(ROOT / "docker/kit", tmp_path / "garden"))
    shutil.copy(ROOT / "scripts/site", kit)
    (kit / ".env").write_text("SITE_NAME='garden'\nHUB='hub.example.org:8443'\nIMAGE='bouquet:cuda'\n")
    (tmp_path / "photos").mkdir()
    executable(tmp_path / "bouquet/.venv/bin/python", 'case $1 in key.py) echo made >site.key; echo SHA256:x ;; *) echo "$@"; env ;; esac')
    return kit


def site(kit: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "BOUQUET": str(kit.parent / "bouquet")}
    return subprocess.run(["./site", *arguments], cwd=kit, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("gpu", ONE)
def test_a_kits_process_sees_the_gpu_of_its_settings_alone(kit: Path, gpu: str) -> None:
    assert site(kit, "init", "--data", "../photos", "--gpu", gpu).returncode == 0
    with (kit / ".env").open("a") as settings:
        settings.write("SITE_CHECKPOINTING=1\nSITE_KEEP=0\nSITE_TRUST_DAYS=90\n")
    for command, program in (("start", "docker/supernode.py"), ("check", "-m app.preflight")):
        shown = site(kit, command)
        assert shown.returncode == 0 and program in shown.stdout, shown
        env = environment(shown.stdout)
        assert (env["SITE_GPU"], env["CUDA_DEVICE_ORDER"]) == (gpu, "PCI_BUS_ID")
        assert env["CUDA_VISIBLE_DEVICES"] == ("" if gpu == "none" else gpu)
        assert (env["SITE_CHECKPOINTING"], env["SITE_KEEP"], env["SITE_TRUST_DAYS"]) == ("1", "0", "90")


@pytest.mark.parametrize("gpu", NOT_ONE)
def test_a_kit_refuses_what_is_not_one_gpu_before_it_makes_a_key(kit: Path, gpu: str) -> None:
    before = (kit / ".env").read_text()
    refused = site(kit, "init", "--data", "../photos", "--gpu", gpu)
    assert refused.returncode == 1 and "JOIN-13  A site trains on one GPU.\n" in refused.stderr, refused
    assert f"found  GPU {gpu}\n" in refused.stderr and "second site" in refused.stderr
    assert not (kit / "site.key").exists() and (kit / ".env").read_text() == before


@pytest.mark.parametrize("command", ["check", "start"])
@pytest.mark.parametrize("line", ["SITE_GPU='0,1'", "SITE_GPU=nonsense", "SITE_GPU="])
def test_a_pin_that_was_edited_into_the_settings_is_refused_when_the_site_is_checked_or_started(kit: Path, command: str, line: str) -> None:
    site(kit, "init", "--data", "../photos", "--gpu", "0")
    with (kit / ".env").open("a") as settings:
        settings.write(f"{line}\n")
    refused = site(kit, command)
    assert refused.returncode == 1 and refused.stderr.startswith("JOIN-13  A site trains on one GPU.\n"), refused


# --- Compose -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["compose.yaml", "docker/kit/compose.yaml"])
def test_every_site_of_a_compose_file_is_told_its_switches(file: str) -> None:
    text = (ROOT / file).read_text()
    sites = text.count("SITE_LIMITS: ${")
    assert text.count("SITE_CHECKPOINTING: ${SITE_") == text.count("SITE_TRUST_DAYS: ${SITE_") == sites >= 1
    assert text.count("SITE_KEEP: ${SITE_KEEP:-}") == 1
