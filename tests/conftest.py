"""Shared parts of the tests: a copy of the project with its own certificates and data, and whether Docker is here.

BOUQUET_REQUIRE_DOCKER=1 turns "skipped, no Docker Engine" into a failure; .ci/run sets it.
With `-n` (pytest-xdist; scripts/test gives it) a file is worked on by one process, which makes the file's deployment
once; the files that share an image are worked on by one of them. The groups that take longest begin first.
A test that needs its file's deployment is slow, as is whatever is marked so: what takes a core three seconds or more.
"""

from __future__ import annotations

import gc
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bouquet.hub.deployment import clone as copy_project  # noqa: F401 (the tests' name for it)

DOCKER = ("test_join_compose", "test_access", "test_compose")  # the second attacks the image that the first builds
TOGETHER = dict.fromkeys(DOCKER[:2], "docker")  # the third builds what it needs, and takes as long as both
ALONE = {  # tests that share nothing with their file, and take as long as another file
    "test_in_containers_docker_starts_a_killed_superlink_again_and_the_run_ends_as_if_nothing_had_been": "containers",
    "test_the_comparison_runs_all_three_on_a_real_deployment_and_draws_its_bars": "comparison",
    "test_the_demo_goes_from_a_fresh_copy_to_the_adapter_and_stops_what_it_started": "demo",
    "test_ctrl_c_in_the_demo_stops_everything": "demo",
}
LONGEST = (
    *("test_faults", "test_bench", "test_federation", "docker", "test_compose", "containers", "comparison"),
    *("test_trust", "test_accept", "test_join", "test_publish", "demo", "test_learning", "test_parity"),
)
DEPLOYMENTS = {  # the fixture of a file that starts a hub, or more
    **dict.fromkeys(("test_federation", "test_trust", "test_preflight"), "federation"),
    **dict.fromkeys(("test_join", "test_superlink"), "hub"),
    **dict.fromkeys((*DOCKER, "test_faults"), "docker"),
    "test_simulation": "simulation",
}
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # else each would compute with every core; before any torch
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))


def group(nodeid: str) -> str:
    """What is worked on by one process, by the name of a test and of its file."""
    file, _, test = nodeid.partition("::")
    name = Path(file).stem
    return ALONE.get(test.partition("[")[0]) or TOGETHER.get(name, name)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, whose own groups by mark take no effect with pytest 9.2
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    return Groups(config, log)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {DEPLOYMENTS.get(item.path.stem), "bench"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")

    def place(item: pytest.Item) -> tuple[int, int]:
        name, of = item.path.stem, group(item.nodeid)
        return LONGEST.index(of) if of in LONGEST else len(LONGEST), DOCKER.index(name) if name in DOCKER else 0

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """A process of tests has torch's, diffusers' and thousands of tests' objects, none of which is garbage: looking
    through all of them again and again, as the product's own gc.collect() does too, takes a fifth of the suite's time.
    """
    gc.freeze()


def sh(command: str, cwd: Path, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """A shell command with both outputs in .stdout; a failing one fails the test with its last words."""
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=cwd,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0 or not check, f"{command}\n{done.stdout[-3000:]}"
    return done


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh copy of the project, as a newcomer has it: no .env, no certificates, no data."""
    return copy_project(tmp_path_factory.mktemp("project") / "bouquet")


@pytest.fixture(scope="session")
def docker() -> None:
    """Skips where no Docker Engine with Compose answers."""
    try:
        done = subprocess.run(
            "docker info && docker compose version", shell=True, capture_output=True, text=True, timeout=60
        )
        why = "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]
    except subprocess.TimeoutExpired:
        why = "docker info takes longer than 60 s"
    if why and os.environ.get("BOUQUET_REQUIRE_DOCKER"):
        pytest.fail(f"BOUQUET_REQUIRE_DOCKER is set and no Docker Engine answers: {why}")
    if why:
        pytest.skip(f"no Docker Engine answers: {why}")


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium, as benchmarks/browser.py has it; skips where there is none."""
    from benchmarks import browser as browser_

    if not browser_.find():
        if os.environ.get("BOUQUET_REQUIRE_BROWSER"):
            pytest.fail("BOUQUET_REQUIRE_BROWSER is set and there is no Chromium")
        pytest.skip("no Chromium here; Debian: apt install chromium")
    with browser_.Browser() as running:
        yield running


@pytest.fixture
def federation(tmp_path):
    """A hub and two sites in one process, ready for one round of one step."""
    from tests.kit.memory import Federation

    return Federation(tmp_path, rounds=1, local_steps=1, sample_prompts="")


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """One whole run of two rounds at two sites with its pictures: (federation, its folder)."""
    from tests.kit.memory import Federation

    federation = Federation(tmp_path_factory.mktemp("federation"))
    with pytest.MonkeyPatch.context() as patch:
        return federation, federation.go(patch)


@pytest.fixture(scope="session")
def final(tmp_path_factory) -> Path:
    """A run's folder with the app's own final files of a small adapter."""
    from app.adapter import formats
    from app.families import sd
    from app.hub.history import Provenance
    from tests.kit import tiny

    run = tmp_path_factory.mktemp("final")
    formats.write_final(run, tiny.adapter(1), tiny.CONFIG, sd.FAMILY, Provenance(adapter_sha256="0" * 64))
    return run
