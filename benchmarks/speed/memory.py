"""What a site's process needs with a model of Stable Diffusion 1.5's size, where weights and not libraries fill the
memory.

  scripts/bench memory   a model with random weights (4.3 GB on disk), then a process a contender; a Markdown table

Each process does the least that a round does: a photo encoded, one step, on the CPU in float32. `again`: ours with the
photos in its cache.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.speed import base
from benchmarks.speed.__main__ import keep, machine, show
from benchmarks.speed.contenders import TASK
from benchmarks.speed.watch import memory_mb
from bouquet import ROOT

PHOTOS = 4
LIBRARIES = (
    "import accelerate, peft, diffusers.models.unets.unet_2d_condition; from benchmarks.speed.watch import memory_mb;"
    " print(memory_mb('VmHWM'))"
)


def build(models: Path, tiny: bool) -> None:
    from benchmarks.gpu import gpu

    folder, shape = base.build(models, "mini"), gpu.TINY if tiny else gpu.Shape()
    for part, net in zip(
        ("unet", "vae", "text_encoder"), (gpu.new_unet(shape, "cpu"), *gpu.build_encoders(shape, "cpu")), strict=True
    ):
        shutil.rmtree(folder / part)
        net.save_pretrained(folder / part)


def work(contender: str, home: Path) -> float:
    """A round's least, in this process; its peak in MB."""
    import torch

    if contender == "naive":
        from benchmarks.speed.naive import naive

        pipe, rows = (
            naive.pipeline(str(home / "models"), {"base": "bench", "rank": 8}),
            naive.photos(str(home / "data/site-1")),
        )
        trained = [p for p in pipe.unet.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained)
        latents, text = naive.encode(pipe, str(home / "data/site-1"), rows[:1], 64)
        naive.loss_of(pipe, latents, text, torch.tensor([500])).backward()
        optimiser.step()
    else:
        from app.config import RunConfig
        from app.site import train

        config = RunConfig.read(
            TASK | {"batch-size": 1, "local-steps": 1, "validation-timesteps": 1, "validation-fraction": 0.25}
        )
        site = train.Site(config, home / "models", home / "data/site-1", home / "cache", "")
        site.evaluate()
        site.fit(1)
    return memory_mb("VmHWM")


def main(args: argparse.Namespace) -> int:
    found = {}
    with tempfile.TemporaryDirectory(prefix="bouquet-bench-") as folder:
        home = Path(folder)
        build(home / "models", args.tiny)
        (home / "cache").mkdir()
        command = [
            sys.executable,
            "-m",
            "bouquet",
            "data",
            "partition",
            "--dataset=mini",
            "--sites=1",
            f"--images-per-site={PHOTOS}",
            f"--out={home / 'data'}",
        ]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        for contender in ("libraries", "naive", "ours", "again"):
            show(contender)
            alone = (
                f"from pathlib import Path; from benchmarks.speed import memory; print(memory.work({contender!r},"
                f" Path({folder!r})))"
            )
            done = subprocess.run(
                [sys.executable, "-c", LIBRARIES if contender == "libraries" else alone],
                cwd=ROOT,
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            found[contender] = float(done.stdout.splitlines()[-1])
    print("| a site's process | peak MB | of naive's |\n| --- | --- | --- |")
    for name, mb in found.items():
        print(f"| {name} | {mb:.0f} | {mb / found['naive']:.2f} |")
    print(f"\n{'tiny shapes' if args.tiny else 'Stable Diffusion 1.5 sizes'}, CPU, float32; {machine()}; {args.json}")
    keep(args.json, {"machine": machine(), "peak-mb": found})
    return 0
