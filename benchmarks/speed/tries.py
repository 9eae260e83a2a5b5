"""What was tried to make a site's arithmetic cheaper, one change at a time against the app's own loop: `scripts/bench
tries`.

One process with as many threads as a site of two has here, random latents; variants take turns, so that a machine that
slows down slows them all. Leaves a Markdown table: milliseconds and the ratio to the plain variant.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from app import model, wire
from app.config import RunConfig
from app.families import sd
from app.site import diffusion, train
from app.site.cache import Encoded
from benchmarks.speed import base, floor
from benchmarks.speed.__main__ import keep, prepare, show
from benchmarks.speed.contenders import TASK, Stock, Task, ours
from bouquet.hub.deployment import Processes

Work = Callable[[], object]
CPU = torch.device("cpu")


def random_photos(count: int, side: int = 8, tokens: int = 24, width: int = 128) -> Encoded:
    """`count` encoded photos that are noise."""
    draw = torch.Generator().manual_seed(1)
    text = torch.randn(count, tokens, width, generator=draw)
    return Encoded.of(
        torch.randn(count, 4, side, side, generator=draw), text, text[0], [f"{n:064x}" for n in range(count)]
    )


def take_turns(variants: dict[str, Work], turns: int) -> dict[str, float]:
    """Median seconds of each, after one turn that does not count."""
    took: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(turns + 1):
        for name, work in variants.items():
            start = time.monotonic()
            work()
            if turn:
                took[name].append(time.monotonic() - start)
    return {name: statistics.median(seconds) for name, seconds in took.items()}


def training(folder: Path, config: RunConfig, photos: Encoded) -> dict[str, Work]:
    """name -> `local-steps` steps; the first is the app's."""
    accelerator, objective = train.accelerator(config), diffusion.Objective.of(folder)

    def unet(**layout) -> torch.nn.Module:
        net = model.load_net(folder)
        model.add_adapter(net, sd.FAMILY, config)
        return net.to(**layout) if layout else net

    plain, last = unet(), unet(memory_format=torch.channels_last)

    def app(net) -> Work:
        return lambda: train.fit(net, objective, photos, config, accelerator, 1)

    def swapped(**changes) -> Work:
        """The app's loop with another AdamW."""

        def work() -> None:
            stock = torch.optim.AdamW
            torch.optim.AdamW = lambda *args, **kwargs: stock(*args, **(kwargs | changes))
            try:
                train.fit(plain, objective, photos, config, accelerator, 1)
            finally:
                torch.optim.AdamW = stock

        return work

    def bf16() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            train.fit(plain, objective, photos, config, accelerator, 1)

    return {
        "the app's loop": app(plain),
        "plain loop without accelerate": lambda: floor.fit(plain, objective, photos, config, 1),
        "fused AdamW": swapped(fused=True),
        "foreach AdamW": swapped(foreach=True),
        "channels last": app(last),
        "bf16 autocast on this CPU": bf16,
    }


def evaluating(folder: Path, config: RunConfig, photos: Encoded) -> dict[str, Work]:
    objective, net = diffusion.Objective.of(folder), model.load_net(folder)
    model.add_adapter(net, sd.FAMILY, config)
    merged = copy.deepcopy(net.eval())
    for part in merged.modules():
        if hasattr(part, "merge") and hasattr(part, "lora_A"):
            part.merge()

    def at(size: int, unet=net, mode: Callable = contextlib.nullcontext) -> Work:
        def work() -> float:
            with mode():
                return diffusion.validation_loss(
                    unet.eval(), objective, photos, CPU, timesteps=config.validation_timesteps, batch_size=size
                )

        return work

    sizes = {f"{size} images a pass": at(size) for size in (16, 32, 64, 128)}
    return (
        {"the app's evaluation, 8 images a pass": at(8)}
        | sizes
        | {"inference_mode": at(8, mode=torch.inference_mode), "adapter merged": at(8, merged)}
    )


def compiled(folder: Path, config: RunConfig, photos: Encoded) -> dict[str, float]:
    """torch.compile: seconds until the first two steps were taken, and seconds a step afterwards."""
    net, objective, accelerator = model.load_net(folder), diffusion.Objective.of(folder), train.accelerator(config)
    model.add_adapter(net, sd.FAMILY, config)
    net.forward = torch.compile(net.forward)
    start = time.monotonic()
    train.fit(net, objective, photos, replace(config, local_steps=2), accelerator, 1)
    first = time.monotonic() - start
    start = time.monotonic()
    train.fit(net, objective, photos, config, accelerator, 1)
    return {
        "seconds until two steps were taken": first,
        "seconds a step, then": (time.monotonic() - start) / config.local_steps,
    }


def rounds_alone() -> dict[str, float]:
    """A round of the smallest model, which is fixed cost: under this deployment's SuperNode, and under Flower's own
    with its 3 s.
    """
    took = {}
    for name, kind in (("this deployment", Processes), ("Flower's own SuperNode", Stock)):
        with tempfile.TemporaryDirectory(prefix="bouquet-bench-") as home:
            done = ours(Task(Path(home), prepare(Path(home), 2, 20, "tiny"), 16, 4, 2, 8, 5), show, kind=kind)
        took[name] = statistics.median(sum(entry.values()) for entry in done.rounds[1:])
    return took


def markdown(title: str, seconds: dict[str, float], unit: float, name: str) -> str:
    plain = next(iter(seconds.values()))
    lines = [f"| {title} | {name} | of the app's |", "| --- | --- | --- |"]
    return "\n".join(
        lines + [f"| {what} | {took / unit * 1000:.1f} | {took / plain:.2f} |" for what, took in seconds.items()]
    )


def main(args: argparse.Namespace) -> int:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    steps, turns, count = (2, 1, 8) if args.tiny else (10, 5, 32)
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="bouquet-bench-") as home:
        folder = base.build(Path(home), "tiny" if args.tiny else "sd")
        config = RunConfig.read(TASK | {"local-steps": steps})
        photos = random_photos(max(count, 8))
        found["training"] = take_turns(training(folder, config, photos), turns)
        found["evaluation"] = take_turns(evaluating(folder, config, photos), turns)
        packed = model.new_adapter(folder, config)
        found["wire"] = take_turns({"pack and unpack": lambda: wire.unpack(wire.pack(packed))}, turns)
        if not args.tiny and shutil.which("g++"):
            found["torch.compile"] = compiled(folder, config, photos)
    if not args.tiny:
        found["a round's fixed cost"] = rounds_alone()
    print(markdown("training", found["training"], steps, "ms a step") + "\n")
    print(markdown("evaluation", found["evaluation"], len(photos.keys) * 4, "ms an image and noise level") + "\n")
    print(json.dumps({name: found[name] for name in found if name not in ("training", "evaluation")}))
    keep(args.json, found)
    return 0
