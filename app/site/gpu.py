"""An NVIDIA GPU through nvidia-ml-py: which one a site has, whether it is free, and what a round cost on it.

Enters: the driver's library, CUDA_VISIBLE_DEVICES, and the site's pin (SITE_GPU). Leaves: `Device`, `Driver`, and a
`Meter`'s numbers, which may leave the site together with the GPU's name. Without NVIDIA: NO_GPU, and the work goes on.
MIG slices are not told apart: NVML counts whole GPUs.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pynvml

from app.errors import BouquetError

NO_GPU = "no GPU"
# an index, a UUID, or what NVIDIA's own images say (NVIDIA_VISIBLE_DEVICES=all)
PIN = re.compile(r"\d+|(GPU|MIG)-[\w/-]+|all|")
MIB = 2**20


class GpuError(BouquetError):
    """The GPU is not the pinned one or not one, its driver is too old, or its memory too small (GPU-..)."""


@dataclass(frozen=True)
class Driver:
    """`version` is the driver's own; `cuda` the newest CUDA that it runs: (12, 8)."""

    version: str
    cuda: tuple[int, int]


@dataclass(frozen=True)
class Device:
    """One GPU: memory in bytes; `processes` maps the ids of those that compute on it to their bytes."""

    uuid: str
    name: str
    total: int
    free: int
    processes: dict[int, int]


@contextmanager
def _nvml() -> Iterator[None]:
    """The driver's library, opened. Errors: pynvml.NVMLError."""
    pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


