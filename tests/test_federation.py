"""A real federation as processes on loopback: SuperLink, ServerApp, two SuperNodes, TLS, node authentication, real app.

The runs are the smallest that go through every step; how well they learn is tested elsewhere.
"""

from __future__ import annotations

import http.client
import http.server
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import copy_project, sh
from safetensors.torch import load_file

from app.errors import BouquetError
from app.site import privacy
from app.site.photos import data, prior
from benchmarks.speed.contenders import sessions
from benchmarks.speed.watch import MESSAGE, Watch, processes
from bouquet import ROOT
from bouquet.hub.deployment import Processes, free_port, is_alive
from bouquet.hub.following import OURS, follow
from bouquet.hub.runs import BIN, QUIET, connect, flwr, nodes_online, start_run
from tests.kit import families, tiny
from tests.kit.wait import PATIENT, until

LOUD = re.compile(r"(\x1b\[\d+m)?(WARNING|ERROR|CRITICAL)\b")  # a record of Flower's log, as its console shows it
NODES = re.compile(r"(\x1b\[92m)?INFO")  # the SuperNode's own, about each message
SMALL = (
    "rounds=2 local-steps=2 batch-size=4 lora-rank=4 validation-timesteps=1 sample-steps=2 sample-prompts='a red poppy'"
)


