"""The deployment as containers: set-up, `up`, a run by hand, `down` and `up` again; each SuperNode's own GPU, key and
data.

Needs a Docker Engine; without one every test here is skipped and says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import copy_project, sh

from bouquet import ROOT
from bouquet.hub.deployment import free_port
from bouquet.hub.following import follow
from bouquet.hub.runs import status
from tests.kit.wait import until

pytestmark = pytest.mark.usefixtures("docker")
SMALL = "rounds=1 local-steps=1 batch-size=4 lora-rank=4 validation-timesteps=1 sample-prompts=''"
SITES = ("supernode-1", "supernode-2")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A fresh copy after `scripts/setup`, as its own Compose project on a free port; removed with its volumes."""
    copy = copy_project(tmp_path_factory.mktemp("compose") / "bouquet")
    (copy / ".env").write_text(
        f"COMPOSE_PROJECT_NAME=bouquet-test-{os.getpid()}\nIMAGE=bouquet:cpu\nHUB_PORT={free_port()}\nCONTROL_PORT={free_port()}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLWR_HOME", str(copy.parent / "flwr"))
        for variable in [name for name in os.environ if name.startswith(("COMPOSE_", "SITE_"))]:
            patch.delenv(variable)
        sh("scripts/bouquet data partition --dataset mini --sites 2 --images-per-site 24", copy)
        sh("chmod -R go= app docker models pyproject.toml scripts", copy)  # as a clone under umask 077 has them
        sh("umask 077; scripts/setup --engine docker", copy)
        yield copy
        sh("docker compose down --volumes --timeout 5", copy)


@pytest.fixture(scope="module")
def up(host: Path) -> Path:
    sh("docker compose up -d --wait", host)
    return host


@pytest.fixture(scope="module")
def run(up: Path) -> str:
    """One small run, started by hand as the README says; its id. Judged by `flwr ls`, not by the exit code."""
    shown = sh(f'.venv/bin/flwr run . remote-deployment --run-config "{SMALL}" --stream', up).stdout
    [run_id] = re.findall(r"Successfully started run (\d+)", shown)
    while not status(run_id)[0].startswith("finished"):  # the stream ends a moment before the run does
        time.sleep(1)
    assert status(run_id)[0] == "finished:completed", (status(run_id), shown[-3000:])
    return run_id


def config(host: Path, **env: str) -> dict:
    return json.loads(sh("docker compose config --format json", host, **env).stdout)


def inside(host: Path, service: str, command: str) -> str:
    return sh(f"docker compose exec -T {service} {command}", host).stdout.strip()


def test_a_run_by_hand_leaves_its_adapter_on_the_shared_volume(up: Path, run: str) -> None:
    assert inside(up, "serverapp", "ls /adapters/latest/final").split() == [
        "adapter_config.json", "adapter_model.safetensors", "fp16", "kohya.safetensors", "provenance.json",
        "pytorch_lora_weights.safetensors",
    ]  # fmt: skip
    assert inside(up, "serverapp", "readlink /adapters/latest") == run
    sh("docker compose cp serverapp:/adapters ./adapters", up)
    assert (up / "adapters/latest/final/provenance.json").is_file()
    assert "bouquet: site-1: round 1" in sh("docker compose logs supernode-1", up).stdout
    assert "register" in sh("docker compose ps -a", up).stdout  # the one-shot service, ended, shows only with -a


def test_down_keeps_adapters_and_a_second_up_continues_with_the_same_certificates_and_sites(up: Path, run: str) -> None:
    certificate = (up / "certs/superlink.crt").read_bytes()
    sh("docker compose down && docker compose up -d --wait", up)
    assert (up / "certs/superlink.crt").read_bytes() == certificate
    assert re.findall(r"register: (\S+ \w+)", sh("docker compose logs --no-log-prefix register", up).stdout) == [
        "site-1 known",
        "site-2 known",
    ]
    assert inside(up, "serverapp", "readlink /adapters/latest") == run
    assert status(run)[0] == "finished:completed"


