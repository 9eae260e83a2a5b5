"""docs/hub.md and docs/site.md, block by block, as two operators follow them: a hub and a site that joins from its kit.

Two Compose projects in two folders on two networks; what connects them is the hub's published port. Every block of the
two pages is executed here as it is printed, but for the names in `here` (and "Without Docker": tests/test_join.py's
`./site`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from conftest import copy_project, sh

from bouquet import ROOT
from bouquet.hub.deployment import free_port
from tests.kit.wait import until

pytestmark = [pytest.mark.usefixtures("docker"), pytest.mark.slow]
SMALL = "rounds=1 local-steps=1 batch-size=4 lora-rank=4 validation-timesteps=1 sample-prompts='' min-sites=1"
DONE: set[tuple[str, str]] = set()


@dataclass
class Operator:
    """Somebody who follows a page in a folder of their own."""

    page: str
    folder: Path
    here: dict[str, str]  # words of the page: what they are on this machine

    def follow(self, heading: str, number: int = 0) -> str:
        """Run the block below a heading, line by line until one fails; what it printed."""
        DONE.add((self.page, blocks(self.page)[heading][number]))
        block = blocks(self.page)[heading][number]
        for words, mine in self.here.items():
            block = block.replace(words, mine)
        return sh(f"set -e\n{block}", self.folder).stdout


def blocks(page: str) -> dict[str, list[str]]:
    """The sh blocks of a page, by heading."""
    parts = re.split(r"^## (.+)$", (ROOT / "docs" / page).read_text(), flags=re.MULTILINE)[1:]
    return {
        heading: re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        for heading, text in zip(parts[::2], parts[1::2], strict=True)
    }


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    """The hub's operator after "Install"; its port is open to this host's Docker networks."""
    folder = copy_project(tmp_path_factory.mktemp("hub") / "bouquet")
    ports = f"HUB_PORT={free_port()}\nCONTROL_PORT={free_port()}\n"
    (folder / ".env").write_text(
        f"COMPOSE_PROJECT_NAME=bouquet-hub-{os.getpid()}\nTORCH=cpu\nIMAGE=bouquet:cpu\n{ports}"
    )
    address = sh("docker network inspect bridge --format '{{(index .IPAM.Config 0).Gateway}}'", folder).stdout.strip()
    here = {
        "hub.example.org": address, "0.0.0.0": address, "scripts/setup": "scripts/setup --engine docker",
        "bouquet:cuda": "bouquet:cpu",
        "remote-deployment --stream": f'remote-deployment --run-config "{SMALL}" --stream',
        "restart": "restart --timeout 5",
    }  # fmt: skip
    operator = Operator("hub.md", folder, here)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLWR_HOME", str(folder.parent / "flwr"))
        for variable in [name for name in os.environ if name.startswith(("COMPOSE_", "SITE_", "HUB"))]:
            patch.delenv(variable)
        sh("scripts/bouquet data partition --dataset mini --sites 2 --images-per-site 24", folder)
        try:
            operator.follow("Install")
            yield operator
        finally:
            sh("docker compose down --volumes --timeout 5", folder, check=False)


@pytest.fixture(scope="module")
def site(hub: Operator, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    """The site's operator after "Join", with a kit, an image file and photos, and nothing of the hub's folder."""
    folder = tmp_path_factory.mktemp("site")
    hub.follow("Invite a site")
    sh(
        f"cp {hub.folder}/.bouquet/kits/garden.tar.gz . && mv {hub.folder}/bouquet-image.tar . && cp -r"
        f" {hub.folder}/.bouquet/data/site-1 photos",
        folder,
    )
    sh("chmod -R a+rX photos", folder)
    operator = Operator("site.md", folder, {"/srv/photos": str(folder / "photos"), "--gpu 0": "--gpu none"})
    operator.follow("Unpack the kit")
    (folder / "bouquet-image.tar").unlink()
    operator.folder = folder / "garden"
    try:
        said = re.search(r"SHA256:\S+", operator.follow("Make your key"))[0]
        sh(f"cp garden.pub {hub.folder}/", operator.folder)
        assert said in hub.follow("Admit it")
        operator.follow("Join")
        yield operator
    finally:
        sh("docker compose down --volumes --timeout 5", operator.folder, check=False)


def row(hub: Operator) -> dict:
    """What the hub says of the site; no state where it does not answer."""
    shown = sh("scripts/bouquet hub sites --json", hub.folder, check=False)
    if shown.returncode:
        return {"state": None, "found": shown.stdout}
    [garden] = [site for site in json.loads(shown.stdout)["sites"] if site["name"] == "garden"]
    return garden


def state(hub: Operator) -> str | None:
    return row(hub)["state"]


def wait_until_heard(hub: Operator) -> None:
    """Until the site has said something to the hub that is up now."""
    since = datetime.now(UTC).isoformat()
    until(lambda: state(hub) == "online" and row(hub)["last-seen"] >= since, lambda: row(hub), every=1)


def runs(hub: Operator) -> list[dict]:
    shown = sh(".venv/bin/flwr ls remote-deployment --format json", hub.folder).stdout
    return json.loads(shown[shown.index("{") :])["runs"]


def container(operator: Operator, service: str) -> dict:
    return json.loads(sh(f"docker inspect $(docker compose ps -aq {service})", operator.folder).stdout)[0]


def networks(operator: Operator, service: str) -> dict[str, dict]:
    return container(operator, service)["NetworkSettings"]["Networks"]


def reaches(site: Operator, host: str, port: int | str) -> bool:
    """Whether the site's container gets a TCP connection there."""
    check = f"docker compose exec -T supernode python /opt/bouquet/health.py tcp://{host}:{port}"
    return sh(check, site.folder, check=False).returncode == 0


