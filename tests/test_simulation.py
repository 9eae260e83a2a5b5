"""The same app in Flower's local simulation: a SuperLink that `flwr run` starts itself, and sites as Ray actors.

Needs the extra `simulation` (`docker/install .venv cpu simulation`); without Ray the runs are skipped and say so.
The base model is tests/kit/tiny.py's, the photos are drawn by `bouquet data partition` as in the README.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from conftest import sh
from flwr.app import Context, RecordDict

from app import model
from app.adapter.store import read_adapter
from app.config import RunConfig
from app.errors import SiteError
from app.site import train
from app.site.client_app import places
from app.site.privacy import Secret
from bouquet import ROOT
from bouquet.hub.deployment import free_port
from tests.kit import tiny
from tests.kit.wait import PATIENT

BIN = Path(sys.executable).parent
RUN = {
    "base-model": "tiny", "resolution": 16, "rounds": 2, "local-steps": 2, "batch-size": 4, "lora-rank": 2,
    "validation-fraction": 0.25, "validation-timesteps": 1, "sample-prompts": "",
}  # fmt: skip
IMAGES = (12, 8)  # site-1's and site-2's photos, so that they weigh differently
STOP = "flower-superlink --insecure --simulation"  # the README's pattern for pkill
NO_RAY = "" if importlib.util.find_spec("ray") else "Ray is not installed: docker/install .venv cpu simulation"


@dataclass
class Simulation:
    """A FLWR_HOME, a port and the four folders of the README's simulation."""

    home: Path
    env: dict[str, str]
    port: int

    @property
    def adapters(self) -> Path:
        return Path(self.env["BOUQUET_ADAPTERS"])

    def flwr(self, *args: str) -> dict:
        done = subprocess.run(
            [BIN / "flwr", *args, "--format", "json"], cwd=ROOT, env=self.env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout[done.stdout.index("{") :])

    def run(self, **changes: object) -> tuple[str, str, str]:
        """(run id, state, details) of a run that has ended."""
        config = " ".join(f"{key}={json.dumps(value)}" for key, value in (RUN | changes).items())
        run_id = self.flwr("run", str(ROOT), "local", "--run-config", config)["run-id"]
        end = time.monotonic() + PATIENT
        while True:
            run = self.flwr("ls", "local", "--run-id", run_id)["runs"][0]
            if run["status"].startswith("finished") or time.monotonic() > end:
                return run_id, run["status"], run["status-details"]
            time.sleep(1)

    def superlink(self) -> psutil.Process | None:
        """The SuperLink that `flwr run` left behind, known by its port."""
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if any(part.endswith("flower-superlink") for part in line[:2]) and str(self.port) in line:
                return process
        return None

    def stop(self) -> list[psutil.Process]:
        """End the SuperLink by its pid, wait for all it started; those that are left after 15 s."""
        if not (superlink := self.superlink()):
            return []
        processes = [superlink, *superlink.children(recursive=True)]
        superlink.terminate()
        return psutil.wait_procs(processes, timeout=15)[1]


@pytest.fixture(scope="module")
def simulation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulation]:
    if NO_RAY:
        pytest.skip(NO_RAY)
    home, port = tmp_path_factory.mktemp("simulation"), free_port()
    ray_home = tempfile.mkdtemp(prefix="ray-")  # short: Ray puts Unix sockets below it
    (home / "adapters").mkdir()
    for number, count in enumerate(IMAGES, 1):
        drawn = home / f"drawn-{number}"
        sh(f"scripts/bouquet data partition --dataset mini --sites 2 --images-per-site {count} --out {drawn}", ROOT)
        shutil.move(drawn / f"site-{number}", home / f"data/site-{number}")
    env = os.environ | {
        "PATH": f"{BIN}:{os.environ['PATH']}", "FLWR_HOME": str(home / "flwr"), "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port), "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
        "RAY_TMPDIR": ray_home, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1",
        "BOUQUET_DATA": str(home / "data"), "BOUQUET_MODELS": str(tiny.models()), "BOUQUET_CACHE": str(home / "cache"),
        "BOUQUET_ADAPTERS": str(home / "adapters"),
    }  # fmt: skip
    running = Simulation(home, env, port)
    try:
        yield running
    finally:
        for process in running.stop():
            process.kill()
        shutil.rmtree(ray_home, ignore_errors=True)


@pytest.fixture(scope="module")
def finished(simulation: Simulation) -> Path:
    """The folder of one small run that has ended well."""
    run_id, state, details = simulation.run()
    assert state == "finished:completed", details
    return simulation.adapters / run_id


