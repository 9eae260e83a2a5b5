"""A site sees its own GPU and no other: as a process of the demo, as a kit without Docker, and what is refused before
anything starts.

Stand-ins: an executable that shows its environment in place of Python, and an nvidia-smi that lists GPUs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import copy_project, sh
from flwr.common.config import parse_config_args

from bouquet import ROOT, demo, dotenv
from bouquet.hub.deployment import Processes, free_port, pin
from bouquet.hub.sign import publisher_key

ONE = [
    "0",
    "17",
    "GPU-aaaa1111-0000-0000-0000-000000000001",
    "MIG-aaaa1111-0000-0000-0000-000000000001",
    "MIG-GPU-aaaa1111/7/0",
    "none",
]
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
    monkeypatch.setattr("bouquet.hub.deployment.sys.executable", str(executable(tmp_path / "python", "env")))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")

    def start(name: str, **gpus: str) -> dict[str, str]:
        sites = {"site-1": tmp_path, "site-2": tmp_path}
        running = Processes(
            tmp_path, tmp_path, free_port(), sites, gpus={site.replace("_", "-"): gpu for site, gpu in gpus.items()}
        )
        for folder in ("state", "logs"):
            (tmp_path / folder).mkdir(exist_ok=True)
        running.start_site(name)
        running.running[name].wait()
        return environment((tmp_path / f"logs/{name}.log").read_text())

    return start


def test_each_process_of_a_site_sees_the_gpu_that_is_pinned_to_it_under_the_number_that_nvidia_smi_shows(
    started,
) -> None:
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
    lines = [
        "HUB_PORT=8443",
        "SITE_1_DATA=./one",
        "SITE_2_DATA=./two",
        "SITE_3_DATA=./three",
        "SITE_1_GPU=1",
        "SITE_2_GPU='GPU-bbbb2222'",
        "SITE_3_GPU=",
    ]
    (tmp_path / ".env").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    running = demo.engine("process")
    assert running.sites == {f"site-{n}": tmp_path / name for n, name in ((1, "one"), (2, "two"), (3, "three"))}
    assert {site: env["CUDA_VISIBLE_DEVICES"] for site, env in running.pins.items()} == {
        "site-1": "1",
        "site-2": "GPU-bbbb2222",
    }


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
    smi = executable(
        copy.parent / "bin/nvidia-smi",
        "\n".join(f"echo 'GPU {n}: NVIDIA A10 (UUID: GPU-{n})'" for n in range(gpus)) or "exit 9",
    )
    port = {
        "TORCH": "cpu",
        "HUB_PORT": str(free_port()),
        "FLWR_HOME": str(copy.parent / "flwr"),
        "PATH": f"{smi.parent}:{os.environ['PATH']}",
    }
    return sh("scripts/setup --engine process", copy, check=False, **port, **env)


@pytest.mark.parametrize(
    ("gpus", "expected"), [(2, ["SITE_1_GPU=0", "SITE_2_GPU=1"]), (1, ["SITE_1_GPU=0", "SITE_2_GPU=0"]), (0, [])]
)
def test_setup_pins_the_two_sites_where_there_are_gpus_as_processes_too(
    copy: Path, gpus: int, expected: list[str]
) -> None:
    (copy / ".env").write_text("SITE_1_DATA=./own\n")  # so that nothing is drawn
    done = set_up(copy, gpus)
    assert done.returncode == 0, done.stdout
    assert [line for line in (copy / ".env").read_text().splitlines() if "_GPU=" in line] == expected


def test_setup_leaves_a_persons_pin_as_it_is(copy: Path) -> None:
    (copy / ".env").write_text("SITE_1_DATA=./own\nSITE_2_GPU='GPU-1'\n")
    assert set_up(copy, 2).returncode == 0
    assert {line for line in (copy / ".env").read_text().splitlines() if "_GPU=" in line} == {
        "SITE_1_GPU=0",
        "SITE_2_GPU='GPU-1'",
    }


def test_setup_without_the_publishers_key_goes_on_and_says_that_the_signature_is_to_come(copy: Path) -> None:
    (copy / ".env").write_text("SITE_1_DATA=./own\n")
    publisher_key(copy / "certs/publisher.key")
    (copy / "certs/publisher.key").rename(copy / "publisher.key")
    sh("rm -rf .bouquet/signatures", copy)
    done = set_up(copy, 2)
    (copy / "publisher.key").rename(copy / "certs/publisher.key")
    assert done.returncode == 0 and "setup: ready (process)" in done.stdout, done.stdout
    assert (
        "TRUST-02" in done.stdout and "setup: going on; no site runs the app until its signature is here" in done.stdout
    )


@pytest.mark.parametrize(
    ("line", "env"),
    [("SITE_2_GPU=0,1", {}), ("SITE_3_GPU='0,1'", {}), ("SITE_1_GPU=nonsense", {}), ("", {"SITE_1_GPU": "0,1"})],
)
def test_setup_refuses_a_site_of_several_gpus_before_it_makes_anything(
    copy: Path, line: str, env: dict[str, str]
) -> None:
    (copy / ".env").write_text(f"{line}\n")
    refused = set_up(copy, 2, **env)
    assert refused.returncode == 1 and refused.stdout.startswith("GPU-06  A site trains on one GPU.\n"), refused.stdout
    shown = line.replace("'", "") or "SITE_1_GPU=0,1"
    assert (
        f"found  {shown}\n" in refused.stdout
        and "scripts/add-site" in refused.stdout
        and "troubleshooting.md#gpu-06" in refused.stdout
    )
    assert (copy / ".env").read_text() == f"{line}\n"


@pytest.mark.parametrize("gpu", NOT_ONE)
def test_add_site_refuses_what_is_not_one_gpu_before_it_makes_anything(copy: Path, tmp_path: Path, gpu: str) -> None:
    done = subprocess.run(
        ["scripts/add-site", "3", "--data", str(tmp_path), "--gpu", gpu], cwd=copy, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.startswith("GPU-06  A site trains on one GPU.\n"), done.stderr
    assert not (copy / ".bouquet/supernode-3.json.new").exists() and not (copy / "certs/site-3.key").exists()


@pytest.mark.skipif(not shutil.which("docker"), reason="no docker command, which merges the Compose files")
def test_add_site_pins_the_new_site_or_gives_it_no_gpu_and_does_what_it_was_told_last(
    copy: Path, tmp_path: Path
) -> None:
    (copy / ".env").write_text("COMPOSE_FILE=compose.yaml\n")
    for gpu, device in (("none", None), ("GPU-1", "${SITE_3_GPU:-1}"), ("none", None)):
        sh(f"mkdir -p .bouquet && scripts/add-site 3 --data {tmp_path} --gpu {gpu}", copy)
        service = json.loads((copy / ".bouquet/supernode-3.json").read_text())["services"]["supernode-3"]
        assert service["environment"]["SITE_GPU"] == (device or "none")
        devices = service.get("deploy", {"resources": {"reservations": {"devices": []}}})["resources"]["reservations"][
            "devices"
        ]
        assert [one["device_ids"] for one in devices] == ([[device]] if device else [])
        assert [line for line in (copy / ".env").read_text().splitlines() if "_GPU=" in line] == [f"SITE_3_GPU={gpu}"]


# --- the kit without Docker ----------------------------------------------------------------------------------------


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """An unpacked kit, photos beside it, and in place of Bouquet's Python something that makes a key and shows its
    environment.
    """
    kit = Path(shutil.copytree(ROOT / "docker/kit", tmp_path / "garden"))
    shutil.copy(ROOT / "scripts/site", kit)
    shutil.copy(ROOT / "scripts/_env.awk", kit / "env.awk")
    executable(tmp_path / "bin/nvidia-smi", "exit 9")
    (kit / ".env").write_text("SITE_NAME='garden'\nHUB='hub.example.org:8443'\nIMAGE='bouquet:cuda'\n")
    (tmp_path / "photos").mkdir()
    executable(
        tmp_path / "bouquet/.venv/bin/python",
        'case $1 in key.py) echo made >site.key; echo SHA256:x ;; *) echo "$@"; env ;; esac',
    )
    return kit


def site(kit: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": f"{kit.parent}/bin:{os.environ['PATH']}", "BOUQUET": str(kit.parent / "bouquet")} | more
    return subprocess.run(
        ["./site", *arguments], cwd=kit, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


@pytest.mark.parametrize("gpu", ONE)
def test_a_kits_process_sees_the_gpu_of_its_settings_alone(kit: Path, gpu: str) -> None:
    assert site(kit, "init", "--data", "../photos", "--gpu", gpu).returncode == 0
    with (kit / ".env").open("a") as settings:
        settings.write("SITE_CHECKPOINTING=1\nSITE_KEEP=0\nSITE_TRUST_DAYS=90\n")
    for command, program in (("start", "-m bouquet.flower.supernode"), ("check", "-m bouquet site check")):
        shown = site(kit, command)
        assert shown.returncode == 0 and program in shown.stdout, shown
        env = environment(shown.stdout)
        assert (env["SITE_GPU"], env["CUDA_DEVICE_ORDER"]) == (gpu, "PCI_BUS_ID")
        assert env["CUDA_VISIBLE_DEVICES"] == ("" if gpu == "none" else gpu)
        assert (env["SITE_CHECKPOINTING"], env["SITE_KEEP"], env["SITE_TRUST_DAYS"]) == ("1", "0", "90")


@pytest.mark.parametrize(
    ("words", "program"),
    [
        (("runs",), "site runs"),
        (("privacy", "--run-config", "rounds=8"), "site privacy --run-config rounds=8"),
        (("approve", "7"), "site approve 7"),
        (("decline", "7"), "site decline 7"),
        (("audit", "--json"), "audit --json"),
    ],
)
def test_a_kit_passes_the_operators_decisions_on_with_its_own_cache(
    kit: Path, words: tuple[str, ...], program: str
) -> None:
    assert site(kit, *words).stderr.startswith("JOIN-11  The kit is not set up.")
    assert site(kit, "init", "--data", "../photos", "--gpu", "none").returncode == 0
    shown = site(kit, *words)
    assert shown.returncode == 0 and shown.stdout.startswith(f"-m bouquet {program}\n"), shown
    assert environment(shown.stdout)["BOUQUET_CACHE"] == str(kit / "cache")
    assert f"./site {words[0]}" in site(kit).stdout or f"| {words[0]} RUN" in site(kit).stdout


@pytest.mark.parametrize("gpu", NOT_ONE)
def test_a_kit_refuses_what_is_not_one_gpu_before_it_makes_a_key(kit: Path, gpu: str) -> None:
    before = (kit / ".env").read_text()
    refused = site(kit, "init", "--data", "../photos", "--gpu", gpu)
    assert refused.returncode == 1 and "JOIN-13  A site trains on one GPU.\n" in refused.stderr, refused
    assert f"found  GPU {gpu}\n" in refused.stderr and "second site" in refused.stderr
    assert not (kit / "site.key").exists() and (kit / ".env").read_text() == before


@pytest.mark.parametrize("command", ["check", "start"])
@pytest.mark.parametrize("line", ["SITE_GPU='0,1'", "SITE_GPU=nonsense", "SITE_GPU="])
def test_a_pin_that_was_edited_into_the_settings_is_refused_when_the_site_is_checked_or_started(
    kit: Path, command: str, line: str
) -> None:
    site(kit, "init", "--data", "../photos", "--gpu", "0")
    with (kit / ".env").open("a") as settings:
        settings.write(f"{line}\n")
    refused = site(kit, command)
    assert refused.returncode == 1 and refused.stderr.startswith("JOIN-13  A site trains on one GPU.\n"), refused


@pytest.mark.parametrize("form", ["--data {} --gpu 0", "--data={} --gpu=0"])
@pytest.mark.parametrize("named", ["../photos", "~/photos", "~"])
def test_a_kits_options_are_taken_in_both_forms_and_the_home_by_its_sign(kit: Path, form: str, named: str) -> None:
    done = site(kit, "init", *form.format(named).split(), HOME=str(kit.parent))
    assert done.returncode == 0, done.stderr
    assert (
        dotenv.read(kit)["SITE_DATA"] == str(kit.parent / named.strip("./~"))
        and f"{kit}/garden.pub   send it" in done.stdout
    )


@pytest.mark.parametrize("arguments", [["--data"], ["--dta", "../photos"], ["../photos"], ["--gpu=0", "--data"]])
def test_a_kits_unknown_options_show_how_it_is_called_and_change_nothing(kit: Path, arguments: list[str]) -> None:
    before = (kit / ".env").read_bytes()
    done = site(kit, "init", *arguments)
    assert done.returncode == 2 and "./site init [--data DIR]" in done.stdout and (kit / ".env").read_bytes() == before


def test_a_gpu_that_nvidia_smi_does_not_list_is_refused_with_those_it_does(kit: Path) -> None:
    lines = [
        "GPU 0: NVIDIA A10 (UUID: GPU-aaaa1111)",
        "GPU 1: NVIDIA A10 (UUID: GPU-bbbb2222)",
        "  MIG 1g.10gb Device 0: (UUID: MIG-cccc3333)",
    ]
    executable(kit.parent / "bin/nvidia-smi", "\n".join(f"echo '{line}'" for line in lines))
    for gpu in ("0", "1", "GPU-bbbb2222", "MIG-cccc3333", "none"):
        assert site(kit, "init", "--data", "../photos", "--gpu", gpu).returncode == 0
    for gpu in ("2", "17", "GPU-dddd4444", "MIG-aaaa1111"):
        refused = site(kit, "init", "--data", "../photos", "--gpu", gpu)
        assert refused.returncode == 1 and refused.stderr.splitlines()[-4] == "JOIN-13  A site trains on one GPU.", (
            refused
        )
        assert (
            f"found  GPU {gpu}, where nvidia-smi -L has: GPU 0: NVIDIA A10 (UUID: GPU-aaaa1111) GPU 1" in refused.stderr
        )


ODD = [
    "my photos",
    "cost $5",
    "a#b",
    "back`tick",
    "l'eau",
    'quo"te',
    "Ünï — 花",
    "new\nline",
    "tail ",
    " lead",
    "a\\b",
    "$(id)",
    "x${HOME}y",
    "-dash",
    "~user",
    "a,b:c",
]


@pytest.mark.parametrize("name", ODD)
def test_a_folder_of_any_name_reaches_the_supernode_as_it_is(kit: Path, name: str) -> None:
    """Through .env, and through --node-config with the environment's variables in it, which bouquet/flower/supernode.py
    puts in, to Flower's parser.
    """
    photos = kit.parent / "photos" / name
    photos.mkdir()
    done = site(kit, "init", "--data", f"../photos/{name}", "--gpu", "none")
    assert done.returncode == 0, done.stderr
    assert dotenv.read(kit)["SITE_DATA"] == str(photos)
    executable(kit.parent / "bouquet/.venv/bin/python", 'for argument; do printf "%s\\0" "$argument"; done')
    arguments = site(kit, "start").stdout.split("\0")
    [config] = [
        argument.removeprefix("--node-config=") for argument in arguments if argument.startswith("--node-config=")
    ]
    assert parse_config_args([os.path.expandvars(config)])["data-path"] == str(photos)


DOCKER = """case "$1 $2" in
  'compose up') echo 'container garden-supernode-1 is unhealthy' >&2; exit 1 ;;
  'compose logs') cat ../log ;;