def test_the_site_joins_through_the_published_port_and_reaches_nothing_else_of_the_hub(
    hub: Operator, site: Operator
) -> None:
    assert state(hub) == "online"
    settings = dict(line.split("=", 1) for line in (hub.folder / ".env").read_text().splitlines() if "=" in line)
    address = settings["HUB_HOST"]
    assert not networks(site, "supernode").keys() & (
        networks(hub, "gateway").keys() | networks(hub, "superlink").keys()
    )
    assert reaches(site, address, settings["HUB_PORT"])
    assert not reaches(site, address, settings["CONTROL_PORT"])
    assert not reaches(site, "superlink", 8000)
    assert not any(reaches(site, own["IPAddress"], 8000) for own in networks(hub, "superlink").values())


def test_the_sites_container_may_nothing_and_holds_its_own_key_alone(site: Operator) -> None:
    found = container(site, "supernode")
    host = found["HostConfig"]
    assert found["Config"]["User"] not in {"", "0", "root"} and not found["Config"]["User"].startswith("0:")
    assert (host["ReadonlyRootfs"], host["CapDrop"], host["CapAdd"], host["Privileged"]) == (True, ["ALL"], None, False)
    assert (
        "no-new-privileges:true" in host["SecurityOpt"]
        and host["PidsLimit"] > 0
        and host["Memory"] == host["MemorySwap"] > 0
    )
    assert not host["PortBindings"] and not any(found["NetworkSettings"]["Ports"].values())
    assert {mount["Destination"]: mount["RW"] for mount in found["Mounts"]} == {
        "/data": False, "/site/models": False, "/cache": True, "/ca.crt": False, "/trusted.yaml": False,
        "/run/secrets/site.key": False,
    }  # fmt: skip


def test_a_run_over_the_joined_site_leaves_its_adapter_and_the_hub_shows_its_part(
    hub: Operator, site: Operator
) -> None:
    hub.follow("First run")
    assert [run["status"] for run in runs(hub)] == ["finished:completed"]
    assert list((hub.folder / "adapters").glob("*/final/pytorch_lora_weights.safetensors"))
    shown = hub.follow("First run", 1)  # the operator's container
    assert re.search(r"^garden +online +\S+ \S+ UTC +\d+ +\S+.* +1$", shown, re.MULTILINE), shown


