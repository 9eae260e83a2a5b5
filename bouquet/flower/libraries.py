"""What every message of a site and every run of the hub needs, imported once, before the fork server is forked from
which the processes of all runs begin (superexec.py).

Importing this module imports the libraries, and nothing else: no key, no photo, no model, no thread, and no question
to CUDA, after which no process forked from this one could use the GPU.
Errors: RuntimeError (GPU-07) when it could not.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

LIBRARIES = [
    "accelerate",
    "peft",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.schedulers.scheduling_ddpm",
    "flwr.supernode.cli.flwr_clientapp",
]
ASKS = "bitsandbytes"  # starts CUDA when it is imported, which peft does wherever it is installed


@contextmanager
def without(library: str) -> Iterator[None]:
    """While others are imported that one is not there for them; whoever needs it afterwards, in a worker, has it."""
    sys.modules[library] = None  # type: ignore[assignment]  # what Python has for a module that there is not
    try:
        yield
    finally:
        del sys.modules[library]


@contextmanager
def uncollected() -> Iterator[None]:
    """While libraries are imported nothing is looked at for garbage: none of it is, and looking takes a sixth of the
    time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # nor when others are imported later
        gc.enable()


@contextmanager
def gpu_asked_by_nvml() -> Iterator[None]:
    """While a library is imported, torch answers whether there is a GPU by NVML instead of by CUDA.

    diffusers asks it at import, and CUDA's own answer marks every process that is forked afterwards as one that cannot
    use the GPU (torch's "bad fork"). Everything that torch knows of the number of GPUs comes from this one function.
    """
    import torch

    real = getattr(torch._C, "_cuda_getDeviceCount", None)
    if real is None:  # torch's CPU build
        yield
        return
    torch._C._cuda_getDeviceCount = gpus_by_nvml
    try:
        yield
    finally:
        torch._C._cuda_getDeviceCount = real


def gpus_by_nvml() -> int:
    """How many GPUs CUDA may use here; 0 without NVIDIA's driver."""
    import pynvml

    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return 0
    try:
        pynvml.nvmlInit()
        try:
            return int(pynvml.nvmlDeviceGetCount())
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return 0


def fork_is_bad() -> bool:
    """Whether torch says of a process forked from this one that it cannot use CUDA; asked in one."""
    import torch

    if not hasattr(torch._C, "_cuda_isInBadFork"):
        return False
    if not (child := os.fork()):
        os._exit(int(torch._C._cuda_isInBadFork()))
    return bool(os.waitpid(child, 0)[1])


with uncollected(), gpu_asked_by_nvml(), without(ASKS):
    for library in LIBRARIES:
        importlib.import_module(library)
if fork_is_bad():
    raise RuntimeError(
        "GPU-07  A message's process could not use the GPU.\n"
        "  found  a library asked CUDA while it was imported, and no process that is forked after that can use it\n"
        "  fix    install the locked packages: docker/install, or the hub's image\n"
        "  help   docs/troubleshooting.md#gpu-07"
    )