BACK = (
    "docker compose run --rm --no-deps -T -w /state superlink sh -c"
    " 'mv superlink.db superlink.db.newer && cp superlink.db.before-* superlink.db'"
)


def test_a_hub_goes_back_to_the_database_that_it_had_before_an_upgrade(up: Path, run: str) -> None:
    sh("docker compose stop superlink", up)
    sh("docker compose run --rm --no-deps -T -w /state superlink cp superlink.db superlink.db.before-0", up)
    sh(BACK, up)
    sh("docker compose up -d --wait gateway serverapp", up)
    assert (
        "healthy" in sh("docker compose ps serverapp", up).stdout
        and "superlink" in sh("docker compose logs superlink", up).stdout
    )
    assert status(run)[0] == "finished:completed"
    assert set(inside(up, "superlink", "ls /state").split()) >= {
        "superlink.db",
        "superlink.db.before-0",
        "superlink.db.newer",
    }


def containers(host: Path) -> dict[str, dict]:
    """`docker inspect` of every container of the deployment, by service."""
    found = json.loads(sh("docker inspect $(docker compose ps -aq)", host).stdout)
    return {c["Config"]["Labels"]["com.docker.compose.service"]: c for c in found}


def test_no_container_may_do_more_than_its_work(up: Path) -> None:
    """What Docker enforces, not what the file says: a plain user, only volumes writable, no privileges, bounds."""
    found = containers(up)
    assert found.keys() == {"gateway", "superlink", "register", "serverapp", *SITES}
    for service, container in found.items():
        host = container["HostConfig"]
        assert re.fullmatch(r"[1-9]\d*:\d+", container["Config"]["User"]), service
        assert (
            host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"] and not host["CapAdd"] and not host["Privileged"]
        ), service
        assert host["SecurityOpt"] == ["no-new-privileges:true"], service
        assert (
            0 < host["PidsLimit"] <= 512 and 0 < host["Memory"] <= 16 * 2**30 and host["MemorySwap"] == host["Memory"]
        ), service
        assert service == "register" or container["State"]["Health"]["Status"] == "healthy", service


def test_nobody_in_a_container_is_root_or_has_a_capability(up: Path) -> None:
    for service in ("gateway", "superlink", "serverapp", *SITES):
        status_ = dict(line.split(":", 1) for line in inside(up, service, "cat /proc/1/status").splitlines())
        assert "0" not in status_["Uid"].split() and int(status_["CapEff"], 16) == int(status_["CapBnd"], 16) == 0, (
            service
        )
        assert sh(f"docker compose exec -T {service} touch /opt/bouquet/x", up, check=False).returncode != 0, service


def test_one_port_is_public_and_one_is_the_operators_loopback(up: Path) -> None:
    bindings = {name: c["HostConfig"]["PortBindings"] or {} for name, c in containers(up).items()}
    published = {
        (name, port, b["HostIp"]) for name, ports in bindings.items() for port, to in ports.items() for b in to
    }
    assert published == {("gateway", "8443/tcp", "127.0.0.1"), ("superlink", "8000/tcp", "127.0.0.1")}
    # whatever is public
    assert config(up, HUB_BIND="0.0.0.0")["services"]["superlink"]["ports"][0]["host_ip"] == "127.0.0.1"


def test_a_supernode_reaches_the_gateway_and_neither_the_hub_nor_the_world_nor_another_site(up: Path) -> None:
    address = {
        name: [n["IPAddress"] for n in c["NetworkSettings"]["Networks"].values()] for name, c in containers(up).items()
    }
    targets = {
        "gateway": "gateway:8443",
        "superlink": f"{address['superlink'][0]}:8000",
        "site-2": f"{address['supernode-2'][0]}:9094",
    }
    targets["host"] = (
        f"{json.loads(sh('docker network inspect bridge', up).stdout)[0]['IPAM']['Config'][0]['Gateway']}:22"
    )
    program = "import socket, sys; socket.create_connection(sys.argv[1].split(':'), timeout=3)"
    reached = {
        name for name, to in targets.items()
        if sh(f'docker compose exec -T supernode-1 python -c "{program}" {to}', up, check=False).returncode == 0
    }  # fmt: skip
    assert reached == {"gateway"}