def trained_here(folder: Path, work: Path, number: int, start: model.Adapter) -> dict[str, tuple[int, model.Adapter]]:
    """Each site's images and adapter after round `number`, trained in this process instead of in a Ray actor."""
    config, trained = RunConfig.read(RUN), {}
    for name in ("site-1", "site-2"):
        site = train.Site(config, tiny.models(), folder / name, work / name, "")
        model.apply_adapter(site.net, start)
        site.fit(site.privacy.seed(config.seed, name, number), number)
        trained[name] = len(site.train.keys), model.adapter_of(site.net)
    return trained


@pytest.mark.slow
def test_the_app_runs_in_simulation_as_it_is(finished: Path) -> None:
    files = {str(file.relative_to(finished)) for file in finished.rglob("*") if file.is_file()}
    assert {
        "round-0001/adapter_model.safetensors",
        "round-0002/adapter_model.safetensors",
        "final/provenance.json",
        "history.json",
    } <= files
    assert (finished.parent / "latest").resolve() == finished
    assert set(json.loads((finished / "final/provenance.json").read_text())["sites"]) == {"site-1", "site-2"}


@pytest.mark.slow
def test_its_rounds_are_the_weighted_means_of_what_each_site_trains(
    simulation: Simulation, finished: Path, tmp_path: Path
) -> None:
    """Each site's share is its part of the training photos. Within 1e-6 of weights about 1e-2: float32, summed in
    another order.
    """
    start, threads = model.new_adapter(tiny.base(), RunConfig.read(RUN)), torch.get_num_threads()
    torch.set_num_threads(1)  # as the actors have: more threads sum in another order
    try:
        for number in (1, 2):
            sites = trained_here(simulation.home / "data", tmp_path, number, start)
            (one, first), (two, second) = sites.values()
            noted = json.loads((finished / f"round-{number:04d}/metrics.json").read_text())["sites"]
            assert (noted["site-1"]["num-examples"], noted["site-2"]["num-examples"]) == (one, two) and one > two
            after = read_adapter(finished / f"round-{number:04d}")
            assert after.keys() == first.keys()
            for key, value in after.items():
                torch.testing.assert_close(
                    value, (first[key] * one + second[key] * two) / (one + two), rtol=0, atol=1e-6
                )
            # so that a plain mean would differ
            assert max((first[key] - second[key]).abs().max() for key in first) > 1e-3
            start = after
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_round_two_starts_from_round_ones_aggregate(finished: Path) -> None:
    first, second = json.loads((finished / "history.json").read_text())["rounds"]
    assert second["started_from"] == first["adapter"] == model.adapter_hash(read_adapter(finished / "round-0001"))
    assert second["adapter"] != first["adapter"]


@pytest.mark.slow
def test_a_simulation_with_too_few_sites_fails_by_name(simulation: Simulation) -> None:
    run_id, state, details = simulation.run(**{"min-sites": 3, "wait-for-sites": 2})
    assert state == "finished:failed" and "HUB-01" in details
    assert json.loads((simulation.adapters / run_id / "history.json").read_text())["state"] == "failed"


@pytest.mark.slow
def test_nothing_runs_on_after_the_local_superlink_is_stopped_by_its_pid(
    simulation: Simulation, finished: Path
) -> None:
    """`flwr run` leaves a SuperLink behind; the README's command to stop it finds that very process."""
    superlink = simulation.superlink()
    assert superlink and superlink.environ()["BOUQUET_DATA"] == simulation.env["BOUQUET_DATA"]
    found = subprocess.run(["pgrep", "-f", STOP], capture_output=True, text=True).stdout.split()
    assert str(superlink.pid) in found
    assert simulation.stop() == []
    assert simulation.superlink() is None


# --- what a simulated site is told; needs no Ray --------------------------------------------------------------------


def simulated(partition: int) -> Context:
    return Context(
        run_id=1,
        node_id=2,
        node_config={"partition-id": partition, "num-partitions": 2},
        state=RecordDict(),
        run_config={},
    )


def test_a_simulated_site_finds_its_own_folders_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATA", "MODELS", "CACHE"):
        monkeypatch.setenv(f"BOUQUET_{name}", f"/{name.lower()}")
    assert places(simulated(0)) == ("site-1", Path("/data/site-1"), Path("/models"), Path("/cache/site-1"), Secret.NONE)
    assert places(simulated(1)) == ("site-2", Path("/data/site-2"), Path("/models"), Path("/cache/site-2"), Secret.NONE)


@pytest.mark.parametrize("missing", ["DATA", "MODELS", "CACHE"])
def test_a_simulated_site_that_lacks_a_folder_says_which_to_set(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATA", "MODELS", "CACHE"):
        monkeypatch.setenv(f"BOUQUET_{name}", f"/{name.lower()}")
    monkeypatch.delenv(f"BOUQUET_{missing}")
    with pytest.raises(SiteError, match="SITE-12") as refused:
        places(simulated(0))
    assert f"BOUQUET_{missing}" in refused.value.report()