def test_the_joined_site_trains_the_runs_adapter_on_in_its_own_container_and_keeps_what_comes_of_it(
    hub: Operator, site: Operator, tmp_path: Path
) -> None:
    shutil.copytree(hub.folder / "adapters/latest", run := tmp_path / "run")
    sh(f"chmod -R a+rX {tmp_path}", tmp_path)
    site.here["~/run"] = str(run)
    said = site.follow("A personal adapter")
    assert re.search(r"^\d+ steps? at home; loss on this site's \d+ held-out photos ", said, re.MULTILINE), said
    made = site.folder / "personal/run/final"
    assert {file.name for file in made.iterdir()} >= {"pytorch_lora_weights.safetensors", "kohya.safetensors"}
    provenance = json.loads((made / "provenance.json").read_text())
    assert provenance["personal"]["site"] == "garden"


def test_the_joined_sites_container_draws_class_images_that_the_site_can_read(site: Operator) -> None:
    said = sh("./site class-images --prompt 'a rose' --count 2 --steps 1", site.folder).stdout
    assert said.splitlines()[-1].startswith("next     mv drawn/class-images /"), said
    drawn = site.folder / "drawn/class-images"
    assert {file.name for file in drawn.iterdir()} == {"00000.png", "00001.png", "metadata.jsonl"}
    assert (drawn / "metadata.jsonl").read_text().count("a rose") == 2


def test_a_gpu_that_docker_cannot_give_to_a_container_is_named(site: Operator, tmp_path: Path) -> None:
    sh(
        f"cp -r {site.folder} {tmp_path}/garden && cd garden && sed -i \"s/^SITE_GPU=.*/SITE_GPU='GPU-of-nobody'/\""
        " .env",
        tmp_path,
    )
    told = sh("./site check", tmp_path / "garden", check=False)
    if "GPU-01" in told.stdout:
        pytest.skip("Docker's nvidia driver here is a stand-in that grants every device")
    assert told.returncode == 1 and told.stdout.startswith(
        "JOIN-12  Docker cannot give the GPU to a container.\n  found  GPU GPU-of-nobody: "
    ), told.stdout


def test_a_renewed_certificate_changes_nothing_for_the_site(hub: Operator, site: Operator) -> None:
    before = (hub.folder / "certs/superlink.crt").read_bytes()
    hub.follow("Renewal")
    assert (hub.folder / "certs/superlink.crt").read_bytes() != before
    wait_until_heard(hub)


def test_a_hub_that_was_lost_comes_back_from_its_backup_and_so_does_the_site(hub: Operator, site: Operator) -> None:
    ran, rounds = runs(hub), row(hub)["rounds"]
    assert rounds
    hub.follow("Backup")
    settings, sites = (hub.folder / ".env").read_text(), sorted((hub.folder / "certs").iterdir())
    sh(
        "docker compose down --volumes --timeout 5 && rm -r certs/*.crt certs/*.key certs/*.secret certs/admitted .env",
        hub.folder,
    )
    hub.follow("Restore")
    assert (hub.folder / ".env").read_text() == settings and sorted((hub.folder / "certs").iterdir()) == sites
    assert [run["run-id"] for run in runs(hub)] == [run["run-id"] for run in ran]
    assert row(hub)["rounds"] == rounds  # of the adapters' histories
    wait_until_heard(hub)


def test_a_revoked_site_is_refused_and_leaves(hub: Operator, site: Operator) -> None:
    hub.follow("A site leaves, or must leave")
    until(lambda: container(site, "supernode")["RestartCount"])  # its process has ended; Docker tries again, in vain
    assert state(hub) == "revoked"
    site.follow("Leave")
    assert not sh("docker compose ps -aq", site.folder).stdout
    assert not (hub.folder / "certs/admitted/garden.pub").exists()


def test_every_block_of_the_two_pages_was_executed(hub: Operator, site: Operator) -> None:
    """Last: all but the one without Docker, which tests/test_join.py executes."""
    left = {
        (page, heading)
        for page in ("hub.md", "site.md")
        for heading, found in blocks(page).items()
        for block in found
        if (page, block) not in DONE
    }
    assert left == {("site.md", "Without Docker")}