def test_a_supernode_that_hears_nothing_from_the_hub_is_unhealthy(up: Path) -> None:
    look = "python /opt/bouquet/health.py heard:/tmp/heard"
    assert sh(f"docker compose exec -T supernode-1 {look}", up).returncode == 0
    old = sh(
        'docker compose exec -T supernode-1 sh -c \'touch -d "76 seconds ago" /tmp/old;'
        f" {look.replace('heard:/tmp/heard', 'heard:/tmp/old')}'",
        up,
        check=False,
    )
    assert old.returncode == 1 and re.search(r"nothing heard from the hub for (7[6-9]|[89]\d) s", old.stdout), (
        old.stdout
    )


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("python /opt/bouquet/supernode.py --help", "--superlink SUPERLINK"),
        ("python -m app.preflight --help", "bouquet site check"),
        ("python -m app.journal /tmp", "this site has answered no message yet"),
    ],
)  # fmt: skip
def test_a_join_kit_of_the_version_before_finds_the_programs_that_it_names(up: Path, command: str, words: str) -> None:
    begun = "docker compose run --rm --no-deps -T --workdir /opt/bouquet -e BOUQUET_PREFLIGHT= supernode-1"
    assert words in sh(f"{begun} {command}", up).stdout


@pytest.fixture(scope="module")
def tracked(up: Path) -> str:
    """What was said of a run that the operator's container has started, with a tracker."""
    config = SMALL + " tracker='tensorboard'"
    return sh(
        f'docker compose run --rm operator flwr run . remote-deployment --run-config "{config}" --stream', up
    ).stdout


def test_the_operator_needs_no_python_on_the_host(up: Path, run: str, tracked: str) -> None:
    shown = sh("docker compose run --rm operator flwr ls remote-deployment --format json", up).stdout
    assert run in shown and "finished:completed" in shown
    assert "bouquet: finished" in tracked


