"""What shows only with the CUDA build of torch: its packages, and whether the processes that a site forks could use a
GPU.

`scripts/test-cuda` runs this in its environment, `scripts/test-cuda --image` in containers of the image; elsewhere it
is skipped. Without a GPU torch already marks a process that could not use one (its "bad fork"); where there is one, it
is used as well.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import sh
from packaging.utils import canonicalize_name

from bouquet import ROOT
from bouquet.hub.deployment import Processes, free_port
from bouquet.hub.following import follow
from bouquet.hub.runs import connect, start_run
from tests.kit.nvml import A10, library
from tests.kit.wait import PATIENT

IMAGE = os.environ.get("BOUQUET_CUDA_IMAGE", "")
pytestmark = pytest.mark.skipif(not (IMAGE or torch.version.cuda), reason="torch has no CUDA here: scripts/test-cuda")
BOUQUET = Path("/opt/bouquet") if IMAGE else ROOT
HARDENED = (
    "--init --read-only --tmpfs=/tmp:mode=1777,size=512m --tmpfs=/cache:mode=1777 --cap-drop=ALL"
    " --security-opt=no-new-privileges:true --pids-limit=512 --network=none"
)
# of the variables that decide how torch looks for a GPU
OURS = ("PYTORCH_NVML_BASED_CUDA_CHECK", "CUDA_VISIBLE_DEVICES")
STATES = [
    {name: value for name, value in zip(OURS, (by_nvml, visible), strict=True) if value is not None}
    for by_nvml in (None, "0", "1")
    for visible in (None, "", "0")
]
SOURCE = (ROOT / "bouquet" / "flower" / "libraries.py").read_text()
SUPEREXECS = "superexec.server()"
CHILD = (
    "import json, sys, torch; loaded = sorted({'accelerate', 'diffusers', 'peft', 'app'} & set(sys.modules)); "
    "print(json.dumps([torch._C._cuda_isInBadFork(), loaded]), flush=True)"
)
SMALL = "rounds=2 local-steps=2 batch-size=4 lora-rank=4 validation-timesteps=1 sample-steps=2 sample-prompts=''"


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Python in this environment, or in a container as compose.yaml makes one; of OURS it has what `env` says and no
    other.
    """
    if IMAGE:
        gpus = ["--gpus=all"] if shutil.which("nvidia-smi") else []
        told = [f"--env={name}={value}" for name, value in env.items()]
        command = (
            "docker",
            "run",
            "--rm",
            *HARDENED.split(),
            *gpus,
            *told,
            "--workdir=/opt/bouquet",
            IMAGE,
            "python",
            *command,
        )
        env = {}
    else:
        command = (sys.executable, *command)
    inherited = {name: value for name, value in os.environ.items() if name not in OURS}
    return subprocess.run(command, env=inherited | env, cwd=ROOT, capture_output=True, text=True, timeout=PATIENT)


def say(code: str, **env: str) -> list:
    """What `code` prints, as JSON, a line each; it ends with 0."""
    done = run("-c", code, **env)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def forked(server: str, child: str, **env: str) -> list:
    """What a process says that a fork server starts: `server` is Python for the server's context."""
    code = (
        f"process = ({server}).Process(target=exec, args=({child!r}, {{}})); process.start(); process.join();"
        " sys.exit(process.exitcode)"
    )
    return say(
        f"import multiprocessing, sys; sys.path.insert(0, {str(BOUQUET)!r}); from bouquet.flower import superexec;"
        f" {code}",
        **env,
    )


@pytest.fixture(scope="module")
def gpus() -> int:
    return say("import torch; print(torch.cuda.device_count())")[0]


# --- the packages
# --------------------------------------------------------------------------------------------------------