@pytest.fixture(scope="module")
def federation(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """A hub and two sites with 24 drawn flowers each; FLWR_HOME is the test's own."""
    home = tmp_path_factory.mktemp("home")
    sh("scripts/certs && scripts/bouquet data partition --dataset mini --sites 2 --images-per-site 24", project)
    sites = {name: project / ".bouquet/data" / name for name in ("site-1", "site-2")}
    (models := home / "models").mkdir()
    (models / "mini").symlink_to(ROOT / "models" / "mini")
    running = Processes(home, project / "certs", free_port(), sites, models=models)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLWR_HOME", str(home / "operator"))
        connect(running.address, project / "certs/ca.crt")
        try:
            running.start()
            yield running
        finally:
            running.stop()


def went(federation: Processes, workers: dict[str, dict[str, set[int]]], config: str) -> tuple[Path, list[str]]:
    """A run to its end: its folder and the lines that a person saw. Which processes took its messages at each site goes
    into `workers`, by the run's id.
    """
    lines: list[str] = []
    watch = Watch(sessions(federation))
    watch.start()
    run = start_run(config)
    state, details = follow(run, lines.append)
    watch.stop()
    assert state == "finished:completed", (details, lines)
    workers[run] = {site: set(watch.began.get(site, {})) for site in federation.sites}
    return federation.fetch(run), lines


@pytest.fixture(scope="module")
def workers() -> dict[str, dict[str, set[int]]]:
    """The processes that worked for each run of this module that ended well."""
    return {}


@pytest.fixture(scope="module")
def finished(federation: Processes, workers: dict[str, dict[str, set[int]]]) -> tuple[Path, list[str]]:
    """One small run to its end: its folder and the lines that a person saw."""
    return went(federation, workers, SMALL)


def stream(run: str) -> list[str]:
    """Every line that a run has printed at the hub, as `flwr run --stream` passes it on; what flwr itself says is left
    out.
    """
    command = [BIN / "flwr", "log", run, "remote-deployment", "--stream"]
    done = subprocess.run(
        command,
        env=os.environ | QUIET | {"FLWR_LOG_LEVEL": "WARNING"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=PATIENT,
    )
    said = [line for line in re.split(r"[\r\n]+", done.stdout) if line]
    assert said[0].startswith("Using SuperLink: ")
    return said[1:]


def history(folder: Path) -> dict:
    return json.loads((folder / "history.json").read_text())


def test_a_run_leaves_every_rounds_adapter_the_final_files_and_the_picture(finished: tuple[Path, list[str]]) -> None:
    folder, _ = finished
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    a_round = {"adapter_config.json", "adapter_model.safetensors", "metrics.json", "server_state.safetensors"}
    assert files == {
        *(f"round-000{number}/{name}" for number in (1, 2) for name in a_round),
        *(f"{final}/{name}" for final in ("final", "final/fp16") for name in (
            "adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors",
            "kohya.safetensors")),
        "final/provenance.json", "history.json", "status.json", "samples.png",
    }  # fmt: skip
    assert (folder.parent / "latest").resolve() == folder


def test_round_two_starts_from_round_ones_aggregate(finished: tuple[Path, list[str]]) -> None:
    first, second = history(finished[0])["rounds"]
    assert second["started_from"] == first["adapter"] != second["adapter"]


def test_both_sites_take_part_in_every_round(finished: tuple[Path, list[str]]) -> None:
    assert [set(entry["sites"]) for entry in history(finished[0])["rounds"]] == [{"site-1", "site-2"}] * 2


def test_a_person_sees_one_line_a_round(finished: tuple[Path, list[str]]) -> None:
    _, lines = finished
    assert [line.split("  ")[0] for line in lines if " round " in f" {line}"][:2] == [
        "bouquet: round 1/2",
        "bouquet: round 2/2",
    ]


def test_the_run_prints_our_lines_and_others_warnings_alone(finished: tuple[Path, list[str]]) -> None:
    lines = stream(finished[0].name)
    assert [line for line in lines if not OURS.match(line) and not LOUD.match(line)] == []
    assert [line for line in lines if OURS.match(line)] == finished[1]


def test_the_sites_processes_print_our_lines_and_others_warnings_alone(
    federation: Processes, finished: tuple[Path, list[str]]
) -> None:
    for site in federation.sites:
        log = (federation.logs / f"{site}.log").read_text()
        after = re.split(r"[\r\n]+", log[log.index("bouquet: encoded ") :])
        assert [
            line for line in after if line and not OURS.match(line) and not LOUD.match(line) and not NODES.match(line)
        ] == []
        assert "Start `flwr-clientapp` process" not in log and "Successfully installed" not in log


FAMILIES = {"sdxl": "alternate", "zimage": "fedavg"}  # and the strategy that its run has


@pytest.fixture(scope="module")
def families_runs(federation: Processes, workers: dict[str, dict[str, set[int]]]) -> Iterator[dict[str, Path]]:
    """A run's folder for SDXL and for a family that matches flows, tiny; the second learns class images, too."""
    small, runs = SMALL.replace("local-steps=2", "local-steps=6"), {}
    classes = [tiny.site(folder / "class-images", count=3, public=False) for folder in federation.sites.values()]
    for folder in federation.sites.values():  # else the site counts as private, and rounds its numbers
        privacy.declare_public(folder, (*data.scan(folder).photos, *prior.scan(folder).photos))
    for name, strategy in FAMILIES.items():
        shutil.copytree(families.base(name), federation.models / f"tiny-{name}")
        more = f"resolution=32 lora-targets='attention' learning-rate=0.05 wire-precision='fp16' strategy='{strategy}'"
        more += f" prior-loss-weight={float(name == 'zimage')}"
        runs[name], _ = went(federation, workers, f"{small} base-model='tiny-{name}' {more}")
    yield runs
    for folder in classes:  # other files of tests divide the same photos
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_another_family_of_base_models_is_trained_by_the_same_deployment(
    families_runs: dict[str, Path], name: str
) -> None:
    """A SuperLink, two SuperNodes, two rounds; the loss falls, and what a run leaves is what that family's tools
    load.
    """
    folder = families_runs[name]
    told = history(folder)
    assert [set(entry["sites"]) for entry in told["rounds"]] == [{"site-1", "site-2"}] * 2
    first, *_, last = (entry["weighted"] for entry in told["validation"])
    assert last < first
    files = {file.name for file in (folder / "final").iterdir() if file.suffix == ".safetensors"}
    assert files == {"adapter_model.safetensors", "pytorch_lora_weights.safetensors"} | (
        {"kohya.safetensors"} if name == "sdxl" else set()
    )


def test_a_run_that_asks_for_class_images_has_each_sites_own_and_they_count_as_none_of_its_photos(
    federation: Processes, families_runs: dict[str, Path]
) -> None:
    for site in federation.sites:  # of three runs one asked
        assert (federation.logs / f"{site}.log").read_text().count("class-images holds 3 usable ") == 1
    images = [{site: told["num-examples"] for site, told in entry["sites"].items()} for run in families_runs.values()
              for entry in history(run)["rounds"]]  # fmt: skip
    assert images == [images[0]] * 4


def test_a_run_that_alternates_trains_b_in_its_first_round_and_a_in_its_second_and_loses_nothing_by_averaging(
    families_runs: dict[str, Path],
) -> None:
    first, second = (
        load_file(families_runs["sdxl"] / f"round-000{number}/adapter_model.safetensors") for number in (1, 2)
    )
    moved = {name for name in first if not torch.equal(first[name], second[name])}
    assert moved == {name for name in first if ".lora_A." in name}
    assert all(first[name].any() for name in first if ".lora_B." in name)
    assert max(entry["aggregation_error"] for entry in history(families_runs["sdxl"])["rounds"]) < 1e-6
    assert min(entry["aggregation_error"] for entry in history(families_runs["zimage"])["rounds"]) > 1e-3


def test_a_run_has_one_process_at_each_site_for_all_its_rounds_and_none_when_it_has_ended(
    federation: Processes,
    finished: tuple[Path, list[str]],
    families_runs: dict[str, Path],
    workers: dict[str, dict[str, set[int]]],
) -> None:
    """Of three runs of two rounds, one after another."""
    assert workers.keys() == {finished[0].name, *(folder.name for folder in families_runs.values())}
    assert all(len(pids) == 1 for run in workers.values() for pids in run.values()), workers
    for site in federation.sites:  # a run's process never serves another run
        assert len(set.union(*(run[site] for run in workers.values()))) == len(workers), workers
    until(lambda: not [process for _, process in processes(sessions(federation)) if process.name == MESSAGE])


def test_the_hub_answers_nobody_without_tls_or_with_another_ca(federation: Processes) -> None:
    with socket.create_connection(("127.0.0.1", federation.port), timeout=5) as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert not plain.recv(64).startswith(b"HTTP")
    with (
        socket.create_connection(("127.0.0.1", federation.port), timeout=5) as raw,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        ssl.create_default_context().wrap_socket(raw, server_hostname="localhost")


def test_a_site_whose_key_was_not_admitted_is_turned_away_and_its_process_ends(federation: Processes) -> None:
    sh("scripts/certs stranger && rm certs/admitted/stranger.pub", federation.certs.parent)
    federation.sites["stranger"] = federation.sites["site-1"]
    try:
        federation.start_site("stranger")
        federation.running["stranger"].wait(PATIENT)
        assert nodes_online() == 2
    finally:
        federation.stop_site("stranger")
        del federation.sites["stranger"]


def test_an_unknown_run_config_key_is_named_and_no_run_starts(federation: Processes) -> None:
    before = len(flwr("ls", "remote-deployment")["runs"])
    with pytest.raises(BouquetError, match="CONFIG-01") as refused:
        start_run("local-step=3")
    assert "did you mean local-steps?" in refused.value.report()
    assert len(flwr("ls", "remote-deployment")["runs"]) == before


def test_a_run_that_misses_sites_fails_by_name_within_its_bound(federation: Processes) -> None:
    done = sh(
        """scripts/bouquet run --run-config "min-sites=3 wait-for-sites=3 sample-prompts=''\"""", ROOT, check=False
    )
    [run] = re.findall(r"^run (\d+) has started", done.stdout)
    assert done.returncode == 1 and re.search(rf"^run {run}  finished:failed  .*HUB-01", done.stdout, re.MULTILINE), (
        done.stdout
    )
    lines = stream(run)
    at = next(at for at, line in enumerate(lines) if line.startswith("HUB-01  "))
    assert [line.split()[0] for line in lines[at + 1 : at + 4]] == ["found", "fix", "help"] and LOUD.match(
        lines[at + 4]
    )
    assert not any("Traceback" in line or line.startswith('  File "') for line in lines)


def test_a_person_asks_the_hub_how_the_run_ended(federation: Processes, finished: tuple[Path, list[str]]) -> None:
    shown = sh(
        f"scripts/bouquet hub status {finished[0].name}", ROOT, BOUQUET_ADAPTERS=str(federation.adapters)
    ).stdout.splitlines()
    assert (
        shown[:2] == [f"run       {finished[0].name}  finished", "rounds    2 of 2 done"]
        and shown[-1] == "next      scripts/bouquet report"
    )


def test_a_restarted_hub_knows_its_sites_and_runs(federation: Processes, finished: tuple[Path, list[str]]) -> None:
    federation.stop()
    federation.start()
    assert nodes_online() == 2
    assert finished[0].name in {run["run-id"] for run in flwr("ls", "remote-deployment")["runs"]}


def test_a_site_with_privacy_stays_away_while_it_cannot_pay_for_the_run_and_pays_for_the_rounds_that_it_can(
    federation: Processes,
) -> None:
    """Rounds of two steps of 4 of 20 photos with noise 1: one costs 2.92 of epsilon, two 3.60; 3.2 was promised. The
    site trains half of the run's rank, too.
    """
    federation.stop_site("site-2")
    federation.pins["site-2"] = {"SITE_PRIVACY": "epsilon=3.2 noise=1 photos=20", "SITE_LIMITS": "rank=2"}
    federation.start_site("site-2")
    federation.wait_until_online(2)
    more = "sample-prompts='' min-sites=1 wait-for-sites=30 strategy='svd'"
    run = start_run(SMALL.replace("sample-prompts='a red poppy'", more))
    state, details = follow(run, lambda line: None)
    assert state == "finished:completed", details
    first, second = history(federation.fetch(run))["rounds"]
    [reason] = [refused["reason"] for refused in first["refused"] if refused["site"] == "site-2"]
    assert "TRUST-15 The site's privacy budget is spent." in reason
    assert list(first["sites"]) == ["site-1"] and list(second["sites"]) == ["site-1", "site-2"]
    paid = second["sites"]["site-2"]
    assert {name for name in paid if "loss" in name or "seconds" in name} == set()
    assert (paid["num-examples"], paid["dp-noise"], paid["rank"]) == (20, 1.0, 2)
    assert paid["dp-epsilon"] == pytest.approx(2.923, abs=1e-3) and "dp-epsilon" not in second["sites"]["site-1"]
    _, spent = map(json.loads, (federation.home / "cache/site-2/privacy.jsonl").read_text().splitlines())
    assert (spent["did"], spent["run"], spent["round"], spent["steps"]) == ("spent", run, 2, 2)


def test_a_supernode_that_got_one_bad_answer_ends_its_process(federation: Processes, broken_hub: BrokenHub) -> None:
    """Flower's own SuperNode lives on after an HTTP 500: its port open, its loop dead, offline for ever."""
    sh("scripts/certs spare", federation.certs.parent)
    federation.register()
    federation.sites["spare"] = federation.sites["site-1"]
    try:
        federation.start_site("spare", hub=f"127.0.0.1:{broken_hub.port}")
        federation.wait_until_online(3)
        broken_hub.broken.set()
        assert federation.running["spare"].wait(PATIENT) == 1
    finally:
        federation.stop_site("spare")
        del federation.sites["spare"]


class BrokenHub:
    """A TLS proxy before the real hub that answers 500 to everything once `broken` is set."""

    def __init__(self, certs: Path, hub_port: int) -> None:
        self.broken, outer = threading.Event(), self
        to_hub = ssl.create_default_context(cafile=str(certs / "ca.crt"))

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if outer.broken.is_set():
                    return self.send_error(500)
                hub = http.client.HTTPSConnection("127.0.0.1", hub_port, context=to_hub)
                hub.request("POST", self.path, body, dict(self.headers))
                answer = hub.getresponse()
                content = answer.read()
                hub.close()
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.headers["Content-Type"])
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: object) -> None:
                pass

        own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        own.load_cert_chain(certs / "superlink.crt", certs / "superlink.key")
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.socket = own.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_port


@pytest.fixture
def broken_hub(federation: Processes) -> Iterator[BrokenHub]:
    hub = BrokenHub(federation.certs, federation.port)
    thread = threading.Thread(target=hub.server.serve_forever)
    thread.start()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()
    thread.join()


# --- scripts/demo ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_project(tmp_path_factory.mktemp("demo") / "bouquet")


def pids(demo: Path) -> list[int]:
    file = demo / ".bouquet/state/pids.json"
    return list(json.loads(file.read_text()).values()) if file.is_file() else []


@pytest.mark.slow
def test_the_demo_goes_from_a_fresh_copy_to_the_adapter_and_stops_what_it_started(demo_project: Path) -> None:
    env = {"FLWR_HOME": str(demo_project.parent / "flwr"), "HUB_PORT": str(free_port())}
    shown = sh(f'scripts/demo --engine process --run-config "{SMALL}"', demo_project, **env).stdout
    [adapter] = [line.split()[1] for line in shown.splitlines() if line.startswith("adapter")]
    [picture] = [line.split()[1] for line in shown.splitlines() if line.startswith("picture")]
    assert (demo_project / adapter).is_file() and (demo_project / picture).is_file()
    assert "round 2/2" in shown and "ETA" in shown
    [report] = [line.removeprefix("next").strip() for line in shown.splitlines() if line.startswith("next")]
    sh(report, demo_project)
    assert (demo_project / picture).with_name("report.html").is_file()
    assert pids(demo_project) == []


@pytest.mark.slow
def test_ctrl_c_in_the_demo_stops_everything(demo_project: Path) -> None:
    env = os.environ | {"FLWR_HOME": str(demo_project.parent / "flwr"), "HUB_PORT": str(free_port())}
    command = [demo_project / "scripts/demo", "--engine", "process"]
    ours = {"start_new_session": True, "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    # also when the tests themselves ignore Ctrl-C
    demo = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, **ours)
    with demo:
        for line in demo.stdout:
            if "has started" in line:
                break
        started = pids(demo_project)
        os.killpg(demo.pid, signal.SIGINT)
        demo.stdout.read()
        assert demo.wait(PATIENT) == 130
    assert len(started) == 4 and not any(is_alive(pid) for pid in started)


def test_a_taken_port_is_named_before_anything_is_touched(tmp_path: Path) -> None:
    copy = copy_project(tmp_path / "bouquet")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = sh(
            "scripts/setup --engine process", copy, check=False, HUB_PORT=str(port), FLWR_HOME=str(tmp_path / "flwr")
        )
    assert done.returncode == 1
    assert done.stdout.splitlines()[:2] == [
        "HOST-04  The hub's port is taken.",
        f"  found  something else listens on 127.0.0.1:{port}",
    ]
    assert (
        not (copy / ".env").exists() and not (copy / ".bouquet").exists() and not list((copy / "certs").glob("*.key"))
    )