def devices() -> tuple[Driver, list[Device]]:
    """The driver, and every GPU that CUDA may use here. Errors: GPU-01."""
    try:
        with _nvml():
            cuda = pynvml.nvmlSystemGetCudaDriverVersion()
            driver = Driver(pynvml.nvmlSystemGetDriverVersion(), (cuda // 1000, cuda % 1000 // 10))
            return driver, [_device(handle) for handle in _handles()]
    except pynvml.NVMLError as error:
        raise GpuError(
            "GPU-01",
            found=str(error),
            fix=(
                "on the host: does nvidia-smi work? In a container: install nvidia-container-toolkit, run "
                "nvidia-ctk runtime configure --runtime=docker, restart Docker. To train on the CPU: SITE_GPU=none"
            ),
        ) from None


def _handles() -> list[Any]:
    """NVML's handles of the GPUs that CUDA may use, in NVML's order (that of CUDA_DEVICE_ORDER=PCI_BUS_ID)."""
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    chosen = visible([pynvml.nvmlDeviceGetUUID(handle) for handle in handles], os.environ)
    return [handles[index] for index in chosen]


def visible(uuids: list[str], env: Mapping[str, str]) -> list[int]:
    """Which of NVML's GPUs CUDA_VISIBLE_DEVICES leaves: NVML itself does not heed it. CUDA stops at the first unknown
    one.
    """
    if "CUDA_VISIBLE_DEVICES" not in env:
        return list(range(len(uuids)))
    chosen = []
    for word in env["CUDA_VISIBLE_DEVICES"].split(","):
        word = word.strip()
        found = [
            i for i, uuid in enumerate(uuids) if word == str(i) or (word.startswith("GPU-") and uuid.startswith(word))
        ]
        if not found:
            break
        chosen.append(found[0])
    return chosen


def _device(handle: Any) -> Device:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    processes = _or_none(pynvml.nvmlDeviceGetComputeRunningProcesses, handle) or []
    return Device(
        pynvml.nvmlDeviceGetUUID(handle),
        pynvml.nvmlDeviceGetName(handle),
        memory.total,
        memory.free,
        {process.pid: process.usedGpuMemory or 0 for process in processes},
    )


def _or_none(read: Callable[[Any], Any], handle: Any) -> Any:
    """What a GPU says of itself; None where it cannot."""
    try:
        return read(handle)
    except pynvml.NVMLError:
        return None


def check_pin(pin: str) -> None:
    """A pin names one GPU: several would take a process group in a worker that must survive a kill, halve its batch
    when the memory is too small and resume bit for bit, for what one site a GPU has without it. Errors: GPU-06.
    """
    if re.search(r"[,;\s]", pin.strip()):
        raise GpuError(
            "GPU-06",
            found=f"SITE_GPU={pin}",
            fix=(
                "one SuperNode a GPU: at the hub's host scripts/add-site, with a kit one invitation and one folder of"
                " photos for each"
            ),
        )


def pinned(pin: str, found: list[Device]) -> Device:
    """The one GPU that is visible, when it is the one that the site pinned (an index or a UUID). Errors: GPU-02,
    GPU-03.
    """
    shown = ", ".join(f"{device.name} {device.uuid}" for device in found) or "none"
    other = pin.startswith("GPU-") and not any(device.uuid.startswith(pin) for device in found)
    if not found or not PIN.fullmatch(pin.strip()) or other:
        raise GpuError(
            "GPU-02",
            found=f"SITE_GPU={pin}; visible: {shown}",
            fix="nvidia-smi -L on the host lists the GPUs: set SITE_GPU to one of their UUIDs",
        )
    if len(found) > 1:
        raise GpuError(
            "GPU-03",
            found=f"SITE_GPU={pin or '(not set)'}; visible: {shown}",
            fix=(
                "set SITE_GPU to one UUID and start the site through its Compose file, or without Docker:"
                " CUDA_VISIBLE_DEVICES=UUID"
            ),
        )
    return found[0]


def check_driver(driver: Driver, built_for: str | None) -> str:
    """'' when the driver runs what torch was built for ("12.8"), a remark when only just. Errors: GPU-04.

    Within one major version of CUDA an older driver runs newer code, but not all of it (what is compiled on the spot).
    Source: NVIDIA, CUDA Compatibility, "Minor Version Compatibility".
    """
    has = "{}.{}".format(*driver.cuda)
    if not built_for or driver.cuda[0] < int(built_for.split(".")[0]):
        raise GpuError(
            "GPU-04",
            found=(
                f"driver {driver.version} runs CUDA up to {has}; this torch is built for"
                f" {f'CUDA {built_for}' if built_for else 'the CPU'}"
            ),
            fix=(
                "update the host's NVIDIA driver"
                if built_for
                else "take the image built with TORCH=cuda, or set SITE_GPU=none"
            ),
        )
    return "" if driver.cuda >= tuple(map(int, built_for.split(".")[:2])) else f"CUDA {built_for} on a driver for {has}"


class Meter:
    """What a piece of work cost on the GPU that CUDA uses first: `with Meter() as meter: ...`, then `meter.numbers()`.

    A thread looks once in `interval` seconds. A GPU that stops answering stops being measured; the work never fails of
    it.
    """

    def __init__(self, interval: float = 1.0) -> None:
        self.name, self.interval, self.stop = NO_GPU, interval, threading.Event()
        self.joules: float | None = None
        self.used: list[int] = []  # bytes, of all processes
        self.busy: list[int] = []  # percent

    def __enter__(self) -> Meter:
        self.thread = None
        if torch := _torch_with_cuda():
            torch.cuda.reset_peak_memory_stats()
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError:
            return self
        if handles := _or_none(lambda _: _handles(), None):
            self.handle = handles[0]
            self.name = _or_none(pynvml.nvmlDeviceGetName, self.handle) or "GPU"
            self.start = _or_none(pynvml.nvmlDeviceGetTotalEnergyConsumption, self.handle)
            self.thread = threading.Thread(target=self._watch, daemon=True)
            self.thread.start()
        else:
            pynvml.nvmlShutdown()
        return self

    def __exit__(self, *_: object) -> None:
        if self.thread is None:
            return
        self.stop.set()
        self.thread.join()
        end = _or_none(pynvml.nvmlDeviceGetTotalEnergyConsumption, self.handle)
        # a driver that was loaded anew counts from 0
        if self.start is not None and end is not None and end >= self.start:
            self.joules = (end - self.start) / 1000
        _or_none(lambda _: pynvml.nvmlShutdown(), None)

    def _watch(self) -> None:
        """One look every interval, and a last one at the end."""
        last = False
        while not last:
            last = self.stop.wait(self.interval)
            if memory := _or_none(pynvml.nvmlDeviceGetMemoryInfo, self.handle):
                self.used.append(memory.used)
            if utilisation := _or_none(pynvml.nvmlDeviceGetUtilizationRates, self.handle):
                self.busy.append(utilisation.gpu)

    def numbers(self) -> dict[str, float]:
        """gpu-peak-mib (of this process; of the whole GPU where torch cannot say), gpu-utilisation (mean, %),
        gpu-joules.
        """
        numbers = {}
        if torch := _torch_with_cuda():
            numbers["gpu-peak-mib"] = round(torch.cuda.max_memory_allocated() / MIB, 1)
        elif self.used:
            numbers["gpu-peak-mib"] = round(max(self.used) / MIB, 1)
        if self.busy:
            numbers["gpu-utilisation"] = round(sum(self.busy) / len(self.busy), 1)
        if self.joules is not None:
            numbers["gpu-joules"] = round(self.joules, 1)
        return numbers


def _torch_with_cuda() -> Any:
    """torch, where it is loaded already and has CUDA."""
    torch = sys.modules.get("torch")
    return torch if torch and torch.cuda.is_available() else None