def locked(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


@pytest.fixture(scope="module")
def installed() -> dict[str, str]:
    """Every package but pip, which comes with Python, and its version."""
    [found] = say(
        "import importlib.metadata as m, json; print(json.dumps({d.metadata['Name']: d.version for d in"
        " m.distributions()}))"
    )
    return {canonicalize_name(name): version for name, version in found.items() if name != "pip"}


def test_torch_is_the_cuda_build_of_the_locked_version(installed: dict[str, str]) -> None:
    [[version, cuda]] = say(
        "import json, torch; print(json.dumps([torch.__version__.split('+')[0], torch.version.cuda]))"
    )
    assert version == locked((ROOT / "constraints.txt").read_text())["torch"] and cuda
    assert installed["torch"] == version  # PyPI's own, not one of another index (2.13.0+cu126)


def test_every_package_is_locked_and_has_the_locked_version(installed: dict[str, str]) -> None:
    lock = locked((ROOT / "constraints.txt").read_text())
    assert {name: version for name, version in installed.items() if lock.get(name) != version} == {}


def test_what_is_locked_for_cuda_is_what_torch_brings_there_and_no_more(installed: dict[str, str]) -> None:
    general, cuda = (ROOT / "constraints.txt").read_text().split("\n# CUDA", 1)
    section = locked(cuda.partition("\n")[2])
    assert section.items() <= installed.items()
    [needed] = say("""import importlib.metadata as m, json, re
found, todo = set(), [("torch", "")]
while todo:
    name, extra = todo.pop()
    for text in m.requires(name) or ():
        from packaging.requirements import Requirement
        wanted = Requirement(text)
        if wanted.marker is None or wanted.marker.evaluate({"extra": extra}):
            new = [(wanted.name, other) for other in ("", *wanted.extras) if (wanted.name, other) not in found]
            found.update(new)
            todo += new
print(json.dumps(sorted({name for name, _ in found})))""")
    assert section.keys() == {canonicalize_name(name) for name in needed} - locked(general).keys()


def test_everything_that_the_roles_import_can_be_imported() -> None:
    done = run("-W", "ignore", "-c", (ROOT / "docker" / "warm.py").read_text())
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_library_of_torchs_finds_the_ones_it_is_linked_to() -> None:
    """The image leaves some out. What the driver (libcuda) or a network card would bring may be missing."""
    [missing] = say("""import ctypes, glob, json, os, torch
missing, site = {}, os.path.dirname(os.path.dirname(torch.__file__))
for file in glob.glob(f"{site}/torch/lib/*.so*") + glob.glob(f"{site}/nvidia/cu*/lib/*.so*"):
    try:
        ctypes.CDLL(file)
    except OSError as error:
        missing[os.path.basename(file)] = str(error)
print(json.dumps(missing))""")
    assert {file: why for file, why in missing.items() if not re.match(r"(libcuda|libmlx5|librdmacm)\.so", why)} == {}


def test_the_preflight_of_a_site_without_a_gpu_looks_at_all_that_is_here(tmp_path: Path) -> None:
    """The base model, the photos, the memory; its hub is not there."""
    models, cache = ("/models", "/cache") if IMAGE else (str(ROOT / "models"), str(tmp_path))
    places = {"BOUQUET_MODELS": models, "BOUQUET_DATA": f"{models}/mini", "BOUQUET_CACHE": cache}
    done = run(
        "-m",
        "bouquet",
        "site",
        "check",
        "--fast",
        "--json",
        SITE_NAME="rose",
        SITE_GPU="none",
        CUDA_VISIBLE_DEVICES="",
        **places,
    )
    states = {line["name"]: line["state"] for line in json.loads(done.stdout)["checks"]}
    assert states["memory"] in ("pass", "warn") and states["disk"] in ("pass", "warn"), done.stdout
    assert {name: state for name, state in states.items() if name not in ("memory", "disk")} == {
        "name": "pass", "gpu": "pass", "driver": "skip", "others": "skip", "hub": "fail", "clock": "skip",
        "key": "skip", "model": "warn", "data": "pass",
    }, done.stdout  # fmt: skip


# --- the forks
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "state",
    STATES,
    ids=lambda state: " ".join(f"{name[0]}={value!r}" for name, value in state.items()) or "nothing set",
)
def test_a_message_could_use_the_gpu_whatever_the_sites_environment_says(state: dict[str, str]) -> None:
    assert forked(SUPEREXECS, CHILD, **state) == [[False, ["accelerate", "diffusers", "peft"]]]


