"""A stand-in for the NVIDIA driver's library (nvml_stub.c), put where nvidia-ml-py keeps the library that it has
loaded.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pynvml
import pytest

A10 = "GPU-aaaa1111-0000-0000-0000-000000000001 24576 24000 40 1000000 - NVIDIA A10"
T4 = "GPU-bbbb2222-0000-0000-0000-000000000002 15360 15000 5 700 - Tesla T4"


@functools.cache
def library() -> Path:
    """The compiled stand-in, named as NVIDIA names its own; skips where there is no C compiler."""
    if not (compiler := shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")):
        pytest.skip("no C compiler for the stand-in of libnvidia-ml")
    folder = Path(tempfile.mkdtemp(prefix="bouquet-nvml-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    built = folder / "libnvidia-ml.so.1"
    source = Path(__file__).with_name("nvml_stub.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", built, source], check=True)
    return built


class StandIn:
    """The driver and GPUs of one test: `state(driver, gpu, …)` in the words of nvml_stub.c; none at all before that."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.file = folder / "nvml.txt"
        patch.setenv("NVML_STATE", str(self.file))
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        patch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(library())))
        patch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})

    def state(self, *gpus: str, driver: str = "580.95.05 13000") -> None:
        new = self.file.with_suffix(".new")
        new.write_text("\n".join((driver, *gpus)) + "\n")
        new.replace(self.file)  # at once: a meter may be looking


def gpu(
    uuid: str = "GPU-aaaa1111",
    total: int = 24576,
    free: int = 24000,
    busy: int = 0,
    energy: int = 0,
    processes: str = "-",
) -> str:
    """A line of the stand-in's state: MiB, percent, millijoules, pid:MiB,…"""
    return f"{uuid} {total} {free} {busy} {energy} {processes} NVIDIA A10"
