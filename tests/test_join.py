"""Joining as its two operators do it: a kit from the hub, a key made at the site, admission, revocation, a new key.

The hub and the sites are processes on loopback, with TLS and node authentication. The containers are
test_join_compose.py's.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from conftest import copy_project, sh
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from app import model
from bouquet import ROOT
from bouquet.hub.deployment import Processes, end_group, free_port
from bouquet.hub.following import follow
from bouquet.hub.roster import registered
from bouquet.hub.runs import connect
from tests.kit.wait import PATIENT, until

SMALL = "rounds=1 local-steps=1 batch-size=4 lora-rank=4 validation-timesteps=1 sample-prompts='' min-sites=1"
KIT = {".env", "README.md", "ca.crt", "compose.yaml", "cpu.yaml", "env.awk", "key.py", "models", "site", "trusted.yaml"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """A hub without sites, run from its own copy of the project; FLWR_HOME is the test's own."""
    home = tmp_path_factory.mktemp("hub")
    copy, port = copy_project(home / "bouquet"), free_port()
    (copy / ".env").write_text(f"HUB_HOST=127.0.0.1\nHUB_PORT={port}\n")
    sh("scripts/certs", copy)
    running = Processes(copy / ".bouquet", copy / "certs", port, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLWR_HOME", str(home / "operator"))
        for variable in ("BOUQUET_ADAPTERS", "BOUQUET_MODELS", "HUB_HOST", "HUB_PORT", "IMAGE", "TORCH"):
            patch.delenv(variable, raising=False)
        connect(running.address, copy / "certs/ca.crt")
        try:
            running.start_hub()
            yield running
        finally:
            running.stop()


@pytest.fixture(scope="module")
def root(hub: Processes) -> Path:
    """The hub operator's folder."""
    return hub.certs.parent


@dataclass
class SiteHost:
    """A site's own machine: a folder with its kit and its photos, and Bouquet's environment instead of Docker."""

    kit: Path
    root: Path
    process: subprocess.Popen | None = None

    def init(self) -> str:
        """`./site init`; the fingerprint it reads out."""
        command = f"BOUQUET={self.root} ./site init --data ../photos --gpu none"
        return re.search(r"phone\s+(SHA256:\S+)", sh(command, self.kit).stdout)[1]

    def start(self) -> None:
        with (self.kit / "log").open("w") as log:
            self.process = subprocess.Popen(
                ["./site", "start"], cwd=self.kit, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                start_new_session=True, env={"PATH": "/usr/bin:/bin", "SITE_PORT": str(free_port())},
            )  # fmt: skip

    def stop(self) -> None:
        """`./site stop`; nothing of the site is left then."""
        sh("./site stop", self.kit)
        self.process.wait(PATIENT)
        end_group(self.process.pid)


def invited(root: Path, name: str, to: Path) -> SiteHost:
    """`bouquet hub invite`, and the kit unpacked on the site's machine."""
    sh(f"scripts/bouquet hub invite {name}", root)
    to.mkdir(parents=True, exist_ok=True)
    sh(
        f"scripts/bouquet data partition --dataset mini --sites 1 --images-per-site 24 --out {to}/drawn"
        f" && mv {to}/drawn/site-1 {to}/photos",
        root,
    )
    sh(f"tar -xzf {root}/.bouquet/kits/{name}.tar.gz", to)
    return SiteHost(to / name, root)


@pytest.fixture(scope="module")
def garden(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SiteHost]:
    """A site that has joined and is online."""
    site = invited(root, "garden", tmp_path_factory.mktemp("garden"))
    fingerprint = site.init()
    sh(f"scripts/bouquet hub admit garden {site.kit}/garden.pub --fingerprint {fingerprint}", root)
    site.start()
    try:
        wait_for(root, site, "online")
        yield site
    finally:
        site.stop()


def sites(root: Path) -> dict[str, dict]:
    shown = sh("scripts/bouquet hub sites --json", root).stdout
    return {site["name"]: site for site in json.loads(shown)["sites"]}


def wait_for(root: Path, site: SiteHost, state: str) -> None:
    """Until the hub says so of a site, whose process must go on meanwhile."""
    now = lambda: sites(root).get(site.kit.name, {}).get("state")  # noqa: E731
    said = lambda: f"{site.kit.name} is {now()}; {(site.kit / 'log').read_text()[-2000:]}"  # noqa: E731
    until(lambda: now() == state, said, over=lambda: site.process.poll() is not None, every=0.5)


def heartbeat(site: SiteHost, hub: Processes, node: int) -> int:
    """The HTTP status of a heartbeat that is signed with the site's key, as its SuperNode sends them."""
    key = load_ssh_private_key((site.kit / "site.key").read_bytes(), password=None)
    client = FleetHttpClient.from_server_address(
        hub.address, False, str(hub.certs / "ca.crt"), [NodeAuthHttpInterceptor(key, key.public_key())]
    )
    try:
        assert client.SendNodeHeartbeat(
            SendNodeHeartbeatRequest(node=Node(node_id=node), heartbeat_interval=30.0)
        ).success
        return 200
    except httpx.HTTPStatusError as error:
        return error.response.status_code
    finally:
        client.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def certificates(root: Path) -> dict[str, bytes]:
    """What certs/ holds but for the log of who did what, which every command adds to."""
    return {name: held for name, held in contents(root / "certs").items() if name != "admitted/audit.jsonl"}


def new_public_key(folder: Path, kind: str = "ecdsa -b 384") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    sh(f"ssh-keygen -q -t {kind} -N '' -f key", folder)
    return folder / "key.pub"


# --- the kit -----------------------------------------------------------------------------------------------------


def test_the_kit_names_the_hub_the_image_and_the_base_model(root: Path, tmp_path: Path) -> None:
    kit = invited(root, "studio", tmp_path).kit
    assert {path.name for path in kit.iterdir()} == KIT
    settings = dict(line.split("=", 1) for line in (kit / ".env").read_text().splitlines()[1:])
    assert settings == {
        "SITE_NAME": "'studio'", "HUB": f"'127.0.0.1:{port_of(root)}'", "IMAGE": "'bouquet:cuda'",
        "BASE_MODEL": "'mini'", "BASE_FINGERPRINT": f"'{model.fingerprint(ROOT / 'models' / 'mini')['base']}'",
    }  # fmt: skip
    assert (kit / "ca.crt").read_bytes() == (root / "certs/ca.crt").read_bytes()
    page = (kit / "README.md").read_text()
    assert page.startswith(f"# studio joins the hub at 127.0.0.1:{port_of(root)}\n") and "$" not in page


def port_of(root: Path) -> str:
    return re.search(r"HUB_PORT=(\d+)", (root / ".env").read_text())[1]


def test_no_secret_is_in_the_kit(root: Path, tmp_path: Path) -> None:
    kit = invited(root, "studio", tmp_path).kit
    secrets = [path.read_bytes().strip() for path in (root / "certs").iterdir() if path.suffix in {".key", ".secret"}]
    assert len(secrets) == 6  # the CA's, the SuperLink's, two sites', the publisher's and the SuperExec's
    files = contents(kit)
    assert [
        name
        for name, content in files.items()
        if b"PRIVATE KEY-----" in content or any(secret in content for secret in secrets)
    ] == []


def test_the_same_kit_has_the_same_sum_which_invite_says(root: Path) -> None:
    first, second = (sh("scripts/bouquet hub invite studio", root).stdout for _ in range(2))
    digest = hashlib.sha256((root / ".bouquet/kits/studio.tar.gz").read_bytes()).hexdigest()
    assert digest in first and first == second


def test_a_new_kit_leaves_one_that_was_set_up_where_it_lies_as_it_is(root: Path) -> None:
    folder = root / ".bouquet/kits/studio"
    sh("scripts/bouquet hub invite studio", root)
    (folder / "site.key").write_text("the only copy")
    before = contents(folder)
    sh("scripts/bouquet hub invite studio --hub localhost:1", root)
    with tarfile.open(f"{folder}.tar.gz") as kit:
        assert "studio/site.key" not in kit.getnames()
    assert contents(folder) == before
    (folder / "site.key").unlink()


def test_a_hub_without_an_address_is_named(root: Path, tmp_path: Path) -> None:
    copy = copy_project(tmp_path / "bouquet")
    sh("scripts/certs", copy)
    wrong = sh("scripts/bouquet hub invite studio", copy, check=False)
    assert wrong.returncode == 1 and wrong.stdout.startswith(
        "JOIN-01  The hub has no address for sites.\n  found  no HUB_HOST\n"
    )
    sh("scripts/bouquet hub invite studio --hub localhost:8443", copy)


def test_an_address_that_the_certificate_lacks_is_named(root: Path) -> None:
    wrong = sh("scripts/bouquet hub invite studio --hub hub.example.org:8443", root, check=False)
    assert wrong.returncode == 1 and "CERT-01" in wrong.stdout and "missing: hub.example.org" in wrong.stdout


# --- the site's key ----------------------------------------------------------------------------------------------


def test_the_key_is_made_at_the_site_and_only_its_owner_can_read_it(root: Path, tmp_path: Path) -> None:
    site = invited(root, "studio", tmp_path)
    said = site.init()
    private, public = site.kit / "site.key", site.kit / "studio.pub"
    key = load_ssh_private_key(private.read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name == "secp384r1"
    assert key.public_key() == load_ssh_public_key(public.read_bytes())
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert said == sh("ssh-keygen -lf studio.pub", site.kit).stdout.split()[1]
    assert said == site.init()  # a second init keeps the key
    assert key.private_numbers() == load_ssh_private_key(private.read_bytes(), password=None).private_numbers()


def test_a_site_without_photos_docker_or_settings_is_told_what_is_missing(root: Path, tmp_path: Path) -> None:
    kit = invited(root, "studio", tmp_path).kit
    shown = sh("./site init --data ../mistyped --gpu none", kit, check=False, BOUQUET=str(root))
    assert shown.returncode == 1 and shown.stdout.startswith("JOIN-08") and "../mistyped" in shown.stdout
    assert sh("./site start", kit, check=False, BOUQUET=str(root)).stdout.startswith("JOIN-11")
    (tmp_path / "bin").mkdir()
    for tool in ("awk", "dirname", "tr"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    without = sh(f"PATH={tmp_path}/bin /bin/sh ./site init --data ../photos --gpu none", kit, check=False).stdout
    assert without.startswith("JOIN-09  Docker with Compose v2, or Bouquet's environment, is not here.")
    without = sh("./site init --data ../photos --gpu none", kit, check=False, BOUQUET=str(tmp_path)).stdout
    assert without.startswith("JOIN-09") and "scripts/setup packages" in without
    assert not (kit / "site.key").exists()


def test_every_code_that_the_sites_command_says_is_explained_in_the_kit() -> None:
    said = set(re.findall(r"\b[A-Z]+-\d\d\b", (ROOT / "scripts/site").read_text()))
    assert said == set(re.findall(r"^### (\S+)$", (ROOT / "docker/kit/README.md").read_text(), re.MULTILINE))


# --- admission ---------------------------------------------------------------------------------------------------


def test_an_admitted_site_is_online_by_name(root: Path, garden: SiteHost) -> None:
    shown = sh("scripts/bouquet hub sites", root).stdout.splitlines()
    assert re.split(r"\s{2,}", shown[0]) == ["name", "state", "last seen", "images", "GPU", "rounds"]
    [row] = [line for line in shown if line.startswith("garden ")]
    assert re.fullmatch(r"garden +online +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC +- +- +0", row)
    assert not re.search(r"\d{17,}", "\n".join(shown))  # names, never node ids
    assert (root / "certs/admitted/garden.pub").read_text().split()[:2] == (
        garden.kit / "garden.pub"
    ).read_text().split()[:2]


def test_admitting_the_same_key_under_the_same_name_again_changes_nothing(root: Path, garden: SiteHost) -> None:
    before = sites(root)
    sh(f"scripts/bouquet hub admit garden {garden.kit}/garden.pub", root)
    assert {name: site["state"] for name, site in sites(root).items()} == {
        name: site["state"] for name, site in before.items()
    }


def test_admit_refuses_another_key_under_a_name_that_is_taken_and_another_name_for_a_key(
    root: Path, garden: SiteHost, tmp_path: Path
) -> None:
    for name, key in (("garden", new_public_key(tmp_path)), ("meadow", garden.kit / "garden.pub")):
        refused = sh(f"scripts/bouquet hub admit {name} {key}", root, check=False)
        assert refused.returncode == 1 and "JOIN-04" in refused.stdout and "bouquet hub revoke garden" in refused.stdout
    assert sites(root)["garden"]["state"] == "online" and "meadow" not in sites(root)


def test_admit_refuses_what_is_no_public_key_of_a_site(root: Path, garden: SiteHost, tmp_path: Path) -> None:
    for key in (garden.kit / "site.key", new_public_key(tmp_path, "ed25519"), tmp_path / "missing.pub"):
        refused = sh(f"scripts/bouquet hub admit meadow {key}", root, check=False)
        assert refused.returncode == 1 and refused.stdout.startswith("JOIN-02"), refused.stdout


def test_admit_refuses_a_key_whose_fingerprint_is_not_the_one_read_out(root: Path, tmp_path: Path) -> None:
    key = new_public_key(tmp_path)
    other = "SHA256:" + base64.b64encode(bytes(32)).decode().rstrip("=")
    refused = sh(f"scripts/bouquet hub admit meadow {key} --fingerprint {other}", root, check=False)
    assert refused.returncode == 1 and "JOIN-03" in refused.stdout
    assert sh(f"ssh-keygen -lf {key}", root).stdout.split()[1] in refused.stdout
    assert "meadow" not in sites(root) and not (root / "certs/admitted/meadow.pub").exists()


@pytest.mark.parametrize("name", ["../x", "A", "a b", "-a", ""])
def test_a_name_that_is_none_is_refused(root: Path, name: str) -> None:
    refused = sh(f"scripts/bouquet hub invite -- '{name}'", root, check=False)
    assert refused.returncode == 1 and refused.stdout.startswith("CERT-04")


def test_a_site_that_is_ready_passes_its_check_and_one_that_is_not_admitted_fails_it(
    root: Path, garden: SiteHost, tmp_path: Path
) -> None:
    ready = sh("./site check --fast", garden.kit).stdout
    assert "fail" not in ready and re.search(r"^pass  key ", ready, re.MULTILINE), ready
    stranger = invited(root, "studio", tmp_path)
    stranger.init()
    told = sh("./site check --fast", stranger.kit, check=False)
    assert told.returncode == 1 and re.search(r"^fail  key ", told.stdout, re.MULTILINE), told.stdout


def test_a_joined_site_trains_and_the_hub_shows_its_images_and_rounds(root: Path, garden: SiteHost) -> None:
    before = sites(root)["garden"]["rounds"]
    sh("scripts/bouquet hub sign", root)
    # known already; from now on it weighs no more
    sh(f"scripts/bouquet hub admit garden {garden.kit}/garden.pub --images 5", root)
    shown = sh(f'.venv/bin/flwr run . remote-deployment --run-config "{SMALL}" --format json', root).stdout
    state = follow(json.loads(shown[shown.index("{") :])["run-id"], lambda line: None)
    assert state[0] == "finished:completed", state
    row = sites(root)["garden"]
    assert row["rounds"] == before + 1 and 20 <= row["images"] <= 24  # of 24 drawn photos some are held out
    [history] = [
        json.loads(file.read_text())
        for file in (root / ".bouquet/adapters").glob("*/history.json")
        if not file.parent.is_symlink()
    ]
    assert history["rounds"][0]["sites"]["garden"]["weight"] == 5
    told = sh("./site status", garden.kit).stdout.splitlines()  # at the site: what it did
    assert (
        told[0].startswith(f"run {history['run']}  trained in 1 rounds, ")
        and told[1].startswith("  round 1  ")
        and told[-1].startswith("in the last seven days: 1 runs, ")
    )
    told = sh(f"./site personal {root}/.bouquet/adapters/{history['run']} --steps 2", garden.kit).stdout
    assert re.search(r"^2 steps at home; loss on this site's \d held-out photos ", told, re.MULTILINE), told
    assert (garden.kit / f"personal/{history['run']}/final/pytorch_lora_weights.safetensors").is_file()
    drawn = "./site class-images --prompt 'a rose' --prompt 'a daisy' --count 3 --steps 1"
    told = sh(drawn, garden.kit).stdout
    assert told.endswith(f"next     mv drawn/class-images {garden.kit.parent}/photos/\n"), told
    lines = (garden.kit / "drawn/class-images/metadata.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["a rose", "a daisy", "a rose"]
    assert "SITE-09" in sh(drawn, garden.kit, check=False).stdout  # nothing is drawn over
    told = sh("./site personal ../mistyped", garden.kit, check=False).stdout
    assert told.startswith("JOIN-08  The folder is not there.\n  found  the folder of the run: ../mistyped\n"), told


def test_sites_shows_images_gpu_and_rounds_of_the_runs(root: Path, garden: SiteHost) -> None:
    before = sites(root)["garden"]["rounds"]
    parts = [
        {"garden": {"num-examples": 480, "gpu": "NVIDIA H100"}, "lab": {"num-examples": 12}},
        {"lab": {"num-examples": 12}},
        {"garden": {"num-examples": 500}},
    ]
    done = {"round": 1, "started_from": "a", "adapter": "b", "train_loss": 0.1, "seconds": 1.0}
    entries = [done | {"sites": sites} for sites in parts]
    for run, rounds in (("101", entries), ("102", entries[2:]), ("103", [])):
        (root / ".bouquet/adapters" / run).mkdir()
        (root / ".bouquet/adapters" / run / "history.json").write_text(
            json.dumps({"run": run, "state": "failed", "rounds": rounds})
        )
    row = sites(root)["garden"]
    assert (row["images"], row["gpu"], row["rounds"]) == (500, "NVIDIA H100", before + 3)


def test_sites_shows_who_was_invited_and_who_waits_for_the_next_up(root: Path, garden: SiteHost) -> None:
    sh("scripts/bouquet hub invite studio", root)
    assert sites(root)["studio"]["state"] == "invited"
    # its key lies in certs/admitted; this hub has not registered it yet
    assert sites(root)["site-1"]["state"] == "waiting"


# --- revocation: last, because it ends what the tests above share ---------------------------------------------------


@pytest.mark.filterwarnings("ignore:`verify=<str>` is deprecated:DeprecationWarning")  # flwr 1.41 with httpx 0.28
def test_a_revoked_site_is_cut_off_and_comes_back_with_a_new_key_and_nobody_else_notices(
    hub: Processes, root: Path, garden: SiteHost, tmp_path: Path
) -> None:
    other = invited(root, "orchard", tmp_path)
    before, superlink = certificates(root), hub.running["superlink"].pid
    other.init()
    sh(f"scripts/bouquet hub admit orchard {other.kit}/orchard.pub", root)
    assert certificates(root).items() - before.items() == {
        ("admitted/orchard.pub", (root / "certs/admitted/orchard.pub").read_bytes())
    }
    other.start()
    try:
        wait_for(root, other, "online")
        online = other.process.pid
        with_orchard = certificates(root)

        [node] = [site.node for site in registered() if site.name == "garden"]
        assert heartbeat(garden, hub, node) == 200
        sh("scripts/bouquet hub revoke garden", root)
        assert heartbeat(garden, hub, node) == 401  # the very next request
        garden.process.wait(PATIENT)  # a SuperNode asks every 3 s; refused, it ends
        assert sites(root)["garden"]["state"] == "revoked"
        theirs = {"admitted/garden.pub", "admitted/garden.json"}
        assert {name for name, _ in with_orchard.items() - certificates(root).items()} == theirs

        garden.start()  # again with the revoked key
        garden.process.wait(PATIENT)
        assert sites(root)["garden"]["state"] == "revoked"
        refused = sh(f"scripts/bouquet hub admit garden {garden.kit}/garden.pub", root, check=False)
        assert (
            refused.returncode == 1 and "JOIN-05" in refused.stdout and "rm site.key && ./site init" in refused.stdout
        )

        old = garden.init()
        sh("rm site.key", garden.kit)
        new = garden.init()
        assert new != old
        sh(f"scripts/bouquet hub admit garden {garden.kit}/garden.pub --fingerprint {new}", root)
        garden.start()
        wait_for(root, garden, "online")
        assert (
            sites(root)["orchard"]["state"] == "online" and other.process.pid == online and other.process.poll() is None
        )
        assert hub.running["superlink"].pid == superlink and hub.running["superlink"].poll() is None
        assert {k: v for k, v in certificates(root).items() if k not in theirs} == {
            k: v for k, v in with_orchard.items() if k not in theirs
        }
    finally:
        other.stop()


def test_revoking_somebody_unknown_is_named(root: Path) -> None:
    refused = sh("scripts/bouquet hub revoke nobody", root, check=False)
    assert refused.returncode == 1 and refused.stdout.startswith("JOIN-06")


def test_a_site_that_only_waits_can_be_revoked_before_it_was_ever_registered(root: Path) -> None:
    sh("scripts/bouquet hub revoke site-2", root)
    assert not (root / "certs/admitted/site-2.pub").exists() and "site-2" not in sites(root)


def test_without_a_hub_the_operator_is_told_so(root: Path, tmp_path: Path) -> None:
    connect_home = {"FLWR_HOME": str(tmp_path)}
    (tmp_path / "config.toml").write_text(
        f'[superlink.remote-deployment]\naddress = "127.0.0.1:{free_port()}"\nroot-certificates ='
        f' "{root}/certs/ca.crt"\n'
    )
    told = sh("scripts/bouquet hub sites", root, check=False, **connect_home)
    assert told.returncode == 1 and told.stdout.startswith("HOST-08  The hub does not answer."), told.stdout


# --- the kit's Compose file ----------------------------------------------------------------------------------------


def composed(root: Path, to: Path, gpu: str = "GPU-1234") -> dict:
    kit = invited(root, "studio", to).kit
    (kit / "site.key").write_text("")
    files = "compose.yaml" + (":cpu.yaml" if gpu == "none" else "")
    with (kit / ".env").open("a") as settings:
        settings.write(f"SITE_DATA='{to}/photos'\nSITE_GPU='{gpu}'\nCOMPOSE_FILE='{files}'\n")
    return json.loads(sh("docker compose config --format json", kit).stdout)


def test_the_kits_supernode_may_nothing_and_listens_on_nothing(docker: None, root: Path, tmp_path: Path) -> None:
    config = composed(root, tmp_path)
    [(name, service)] = config["services"].items()
    assert name == "supernode" and "ports" not in service and "privileged" not in service
    assert (service["read_only"], service["cap_drop"], service["security_opt"]) == (
        True,
        ["ALL"],
        ["no-new-privileges:true"],
    )
    assert (service["init"], service["restart"], service["user"]) == (True, "unless-stopped", "10001:10001")
    assert service["pids_limit"] and service["mem_limit"] == service["memswap_limit"]
    assert service["secrets"] == [{"source": "site.key", "target": "/run/secrets/site.key"}] or [
        s["source"] for s in service["secrets"]
    ] == ["site.key"]
    assert config["secrets"].keys() == {"site.key"}
    mounts = {volume["target"]: volume for volume in service["volumes"]}
    assert {target: mount.get("read_only", False) for target, mount in mounts.items()} == {
        "/data": True,
        "/site/models": True,
        "/cache": False,
    }
    assert mounts["/cache"]["type"] == "volume" and not mounts["/data"]["bind"].get("create_host_path")


def test_the_kits_supernode_has_the_sites_gpu_and_no_other_or_none(docker: None, root: Path, tmp_path: Path) -> None:
    pinned, without = (composed(root, tmp_path / gpu, gpu)["services"]["supernode"] for gpu in ("GPU-1234", "none"))
    [device] = pinned["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["device_ids"], device["capabilities"]) == ("nvidia", ["GPU-1234"], ["gpu"])
    assert not without["deploy"]["resources"]["reservations"].get("devices")
