"""docker/install asks pip for the right one of torch's two builds; with a real pip, small wheels in a folder, and no
network.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bouquet import ROOT

CPU, CUDA = "2.13.0+cpu", "2.13.0"
LOCK = (
    "packaging==25.0\nnvidia-ml-py==13.615.71\ntorch==2.13.0\n\n# CUDA: what that build brings besides\ntriton==3.7.1\n"
)
PYPROJECT = (
    '[project]\ndependencies = ["torch==2.13.0", "nvidia-ml-py==13.615.71"]\n[project.optional-dependencies]\ntest ='
    " []\n"
)


def wheel(folder: Path, name: str, version: str, requires: str = "", source: str = "") -> None:
    """A package of one module."""
    stem, info = f"{name}-{version}", f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.py", source)
        needs = f"Requires-Dist: {requires}\n" if requires else ""
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")


def torch(folder: Path, version: str, cuda: str | None) -> None:
    source = f"from types import SimpleNamespace\n__version__ = {version!r}\nversion = SimpleNamespace(cuda={cuda!r})\n"
    wheel(folder, "torch", version, "triton" if cuda else "", source)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with pip, whose files are linked into each host's: pip takes files away and puts others."""
    venv = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    return venv


class Host:
    """A project with docker/install, a fresh environment, and the folder in which pip looks; both builds of torch lie
    there.
    """

    def __init__(self, folder: Path, bare: Path) -> None:
        self.folder, self.venv, self.wheels = folder, folder / "venv", folder / "found"
        self.wheels.mkdir()
        shutil.copytree(bare, self.venv, symlinks=True, copy_function=os.link)
        shutil.copy(ROOT / "docker" / "install", folder / "install")
        (folder / "warm.py").write_text("import torch\n")
        (folder / "constraints.txt").write_text(LOCK)
        (folder / "pyproject.toml").write_text(PYPROJECT)
        for name, version in (("nvidia_ml_py", "13.615.71"), ("triton", "3.7.1"), ("triton", "3.8.0")):
            wheel(self.wheels, name, version)
        torch(self.wheels, CPU, None)
        torch(self.wheels, CUDA, "13.0")

    def install(self, build: str) -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
        env |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels), "PIP_CONFIG_FILE": os.devnull}
        return subprocess.run(
            ["./install", "venv", build, "test"], cwd=self.folder, env=env, capture_output=True, text=True
        )

    def packages(self) -> dict[str, str]:
        """What is installed now, without what Python brings."""
        code = (
            "import importlib.metadata as m; print(*(d.metadata['Name'] + '=' + d.version for d in m.distributions()))"
        )
        pairs = (word.split("=") for word in self.run("-c", code).split())
        return {name: version for name, version in pairs if name not in ("pip", "setuptools")}

    def run(self, *args: str) -> str:
        command = [self.venv / "bin/python", *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def host(tmp_path: Path, bare: Path) -> Host:
    return Host(tmp_path, bare)


HAS = {
    "cpu": {"torch": CPU, "nvidia_ml_py": "13.615.71"},
    "cuda": {"torch": CUDA, "nvidia_ml_py": "13.615.71", "triton": "3.7.1"},
}


@pytest.mark.slow
@pytest.mark.parametrize("build", HAS)
def test_the_build_that_was_asked_for_is_installed_though_the_other_lies_beside_it(host: Host, build: str) -> None:
    done = host.install(build)
    assert done.returncode == 0, done.stderr
    assert host.packages() == HAS[build]


@pytest.mark.parametrize(("before", "after"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_an_environment_with_the_other_build_is_changed_and_keeps_nothing_of_it(
    host: Host, before: str, after: str
) -> None:
    host.install(before)
    assert host.packages() == HAS[before]
    done = host.install(after)
    assert done.returncode == 0, done.stderr
    assert host.packages() == HAS[after]


@pytest.mark.parametrize("build", HAS)
def test_an_older_torch_is_exchanged_for_the_same_build_of_the_locked_one(host: Host, build: str) -> None:
    torch(host.wheels, "2.12.0" + ("+cpu" if build == "cpu" else ""), "12.8" if build == "cuda" else None)
    lock = host.folder / "constraints.txt"
    for version in ("2.12.0", "2.13.0"):
        for file, text in ((lock, LOCK), (host.folder / "pyproject.toml", PYPROJECT)):
            file.write_text(text.replace("2.13.0", version))
        assert host.install(build).returncode == 0
    assert host.packages() == HAS[build]


@pytest.mark.parametrize("build", HAS)
def test_a_second_time_nothing_is_done(host: Host, build: str) -> None:
    host.install(build)
    shutil.rmtree(host.wheels)
    done = host.install(build)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_package_that_was_cut_off_while_it_was_copied_is_copied_again(host: Host) -> None:
    """pip asks METADATA what is there; a kill may leave that without the module, and never RECORD, which comes last."""
    host.install("cpu")
    [info] = host.venv.glob("lib/python3*/site-packages/nvidia_ml_py-*.dist-info")
    (info / "RECORD").unlink()
    module = info.with_name("nvidia_ml_py.py")
    module.unlink()
    assert (
        host.install("cpu").returncode == 0
        and module.exists()
        and (info / "RECORD").exists()
        and host.packages() == HAS["cpu"]
    )


def test_without_a_cuda_build_nothing_is_installed_and_a_person_is_told(host: Host) -> None:
    (host.wheels / f"torch-{CUDA}-py3-none-any.whl").unlink()
    done = host.install("cuda")
    assert done.returncode == 1 and host.packages() == {}
    assert "HOST-13  torch is not the build that was asked for.\n  found  pip has no torch===2.13.0" in done.stderr


def test_a_build_of_that_version_without_cuda_is_refused(host: Host) -> None:
    """As for a machine for which PyPI's build has none."""
    torch(host.wheels, CUDA, None)
    done = host.install("cuda")
    assert done.returncode == 1
    assert (
        "HOST-13  torch is not the build that was asked for.\n  found  cpu 2.13.0, where CUDA was asked for"
        in done.stderr
    )


def test_without_a_cpu_build_the_default_one_serves_and_it_is_said(host: Host) -> None:
    (host.wheels / f"torch-{CPU}-py3-none-any.whl").unlink()
    for _ in range(2):
        done = host.install("cpu")
        assert done.returncode == 0 and "no CPU build of torch 2.13.0 found" in done.stderr
        assert host.packages() == HAS["cuda"]


def test_a_build_that_does_not_exist_is_refused(host: Host) -> None:
    done = host.install("CUDA")
    assert done.returncode == 1 and "HOST-13" in done.stderr and "TORCH=cpu or TORCH=cuda" in done.stderr


def test_what_the_roles_import_is_compiled_whatever_the_environment_says(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    host.install("cpu")
    assert list(host.venv.glob("lib/python3*/site-packages/__pycache__/torch.*.pyc"))


def pip_of(host: Host) -> str:
    return host.run("-m", "pip", "--version").split()[1]


@pytest.mark.slow
def test_the_locks_pip_takes_the_place_of_the_one_that_python_brings_once(host: Host) -> None:
    """A wheel of the very pip that is here, under the number 99.0."""
    (host.folder / "constraints.txt").write_text(f"pip==99.0\n{LOCK}")
    [module] = host.venv.glob("lib/python3*/site-packages/pip")
    [info] = module.parent.glob("pip-*.dist-info")
    version = pip_of(host)
    with zipfile.ZipFile(host.wheels / "pip-99.0-py3-none-any.whl", "w") as archive:
        for file in module.rglob("*.py*"):
            if file.suffix != ".pyc" and file != module / "__init__.py":
                archive.write(file, file.relative_to(module.parent))
        for part in ("WHEEL", "entry_points.txt", "METADATA"):
            told = (info / part).read_text().replace(f"\nVersion: {version}\n", "\nVersion: 99.0\n")
            archive.writestr(f"pip-99.0.dist-info/{part}", told)
        archive.writestr("pip-99.0.dist-info/RECORD", "")
        archive.writestr("pip/__init__.py", '__version__ = "99.0"\n')
    for _ in range(2):  # the second time nobody asks for it
        done = host.install("cpu")
        assert (done.returncode, done.stderr) == (0, "") and host.packages() == HAS["cpu"]
        assert pip_of(host) == "99.0"
        shutil.rmtree(host.wheels, ignore_errors=True)


def test_where_the_locks_pip_is_not_found_the_one_that_is_here_does_it_and_says_so(host: Host) -> None:
    (host.folder / "constraints.txt").write_text(f"pip==99.0\n{LOCK}")
    done = host.install("cpu")
    assert done.returncode == 0 and host.packages() == HAS["cpu"]
    assert done.stderr == "install: no pip 99.0 found; going on with the one that is here\n"


def test_the_lock_names_every_package_once_at_one_version() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(line.count("==") == 1 and " " not in line for line in lines)
    names = [line.split("==")[0].lower().replace("_", "-") for line in lines]
    assert len(names) == len(set(names))
