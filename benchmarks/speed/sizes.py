"""What a site's round costs by images, rank and resolution, one thing at a time. `scripts/bench sizes`.

One process with a site's threads, the app's own functions, the model of scripts/bench. Leaves a Markdown table.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from app import model, wire
from app.config import RunConfig
from app.site import cache, train
from app.site.photos import data
from app.site.photos.views import Plan
from benchmarks.speed import base
from benchmarks.speed.__main__ import keep, machine
from benchmarks.speed.contenders import TASK
from benchmarks.speed.tries import take_turns
from bouquet import ROOT

RANKS, RESOLUTIONS, IMAGES = (2, 8, 32), (64, 128, 256), (120, 480, 1920)
Row = dict[str, float]


def photos(folder: Path, count: int) -> data.Partition:
    command = [
        sys.executable,
        "-m",
        "bouquet",
        "data",
        "partition",
        "--dataset=mini",
        "--sites=1",
        f"--images-per-site={count}",
        f"--out={folder}",
    ]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return data.scan(folder / "site-1")


def cost(home: Path, config: RunConfig, partition: data.Partition) -> Row:
    """Seconds and bytes of one site: encoding everything anew, reading it again, a round's evaluation and steps, its
    adapter on the wire.
    """
    folder = home / "models" / "bench"
    sums = model.fingerprint(folder)
    with tempfile.TemporaryDirectory(dir=home) as cached:
        laps = []
        for _ in range(2):
            start = time.monotonic()
            _, rows = cache.encode(
                partition, folder, sums, Plan.square(config.resolution), Path(cached), torch.device("cpu")
            )
            laps.append(time.monotonic() - start)
        kept = sum(file.stat().st_size for file in Path(cached).iterdir()) / 1e6
        site = train.Site(config, home / "models", home / f"data-{len(partition.photos)}" / "site-1", Path(cached), "")
    seconds, adapter = (
        take_turns({"evaluate": site.evaluate, "train": lambda: site.fit(1)}, 3),
        wire.pack(model.adapter_of(site.net)),
    )
    each = {"evaluate": seconds["evaluate"], "step-ms": 1000 * seconds["train"] / config.local_steps}
    return {
        "encode": laps[0],
        "again": laps[1],
        "cache-mb": kept,
        **each,
        "adapter-mb": len(adapter[wire.NAME].data) / 1e6,
    }


def table(found: dict[str, Row]) -> str:
    lines = ["| | encode, s | again, s | cache, MB | evaluate, s | ms a step | adapter, MB |", "| --- |" + " --- |" * 6]
    for name, r in found.items():
        numbers = (
            f"{r['encode']:.1f}",
            f"{r['again']:.2f}",
            f"{r['cache-mb']:.1f}",
            f"{r['evaluate']:.1f}",
            f"{r['step-ms']:.0f}",
            f"{r['adapter-mb']:.2f}",
        )
        lines.append(f"| {name} | " + " | ".join(numbers) + " |")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> int:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    plain = RunConfig.read(TASK | {"local-steps": 2 if args.tiny else 10, "validation-fraction": 1 / 6})
    ranks, resolutions, counts = ((2,), (64,), (12,)) if args.tiny else (RANKS, RESOLUTIONS, IMAGES)
    found: dict[str, Row] = {}
    with tempfile.TemporaryDirectory(prefix="bouquet-bench-") as folder, contextlib.redirect_stdout(sys.stderr):
        home = Path(folder)
        base.build(home / "models", "tiny" if args.tiny else "sd")
        sets = {count: photos(home / f"data-{count}", count) for count in counts}
        for count in counts:
            found[f"{count} images"] = cost(home, plain, sets[count])
        for rank in ranks:
            found[f"rank {rank}"] = cost(home, replace(plain, lora_rank=rank), sets[counts[0]])
        for resolution in resolutions:
            found[f"{resolution} pixels"] = cost(home, replace(plain, resolution=resolution), sets[counts[0]])
    print(table(found))
    print(
        f"\n64 pixels, rank 8 and {counts[0]} images where nothing else is said, a sixth of them held out; {machine()};"
        f" {args.json}"
    )
    keep(args.json, {"machine": machine(), "found": found})
    return 0