esac"""
LOG = """\
pass  name      garden
fail  hub       CHECK-01  The hub cannot be reached.
                an earlier start
pass  name      garden
warn  gpu       SITE_GPU is not set
fail  key       CHECK-06  The hub has not admitted this site's key.
                hub.example.org:8443 does not know SHA256:x, or has revoked it
      fix       send garden.pub to the hub's operator
not ready: 4 pass, 1 warn, 1 fail
"""


def with_docker(kit: Path, command: str) -> subprocess.CompletedProcess[str]:
    executable(kit.parent / "bin/docker", DOCKER)
    settings = "SITE_DATA=/photos\nSITE_GPU=none\n"
    (kit / ".env").write_text((kit / ".env").read_text() + settings)
    (kit / "site.key").write_text("made")
    env = {"PATH": f"{kit.parent}/bin:{os.environ['PATH']}"}
    return subprocess.run(
        ["./site", command], cwd=kit, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


def test_a_site_that_does_not_come_up_says_which_check_failed_last(kit: Path) -> None:
    (kit.parent / "log").write_text(LOG)
    told = with_docker(kit, "start")
    shown = told.stderr[told.stderr.index("JOIN-15") :]
    assert told.returncode == 1 and shown.startswith(
        "JOIN-15  The site has not come up.\n  found  fail  key       CHECK-06  The hub has not admitted"
    )
    assert "send garden.pub to the hub's operator" in shown and "CHECK-01" not in shown and "not ready" not in shown


@pytest.mark.parametrize(
    ("log", "found"),
    [
        ("TRUST-05  The site pins no publisher.\n  found  x is empty\nnoise\n", "TRUST-05"),
        ("Killed\n", "Killed"),
        ("", "docker compose logs supernode"),
    ],
)
def test_without_a_preflights_line_the_named_error_or_the_last_word_is_shown(kit: Path, log: str, found: str) -> None:
    (kit.parent / "log").write_text(log)
    told = with_docker(kit, "start").stderr
    assert f"  found  {found}" in told or found in told.split("found  ")[1].split("\n")[0]
    assert "noise" not in told


def test_a_kits_settings_that_nobody_can_read_are_named(kit: Path) -> None:
    (kit / ".env").write_text((kit / ".env").read_text() + "SITE DATA=/photos\n")
    told = site(kit, "check")
    assert told.returncode == 1 and told.stderr.startswith(
        "JOIN-16  The kit's settings cannot be read.\n  found  .env, line 4: a name has no space in it\n"
    )


def test_a_kits_settings_are_compose_ones(kit: Path) -> None:
    site(kit, "init", "--data", "../photos", "--gpu", "0")
    with (kit / ".env").open("a", newline="") as settings:
        settings.write(
            'export SITE_KEEP = 7 # seconds\r\nSITE_LIMITS="max-local-steps=200 $NOBODY"\r\nSITE_TRUST_DAYS=`id`\r\n'
        )
    env = environment(site(kit, "start").stdout)
    assert (env["SITE_KEEP"], env["SITE_LIMITS"], env["SITE_TRUST_DAYS"]) == ("7", "max-local-steps=200 ", "`id`")


# --- Compose -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["compose.yaml", "docker/kit/compose.yaml"])
def test_every_site_of_a_compose_file_is_told_its_switches(file: str) -> None:
    text = (ROOT / file).read_text()
    sites = text.count("SITE_LIMITS: ${")
    assert text.count("SITE_CHECKPOINTING: ${SITE_") == text.count("SITE_TRUST_DAYS: ${SITE_") == sites >= 1
    assert text.count("SITE_CONSENT: ${SITE_") == text.count("SITE_PRIVACY: ${SITE_") == sites
    assert text.count("SITE_KEEP: ${SITE_KEEP:-}") == 1