@pytest.mark.skipif(bool(IMAGE), reason="the stand-in of NVIDIA's library is made for this machine")
def test_a_message_could_use_the_gpu_where_the_libraries_see_one_while_they_are_imported(tmp_path: Path) -> None:
    """What they do with a GPU that is there must not ask CUDA either; NVIDIA's library is tests/kit/nvml_stub.c."""
    (tmp_path / "state").write_text(f"580.95.05 13000\n{A10}\n")
    driver = {"LD_LIBRARY_PATH": str(library().parent), "NVML_STATE": str(tmp_path / "state")}
    shown = forked(
        SUPEREXECS, CHILD + "; from bouquet.flower import libraries; print(libraries.gpus_by_nvml())", **driver
    )
    assert shown == [[False, ["accelerate", "diffusers", "peft"]], 1]


@pytest.mark.parametrize("state", [{}, {OURS[0]: "0"}], ids=["nothing set", "P='0'"])
def test_a_server_that_imports_the_same_plainly_makes_processes_that_could_not(state: dict[str, str]) -> None:
    """What the tests above would show, were it not for libraries.py."""
    names = re.search(r"^LIBRARIES = (\[.*\])$", SOURCE, re.MULTILINE)[1]
    shown = forked(
        f"(fork := multiprocessing.get_context('forkserver')).set_forkserver_preload({names}) or fork", CHILD, **state
    )
    assert shown == [[True, ["accelerate", "diffusers", "peft"]]]


def test_the_server_itself_notices_a_library_that_asked_cuda() -> None:
    plain = SOURCE.replace("\nwith uncollected(), gpu_asked_by_nvml(), ", "\nwith ")
    assert plain != SOURCE
    done = run("-c", plain)
    assert done.returncode == 1 and "RuntimeError: GPU-07  A message's process could not use the GPU." in done.stderr


def test_a_message_uses_the_gpu(gpus: int) -> None:
    if not gpus:
        pytest.skip("no NVIDIA GPU here")
    child = (
        "import json, torch as t; print(json.dumps([t.cuda.is_initialized(), t.ones(3, device='cuda').sum().item()]),"
        " flush=True)"
    )
    assert forked(SUPEREXECS, child) == [[False, 3.0]]


# --- a deployment
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(bool(IMAGE), reason="a deployment of processes: it runs in .venv-cuda")
def test_a_run_of_two_sites_completes(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int
) -> None:
    """SuperLink, ServerApp and two SuperNodes of this environment; their messages on the GPU where there is one."""
    sh("scripts/certs && scripts/bouquet data partition --dataset mini --sites 2 --images-per-site 24", project)
    sites = {name: project / ".bouquet/data" / name for name in ("site-1", "site-2")}
    running, lines = Processes(tmp_path / "home", project / "certs", free_port(), sites), list[str]()
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "operator"))
    connect(running.address, project / "certs/ca.crt")
    try:
        running.start()
        run_id = start_run(SMALL)
        state, details = follow(run_id, lines.append)
        logs = {name: (running.logs / f"{name}.log").read_text() for name in sites}
        assert state == "finished:completed", (details, lines, logs)
        rounds = json.loads((running.fetch(run_id) / "history.json").read_text())["rounds"]
    finally:
        running.stop()
    assert [set(entry["sites"]) for entry in rounds] == [{"site-1", "site-2"}] * 2
    assert not [text for text in logs.values() if re.search(r"bad fork|in forked subprocess|CUDA error", text)]
    if gpus:
        assert "no GPU" not in json.dumps(rounds)
