"""What computes for `scripts/bench accept`: each piece of work has a process of its own, and its answer is the last
line of stdout.

  python -m benchmarks.gpu.accept_child WORK '{"…": …}'

Enters: the name of a function below, its settings as JSON, and CUDA_VISIBLE_DEVICES. Leaves: JSON. Errors: a
traceback, exit code 1.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Asked = Mapping[str, Any]
MIB = 2**20


def device(asked: Asked) -> dict[str, Any]:
    """torch's and NVML's facts of the GPU, and TFLOP/s of a bf16 matrix product."""
    import torch

    from benchmarks.gpu.gpu import matmul_rate

    facts: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "threads": torch.get_num_threads()}
    if asked["device"] == "cuda":
        facts |= nvml()
        torch.cuda.init()
        free, total = torch.cuda.mem_get_info()
        facts |= {"name": torch.cuda.get_device_name(), "capability": list(torch.cuda.get_device_capability())}
        facts |= {"bf16": torch.cuda.is_bf16_supported(), "architectures": torch.cuda.get_arch_list()}
        facts |= {"total MiB": total // MIB, "free MiB": free // MIB}
    return facts | {"matmul TFLOP/s": matmul_rate(asked["device"], asked["matrix"])}


def nvml() -> dict[str, Any]:
    """What the driver says of the GPU, before this process uses it; what it cannot say is None."""
    import pynvml

    from app.site import gpu

    driver, found = gpu.devices()
    facts: dict[str, Any] = {
        "driver": driver.version,
        "driver's cuda": "{}.{}".format(*driver.cuda),
        "visible": len(found),
    }
    if not found:
        return facts
    facts |= {"uuid": found[0].uuid, "processes": {str(pid): size // MIB for pid, size in found[0].processes.items()}}
    questions: dict[str, Callable[[Any], Any]] = {
        "power W": lambda gpu: pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
        "power limit W": lambda gpu: pynvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1000,
        "energy counter": lambda gpu: pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu) >= 0,
        "utilisation %": lambda gpu: pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
        "SM clock MHz": lambda gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM),
        "SM clock limit MHz": lambda gpu: pynvml.nvmlDeviceGetMaxClockInfo(gpu, pynvml.NVML_CLOCK_SM),
        "memory clock MHz": lambda gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_MEM),
        "temperature C": lambda gpu: pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU),
        "used MiB": lambda gpu: pynvml.nvmlDeviceGetMemoryInfo(gpu).used // MIB,
    }
    pynvml.nvmlInit()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        handle = next(one for one in handles if pynvml.nvmlDeviceGetUUID(one) == found[0].uuid)
        for name, ask in questions.items():
            try:
                facts[name] = ask(handle)
            except (pynvml.NVMLError, AttributeError):  # a driver, or a stand-in for one, that lacks the function
                facts[name] = None
    finally:
        pynvml.nvmlShutdown()
    return facts


# --- the fork server
# -----------------------------------------------------------------------------------------------------


def fork(asked: Asked) -> dict[str, Any]:
    """What two children of the SuperExec's real fork server say, and whether it has the libraries itself."""
    import multiprocessing.forkserver

    from benchmarks.gpu import accept_child
    from bouquet.flower import superexec

    main = sys.modules["__main__"]
    # as where superexec.py is the script: every child imports that
    main.__file__, main.__spec__ = superexec.__file__, None
    children: list[dict[str, Any]] = []
    for _ in range(2):
        try:
            server = superexec.server()
            ours, theirs = server.Pipe()
            began = time.monotonic()
            server.Process(target=accept_child.born, args=(theirs, asked["device"])).start()
            theirs.close()
            children.append(ours.recv() | {"seconds": ours.recv() - began})
        except (EOFError, OSError) as error:  # the fork server's own words are on stderr
            children.append({"error": f"the fork server or its child has ended ({type(error).__name__})"})
            break
    maps = Path(f"/proc/{multiprocessing.forkserver._forkserver._forkserver_pid}/maps")
    return {"children": children, "server has torch": maps.is_file() and "libtorch" in maps.read_text()}