def operator(up: Path, command: str, options: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
    """A command of the hub's operator on a host without Python; its deed is in the log, or it would be said."""
    done = sh(f"docker compose run --rm -T {options} operator {command}", up, check=check)
    assert "not in the audit log" not in done.stdout, done.stdout
    return done


def test_every_command_that_the_pages_name_for_the_operators_container_works_there_or_is_refused_with_a_code(
    up: Path, run: str, tmp_path: Path
) -> None:
    assert "site-1" in operator(up, "bouquet hub sites").stdout
    assert f"run       {run}  finished" in operator(up, f"bouquet hub status {run}").stdout

    told = operator(up, "bouquet hub invite garden", check=False)
    assert told.returncode == 1 and "JOIN-01" in told.stdout  # this hub has no HUB_HOST yet
    with (up / ".env").open("a") as settings:
        settings.write('HUB_HOST="hub.example.org 192.0.2.7" # DNS\n')
    sh("scripts/certs", up)
    archive = up / ".bouquet/kits/garden.tar.gz"
    inside_ = operator(up, "bouquet hub invite garden").stdout
    outside = sh("scripts/bouquet hub invite garden", up).stdout
    assert inside_.replace("/bouquet/.bouquet", str(up / ".bouquet")) == outside  # the same kit, to the byte
    assert operator(up, "bouquet hub invite garden").stdout == inside_  # also over one that was made outside
    assert hashlib.sha256(archive.read_bytes()).hexdigest() in inside_
    with tarfile.open(archive) as kit:
        assert b"HUB='hub.example.org:" in kit.extractfile("garden/.env").read()

    sh(f"ssh-keygen -q -t ecdsa -b 384 -N '' -f {tmp_path}/key", up)
    assert "admitted" in operator(up, f"bouquet hub admit garden /dev/stdin <{tmp_path}/key.pub").stdout
    assert "revoked" in operator(up, "bouquet hub revoke garden").stdout

    refused = operator(up, "bouquet hub sign", check=False)
    assert refused.returncode == 1 and "TRUST-02" in refused.stdout and "Traceback" not in refused.stdout
    given = '--user "$(id -u)" --cap-add DAC_OVERRIDE -v "$PWD/certs:/bouquet/certs"'
    given += ' -v "$PWD/.bouquet/signatures:/bouquet/.bouquet/signatures"'
    [page] = [
        line for line in (ROOT / "docs/hub.md").read_text().splitlines() if line.endswith("operator bouquet hub sign")
    ]
    assert given in page and given in refused.stdout
    signed = [operator(up, "bouquet hub sign", given).stdout, sh("scripts/bouquet hub sign", up).stdout]
    first = [next(line for line in said.splitlines() if line.startswith("sign: bundle")) for said in signed]
    assert first[0] == first[1]
    deeds = [json.loads(line)["did"] for line in (up / "certs/admitted/audit.jsonl").read_text().splitlines()]
    assert deeds[-4:] == ["admitted", "revoked", "signed", "signed"]

    sh("docker compose run --rm -T operator bouquet report --out - >report.html", up)
    assert (up / "report.html").read_text().rstrip().endswith("</html>")
    sh(
        "docker compose run --rm -T operator bouquet adapter sample --out - --steps 1"
        ' --prompt "a red poppy" >sample.png',
        up,
    )
    assert (up / "sample.png").read_bytes().startswith(b"\x89PNG")
    for unwritable in ("bouquet adapter sample --steps 1 --prompt poppy", "bouquet adapter sample --merge merged"):
        refused = operator(up, unwritable, check=False)
        assert refused.returncode == 1 and "EXPORT-08" in refused.stdout and "Traceback" not in refused.stdout, (
            refused.stdout
        )


def test_a_site_that_is_given_no_gpu_on_a_host_with_some_asks_docker_for_none(host: Path, tmp_path: Path) -> None:
    """scripts/setup writes the overlay; a pin that comes back takes it away again."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA A10 (UUID: GPU-aaaa)'\n")
    smi.chmod(0o755)
    (tmp_path / "env").write_bytes((host / ".env").read_bytes())
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TORCH": "cpu"}
    try:
        for pin, devices in (("none", []), ("0", [["0"]])):
            kept = re.sub(r"(?m)^SITE_[12]_GPU=.*\n", "", (tmp_path / "env").read_text()).replace(
                ":docker/cpu.yaml", ""
            )
            (host / ".env").write_text(f"{kept}SITE_1_GPU=0\nSITE_2_GPU={pin}\n")
            sh("scripts/setup --engine docker && scripts/setup --engine docker", host, **env)
            services = config(host)["services"]
            reserved = [services[site]["deploy"]["resources"]["reservations"].get("devices") or [] for site in SITES]
            assert [[one["device_ids"] for one in found] for found in reserved] == [[["0"]], devices]
            assert (host / ".env").read_text().count("without-gpu.yaml") == (pin == "none")
    finally:
        (host / ".env").write_bytes((tmp_path / "env").read_bytes())


def test_the_operators_status_and_report_come_from_the_shared_volume(up: Path, run: str) -> None:
    for command in ("scripts/bouquet hub status", "docker compose run --rm -T operator bouquet hub status"):
        assert re.search(
            r"^run +\d+  finished\n.*^adapter +\d+/round-0001$", sh(command, up).stdout, re.MULTILINE | re.DOTALL
        )
    assert f"run       {run}  finished" in sh(f"scripts/bouquet hub status {run}", up).stdout
    sh("docker compose run --rm -T operator bouquet report --out - >report.html", up)
    page = (up / "report.html").read_text()
    assert page.lower().startswith("<!doctype html>") and "site-1" in page and page.rstrip().endswith("</html>")


def test_the_dashboard_shows_every_tracked_run_on_this_hosts_loopback_alone(up: Path, run: str, tracked: str) -> None:
    [other] = re.findall(r"started run (\d+)", tracked)
    port = str(free_port())
    try:
        sh("docker compose --profile dashboard up -d --wait dashboard", up, DASHBOARD_PORT=port)
        shown = json.loads(sh(f"curl -sf http://127.0.0.1:{port}/data/runs", up).stdout)
        assert f"{other}/tracker" in shown and f"{run}/tracker" not in shown
        [container] = json.loads(sh("docker inspect $(docker compose --profile dashboard ps -q dashboard)", up).stdout)
        host = container["HostConfig"]
        assert [(b["HostIp"], b["HostPort"]) for ports in host["PortBindings"].values() for b in ports] == [
            ("127.0.0.1", port)
        ]
        assert (
            host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"] and host["SecurityOpt"] == ["no-new-privileges:true"]
        )
        assert [(m["Destination"], m["RW"]) for m in container["Mounts"]] == [("/adapters", False)]
        assert list(container["NetworkSettings"]["Networks"]) == [f"{config(up)['name']}_dashboard"]
    finally:
        sh("docker compose --profile dashboard rm -sf dashboard", up)


def test_the_hubs_page_shows_its_sites_and_runs_on_this_hosts_loopback_alone_and_may_only_read(
    up: Path, run: str
) -> None:
    port = str(free_port())
    try:
        sh("docker compose --profile dashboard up -d --wait page", up, PAGE_PORT=port)
        page = lambda: re.sub(r"<[^>]*>|\s+", " ", sh(f"curl -sf http://127.0.0.1:{port}/", up).stdout)  # noqa: E731
        until(lambda: "2 of 2 sites online" in " ".join(page().split()), page)  # the hub is asked in the background
        shown = " ".join(page().split())
        assert run in shown and "site-1 online" in shown
        assert "Did it work?" in sh(f"curl -sf http://127.0.0.1:{port}/runs/{run}", up).stdout
        [container] = json.loads(sh("docker inspect $(docker compose --profile dashboard ps -q page)", up).stdout)
        host = container["HostConfig"]
        assert [(b["HostIp"], b["HostPort"]) for ports in host["PortBindings"].values() for b in ports] == [
            ("127.0.0.1", port)
        ]
        assert (
            host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"] and host["SecurityOpt"] == ["no-new-privileges:true"]
        )
        assert not [m["Destination"] for m in container["Mounts"] if m["RW"]]
    finally:
        sh("docker compose --profile dashboard rm -sf page", up)


def test_every_service_talks_tls_and_none_may_install_at_run_time(host: Path) -> None:
    commands = {name: " ".join(service["command"]) for name, service in config(host)["services"].items()}
    gateway = (host / "docker/gateway.conf").read_text()
    assert not [
        name
        for name, command in commands.items()
        if "--insecure" in command or ("/ca.crt" not in command and name != "gateway")
    ]
    assert "listen 8443 ssl;" in gateway and "proxy_ssl_verify on;" in gateway and "/ca.crt" in gateway
    for flag in (
        "--enable-supernode-auth",
        "--isolation=process",
        "--disable-runtime-dependency-installation",
        "--database=/state/",
    ):
        assert flag in commands["superlink"]
    assert not [name for name, command in commands.items() if "--allow-runtime" in command]


def test_every_site_holds_its_own_key_and_data_and_nobody_elses(up: Path) -> None:
    for number, service in enumerate(SITES, start=1):
        assert inside(up, service, "ls /run/secrets") == "site.key"
        assert (
            inside(up, service, "sha256sum /run/secrets/site.key").split()[0]
            == (sh(f"sha256sum certs/site-{number}.key", up).stdout.split()[0])
        )
        mounts = {volume["target"]: volume for volume in config(up)["services"][service]["volumes"]}
        assert mounts["/data"]["read_only"] and mounts["/data"]["source"].endswith(f"site-{number}")
        assert not mounts["/data"]["bind"].get("create_host_path")


def test_a_mistyped_data_folder_stops_the_site_instead_of_starting_it_empty(host: Path, tmp_path: Path) -> None:
    missing = str(tmp_path / "mistyped")
    env = {"SITE_1_DATA": missing, "COMPOSE_PROJECT_NAME": f"bouquet-missing-{os.getpid()}"}
    try:
        done = sh("docker compose up -d --no-deps supernode-1", host, check=False, **env)
        assert done.returncode != 0 and missing in done.stdout
        assert not Path(missing).exists()
    finally:
        sh("docker compose down --volumes", host, **env)


def test_every_supernode_gets_exactly_its_own_gpu(host: Path) -> None:
    """Docker's nvidia driver puts a container's reservation into its NVIDIA_VISIBLE_DEVICES."""
    env = {"COMPOSE_FILE": "compose.yaml", "COMPOSE_PROJECT_NAME": f"bouquet-gpu-{os.getpid()}"}
    real = sh("nvidia-smi --query-gpu=uuid --format=csv,noheader", host, check=False)
    uuids = real.stdout.split() if real.returncode == 0 else ["GPU-aaaa", "GPU-bbbb"]
    env |= {"SITE_1_GPU": uuids[0], "SITE_2_GPU": uuids[-1]}
    try:
        done = sh("docker compose up -d --no-deps supernode-1 supernode-2", host, check=False, **env)
        if "could not select device driver" in done.stdout:
            pytest.skip('Docker has no "nvidia" device driver here (no nvidia-container-runtime-hook)')
        assert done.returncode == 0, done.stdout
        first = (
            "docker compose exec -T {} sh -c \"tr '\\0' '\\n' </proc/1/environ | sed -n"
            " 's/^NVIDIA_VISIBLE_DEVICES=//p'\""
        )
        assert [sh(first.format(service), host, **env).stdout.strip() for service in SITES] == [uuids[0], uuids[-1]]
    finally:
        sh("docker compose down --volumes --timeout 2", host, **env)


def test_without_nvidia_the_cpu_overlay_removes_every_reservation(host: Path) -> None:
    with_gpu = config(host, COMPOSE_FILE="compose.yaml")["services"]
    without = config(host, COMPOSE_FILE="compose.yaml:docker/cpu.yaml")["services"]
    for service in SITES:
        [device] = with_gpu[service]["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
        assert not without[service]["deploy"]["resources"]["reservations"].get("devices")


def test_a_third_site_is_one_command_and_trains_with_the_others(up: Path, run: str) -> None:
    """Last, because it adds a site to the shared deployment."""
    before = config(up)["services"]
    sh("cp -r .bouquet/data/site-2 .bouquet/third && scripts/add-site 3 --data ./.bouquet/third --gpu 7", up)
    sh("scripts/add-site 3 --data ./.bouquet/third --gpu 7", up)  # again: nothing more happens
    after = config(up)["services"]
    assert {name: after[name] for name in before} == before and set(after) - set(before) == {"supernode-3"}
    assert after["supernode-3"]["secrets"] == [{"source": "site-3.key", "target": "site.key"}]
    sh("docker compose up -d --wait", up)
    shown = sh(f'.venv/bin/flwr run . remote-deployment --run-config "{SMALL} min-sites=3" --format json', up).stdout
    run_id = json.loads(shown[shown.index("{") :])["run-id"]
    lines: list[str] = []
    assert follow(run_id, lines.append)[0] == "finished:completed", lines
    assert any("sites 3" in line for line in lines)
