"""Checks of `scripts/bench accept` that need no run: the GPU, the fork server, a site's preflight, and the training
loop beside diffusers'.

Enters: a Desk. Leaves: Found. Errors: Wrong, Skip, Late.
"""

from __future__ import annotations

import json
import re
import sys
from math import inf
from typing import Any

from benchmarks.gpu.accept_desk import Desk, Wrong, last
from benchmarks.gpu.accept_found import Found, Target
from benchmarks.gpu.accept_world import BOTH

ADAPTER = {"lora-rank": 8, "lora-targets": "attention"}
NVML_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"
ROOM = 6 * 1024  # MiB of the GPU that the other checks need free
BESIDE = 3 * 1024  # MiB for the site whose worker is killed meanwhile
RATIO, SHARE = 2.0, 0.4  # ours to diffusers' at 8 images; of the matrix product's rate at the best batch
BORN = 2.0  # seconds from the order for a process to its first line, where the fork server has the libraries


def device(desk: Desk) -> Found:
    """Which GPU this is, what its driver says of it, and what it can multiply."""
    world = desk.world
    facts = desk.child("device", {"device": world.device, "matrix": world.sizes.matrix})
    rate = f"bf16 matrix product {facts['matmul TFLOP/s']:.4g} TFLOP/s"
    if not world.cuda:
        return Found(f"CPU, {facts['threads']} threads; torch {facts['torch']}; {rate}", facts)
    if not facts["bf16"]:
        raise Wrong(f"{facts['name']} has no bf16")
    others = (
        ", ".join(f"process {pid} {size} MiB" for pid, size in facts.get("processes", {}).items())
        or "nobody else computes on it"
    )
    if facts["free MiB"] < ROOM:
        raise Wrong(f"{facts['free MiB']} MiB free, and the checks need {ROOM}; {others}")
    energy = "counts its energy" if facts.get("energy counter") else "counts no energy"
    about = (
        f"{facts['name']}, {facts['free MiB'] / 1024:.1f} of {facts['total MiB'] / 1024:.1f} GiB free, {energy};"
        f" {others}"
    )
    return Found(f"{about}; driver {facts.get('driver')}, torch {facts['torch']}; {rate}", facts)


def fork(desk: Desk) -> Found:
    """Children of the SuperExec's fork server can use the GPU, whatever the user's environment says of PyTorch's own
    check for one.
    """
    states: dict[str, dict[str, str]] = {"unset": {}}
    if desk.world.cuda:  # nobody asks it elsewhere
        states |= {"0": {NVML_CHECK: "0"}, "1": {NVML_CHECK: "1"}}
    work = {name: desk.begin("fork", {"device": desk.world.device}, env) for name, env in states.items()}
    facts: dict[str, Any] = {name: last(desk.answer(process)) for name, process in work.items()}
    for name, told in facts.items():
        for child in told["children"]:
            if child.get("error") or child["bad fork"]:
                raise Wrong(f"{NVML_CHECK} {name}: {child.get('error') or 'a bad fork'}")
    seconds = max(told["children"][-1]["seconds"] for told in facts.values())
    holds = (
        "has the libraries"
        if all(told["server has torch"] for told in facts.values())
        else "does NOT have the libraries"
    )
    count = sum(len(told["children"]) for told in facts.values())
    servers, where = "3 servers" if desk.world.cuda else "one server", facts["unset"]["children"][-1]["on"]
    text = f"{count} children of {servers} on {where}; the server {holds}"
    return Found(text, facts, [Target("a later child's start, s", seconds, most=BORN)])


def preflight(desk: Desk) -> Found:
    """A site's own checks before it joins, with the large base model and a real step; the estimate beside what the step
    took.
    """
    world, sizes, name = desk.world, desk.world.sizes, BOTH[0]
    hub, fingerprint = world.have("hub", desk), world.have("base", desk)
    world.have("photos", desk)
    config = {"base-model": "bench", "resolution": sizes.sd15_resolution, "batch-size": sizes.sd15_batch} | ADAPTER
    env = {
        "SITE_NAME": name, "BOUQUET_DATA": world.sites[name], "BOUQUET_MODELS": world.models,
        "BOUQUET_CACHE": hub.caches[name], "HUB": hub.address, "CA": world.certs / "ca.crt",
        "SITE_KEY": world.certs / f"{name}.key", "BASE_FINGERPRINT": fingerprint,
        "RUN_CONFIG": " ".join(f"{key}={json.dumps(value)}" for key, value in config.items()),
    }  # fmt: skip
    command = [sys.executable, "-m", "bouquet", "site", "check", "--json"]
    checks = last(desk.command(command, env={key: str(value) for key, value in env.items()}, codes=(0, 1)))["checks"]
    states = {line["name"]: line["state"] for line in checks}
    if failed := [f"{line['name']}: {' '.join(line['text'].split())}" for line in checks if line["state"] == "fail"]:
        raise Wrong("; ".join(failed))
    unlike = ", ".join(f"{name} {state}" for name, state in states.items() if state != "pass")
    need, peak = estimate_and_peak({line["name"]: line["text"] for line in checks})
    passed = ", ".join(filter(None, [f"{list(states.values()).count('pass')} pass", unlike]))
    text = f"{passed}; estimate {need:.2f} GiB, the step took {peak:.2f}"
    return Found(text, {"checks": checks}, [Target("estimate / peak", need / peak, 0.8, 1.2)])


def estimate_and_peak(texts: dict[str, str]) -> tuple[float, float]:
    """GiB, from the lines of preflight's `memory` and `step`. Errors: Wrong where they say none."""
    estimate = re.search(r"about ([\d.]+) GiB", texts.get("memory", ""))
    peak = re.search(r"peak memory ([\d.]+) GiB", texts.get("step", ""))
    if not estimate or not peak:
        raise Wrong(f"preflight says no estimate or no peak: {texts}")
    return float(estimate[1]), float(peak[1])


def loop(desk: Desk) -> Found:
    """scripts/bench gpu at fewer steps."""
    world = desk.world
    facts = desk.child(
        "loop", {"device": world.device, "kind": world.sizes.kind, "loop": world.sizes.loop, "leave": BESIDE}
    )
    costs, rate = facts["costs"], facts["matmul TFLOP/s"]
    ratio, (best, share) = ours_to_diffusers(costs), best_share(costs, rate)
    ours, theirs = (costs[name]["images_a_second"] for name in (OURS, DIFFUSERS))
    text = f"{ours:.1f} images/s at 8, diffusers' {theirs:.1f}; best: {best}"
    return Found(
        text, facts, [Target("ours / diffusers'", ratio, RATIO, inf), Target("of the matrix rate", share, SHARE, inf)]
    )


OURS, DIFFUSERS = "ours, 8 images", "diffusers' loop, 8 images"


def ours_to_diffusers(costs: dict[str, dict[str, float]]) -> float:
    return costs[OURS]["images_a_second"] / costs[DIFFUSERS]["images_a_second"]


def best_share(costs: dict[str, dict[str, float]], rate: float) -> tuple[str, float]:
    """(contender, its FLOP/s as a share of the matrix product's) of our fastest batch."""
    shares = {
        name: cost["images_a_second"] * cost["flops"] / 1e12 / rate for name, cost in costs.items() if name != DIFFUSERS
    }
    name = max(shares, key=lambda name: shares[name])
    return name, shares[name]