def born(answer: Any, device: str) -> None:
    """In the child: can it use the GPU?"""
    began = time.monotonic()  # the same clock in every process
    import torch

    told: dict[str, Any] = {
        "bad fork": bool(torch._C._cuda_isInBadFork()) if hasattr(torch._C, "_cuda_isInBadFork") else False
    }
    try:
        held = torch.ones(MIB, device=device)
        told |= {"sum": held.sum().item(), "on": str(held.device)}
    except Exception as error:
        told["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    answer.send(told)
    answer.send(began)


# --- models
# --------------------------------------------------------------------------------------------------------------


def base(asked: Asked) -> dict[str, Any]:
    """A base model with random weights, made on the CPU; its fingerprint, noted in `memory` as a site notes it."""
    from app import model
    from benchmarks.speed import base as bases

    folder = bases.build(Path(asked["models"]), asked["kind"])
    return {"fingerprint": model.fingerprint(folder, Path(asked["memory"]))["base"]}


def site_of(asked: Asked, **changes: Any) -> Any:
    from app.config import RunConfig
    from app.site import train

    return train.Site(
        RunConfig.read(asked["config"] | changes), Path(asked["models"]), Path(asked["data"]), Path(asked["cache"]), ""
    )


def floor(asked: Asked) -> dict[str, Any]:
    """Seconds of each round's arithmetic in a warm process, after a first one: the app's own evaluation and steps, and
    nothing else.
    """
    site, rounds = site_of(asked), []
    for number in range(asked["rounds"] + 1):
        began = time.monotonic()
        site.evaluate()
        middle = time.monotonic()
        site.fit(number)
        wait_for(asked["device"])
        rounds.append({"evaluate": middle - began, "train": time.monotonic() - middle})
    return {"rounds": rounds[1:]}


def wait_for(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def loop(asked: Asked) -> dict[str, Any]:
    """scripts/bench gpu's comparison; `leave` MiB of the GPU stay free for a site that works beside it."""
    import torch

    from benchmarks.gpu import gpu

    if asked["device"] == "cuda":
        free, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(max(0.1, (free - asked["leave"] * MIB) / total))
    shape = gpu.Shape() if asked["kind"] == "sd15" else gpu.TINY
    costs, rate = gpu.compare(asked["device"], shape, *asked["loop"])
    return {"costs": {name: vars(cost) for name, cost in costs.items()}, "matmul TFLOP/s": rate}


# --- the GPU's memory
# ----------------------------------------------------------------------------------------------------


def probe(asked: Asked) -> dict[str, Any]:
    """MiB of the GPU that a site's process needs, with the batch of the config and with half of it.

    allocated: torch's tensors at most; reserved: what torch took from the driver for them; context: what the driver
    took besides.
    """
    import torch

    before = used()  # through NVML, from the parent: this process has not used CUDA yet
    found: dict[str, Any] = {}
    batch = asked["config"]["batch-size"]
    for name, size in (("half", batch // 2), ("whole", batch)):
        site = site_of(asked, **{"batch-size": size})
        torch.cuda.reset_peak_memory_stats()
        site.evaluate()
        found["evaluate reserved"] = torch.cuda.max_memory_reserved() / MIB
        site.fit(1)
        found |= {
            f"{name} allocated": torch.cuda.max_memory_allocated() / MIB,
            f"{name} reserved": torch.cuda.max_memory_reserved() / MIB,
        }
        if name == "half":
            found["context"] = (used() - before - torch.cuda.memory_reserved()) / MIB
        del site
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return found


def used() -> int:
    """Bytes of the GPU in use, by whomever: NVML's figure, which needs no context."""
    from app.site import gpu

    device = gpu.devices()[1][0]
    return device.total - device.free


def ballast(asked: Asked) -> dict[str, Any]:
    """Hold all of the GPU's memory but `leave` MiB until stdin is closed; says so in a line of its own when it does."""
    import torch

    held, step = [], 64 * MIB
    torch.zeros(1, device="cuda")
    while (more := torch.cuda.mem_get_info()[0] - int(asked["leave"] * MIB)) > step // 2:
        held.append(torch.empty(min(more, 1024 * MIB) // step * step or step, dtype=torch.uint8, device="cuda"))
    print(
        json.dumps(
            {"left MiB": torch.cuda.mem_get_info()[0] / MIB, "held MiB": sum(part.numel() for part in held) / MIB}
        ),
        flush=True,
    )
    sys.stdin.read()
    return {}


WORK: dict[str, Callable[[Asked], dict[str, Any]]] = {
    work.__name__: work for work in (device, fork, base, floor, loop, probe, ballast)
}  # fmt: skip

if __name__ == "__main__":
    answer = WORK[sys.argv[1]](json.loads(sys.argv[2]))
    sys.stdout.flush()
    print(json.dumps(answer), flush=True)
    os._exit(0)  # a fork server, or a thread of a library, keeps nobody waiting
