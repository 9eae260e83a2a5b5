"""What could make the loop on a GPU cheaper, one change after another against the app's own loop: `scripts/bench
gpu-tries`.

Stable Diffusion 1.5's UNet by its config with random weights, rank 8 on attention, 512 pixels, bf16, 8 images and 64.
A variant is the app's arithmetic in a plain step, so that what differs is one thing: a step that is one CUDA graph;
norms outside autocast (it computes them in float32, and what they leave is twice as large); cuDNN's own choice of
algorithm; channels last; blocks compiled one by one, or the whole net. Each line comes as it is measured and the JSON
is written after each, so that a machine that is taken away leaves what it has. Four minutes; --limit SECONDS starts no
variant after that. Without a GPU: exit code 2; --device cpu --tiny shows that it runs.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from app.config import RunConfig
from app.site import train
from benchmarks.gpu.gpu import (
    TINY,
    Shape,
    build_unet,
    flops_an_image,
    matmul_rate,
    no_gpu,
    objective,
    random_photos,
    schedule,
)

WARM = 2  # steps before the clock runs


@dataclass(frozen=True)
class Variant:
    """One way to take a step; what is not named is as in the app."""

    name: str
    graph: bool = False
    norms: bool = False  # outside autocast
    benchmark: bool = False  # cuDNN tries its algorithms
    last: bool = False  # channels last
    compiled: str = ""  # blocks, regions, whole


VARIANTS = (
    Variant("a plain step, fused AdamW"),
    Variant("one CUDA graph a step", graph=True),
    Variant("graph, norms in bf16", graph=True, norms=True),
    Variant("graph, norms in bf16, cuDNN's choice", graph=True, norms=True, benchmark=True),
    Variant("graph, norms in bf16, cuDNN's choice, channels last", graph=True, norms=True, benchmark=True, last=True),
    Variant(
        "… and transformer and residual blocks compiled",
        graph=True,
        norms=True,
        benchmark=True,
        last=True,
        compiled="regions",
    ),
    Variant(
        "… and diffusers' repeated blocks compiled",
        graph=True,
        norms=True,
        benchmark=True,
        last=True,
        compiled="blocks",
    ),
    Variant("… and the whole net compiled", graph=True, norms=True, benchmark=True, last=True, compiled="whole"),
    Variant("blocks compiled, norms as autocast has them", graph=True, benchmark=True, last=True, compiled="regions"),
)


def norms_in_bf16(net: torch.nn.Module, device: str) -> None:
    """Group and layer norms outside autocast: they compute in float32 inside all the same, and leave bf16."""

    def outside(forward: Callable) -> Callable:
        def call(hidden: torch.Tensor) -> torch.Tensor:
            with torch.autocast(device, enabled=False):
                return forward(hidden)

        return call

    for part in net.modules():
        if isinstance(part, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            part.forward = outside(part.forward)


def compile_parts(net: torch.nn.Module, how: str) -> None:
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D

    match how:
        case "blocks":
            net.compile_repeated_blocks(dynamic=False)
        case "regions":
            for part in net.modules():
                if isinstance(part, (ResnetBlock2D, BasicTransformerBlock)):
                    part.compile(dynamic=False)
        case "whole":
            net.compile(dynamic=False)


class Step:
    """One step of training on inputs that lie where a CUDA graph finds them."""

    def __init__(self, net: torch.nn.Module, shape: Shape, size: int, device: str, graph: bool) -> None:
        self.net, self.device, self.graph = net, device, None
        self.trained = [p for p in net.parameters() if p.requires_grad]
        cuda = device == "cuda"
        self.optimiser = torch.optim.AdamW(
            self.trained, lr=1e-4, weight_decay=0.0, fused=cuda or None, capturable=graph and cuda
        )
        self.alphas, self.draw = schedule().alphas_cumprod.to(device), torch.Generator().manual_seed(1)
        self.clean = torch.randn(size, 4, shape.side, shape.side, device=device)
        self.text = torch.randn(size, shape.tokens, shape.text, device=device)
        self.noise, self.t = torch.empty_like(self.clean), torch.zeros(size, dtype=torch.long, device=device)
        net.train()
        if graph and cuda:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(3):
                    self.take()
            torch.cuda.current_stream().wait_stream(aside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.take()

    def take(self) -> None:
        share = self.alphas[self.t].view(-1, 1, 1, 1)
        noisy = share.sqrt() * self.clean + (1 - share).sqrt() * self.noise
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda", cache_enabled=False):
            predicted = self.net(noisy.to(self.net.dtype), self.t, self.text.to(self.net.dtype)).sample
        F.mse_loss(predicted.float(), self.noise).backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()

    def __call__(self) -> None:
        self.noise.copy_(torch.randn(self.noise.shape, generator=self.draw))
        self.t.copy_(torch.randint(1000, self.t.shape, generator=self.draw))
        self.graph.replay() if self.graph else self.take()


def seconds_a_step(step: Callable[[], object], device: str, steps: int) -> float:
    for _ in range(WARM):
        step()
    wait(device)
    start = time.monotonic()
    for _ in range(steps):
        step()
    wait(device)
    return (time.monotonic() - start) / steps


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(variant: Variant, size: int, shape: Shape, config: RunConfig, device: str, steps: int) -> dict[str, float]:
    """Seconds a step, seconds until the first was taken, and GiB at most."""
    torch.backends.cudnn.benchmark = variant.benchmark
    start, cuda = time.monotonic(), device == "cuda"
    try:
        net = build_unet(shape, config, device)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        if variant.norms:
            norms_in_bf16(net, device)
        if variant.last:
            net = net.to(memory_format=torch.channels_last)
        if cuda:  # compiling for a CPU is no try here, and takes minutes
            compile_parts(net, variant.compiled)
        step = Step(net, shape, size, device, variant.graph)
        step()
        wait(device)
        first = time.monotonic() - start
        took = seconds_a_step(step, device, steps)
        return {"seconds": took, "first": first, "gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0}
    finally:
        torch.backends.cudnn.benchmark = False
        net = step = None
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()


def apps_loop(size: int, shape: Shape, config: RunConfig, device: str, steps: int) -> dict[str, float]:
    """The app's own `fit`, as it is."""
    config, photos, unet = replace(config, batch_size=size), random_photos(shape, 64), build_unet(shape, config, device)
    train.fit(unet, objective(), photos, replace(config, local_steps=WARM), train.accelerator(config), 1)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.monotonic()
    train.fit(unet, objective(), photos, replace(config, local_steps=steps), train.accelerator(config), 1)
    wait(device)
    return {
        "seconds": (time.monotonic() - start) / steps,
        "first": 0.0,
        "gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0,
    }


def row(name: str, size: int, found: dict[str, float], plain: float, flops: float, rate: float) -> str:
    speed = size / found["seconds"]
    cells = (
        f"{size}",
        f"{1000 * found['seconds']:.1f}",
        f"{speed:.1f}",
        f"{plain / found['seconds']:.2f}",
        f"{speed * flops / 1e12 / rate:.0%}",
        f"{found['gib']:.1f}",
        f"{found['first']:.0f}",
    )
    return f"| {name} | " + " | ".join(cells) + " |"


HEAD = (
    "| try | images a step | ms a step | images/s | of the app's speed | of the matrix rate | GiB | s until the first"
    " step |\n| --- |" + " --- |" * 7
)


def flops_of_the_app(shape: Shape, config: RunConfig, device: str) -> float:
    """FLOPs of one image in the app's loop; the UNet that they are counted with is gone afterwards."""
    net, photos = build_unet(shape, config, device), random_photos(shape, 8)
    return flops_an_image(lambda: train.fit(net, objective(), photos, config, train.accelerator(config), 1), 8)


def main(args: argparse.Namespace) -> int:
    if args.device == "cuda" and not torch.cuda.is_available():
        return no_gpu("gpu-tries")
    from benchmarks.speed.__main__ import keep

    shape, end = TINY if args.tiny else Shape(), time.monotonic() + args.limit
    sizes, steps = ((8,), 1) if args.tiny else ((8, 64), 8)
    settings = {"resolution": shape.resolution, "lora-rank": 8, "lora-targets": "attention", "learning-rate": 1e-4}
    config = RunConfig.read(
        settings | {"precision": "bf16" if args.device == "cuda" else "fp32", "local-steps": 1, "batch-size": 8}
    )
    rate, flops = matmul_rate(args.device, 256 if args.tiny else 8192), flops_of_the_app(shape, config, args.device)
    found: dict[str, dict[str, float]] = {}
    print(HEAD, flush=True)
    for size in sizes:
        plain = found[f"the app's loop, {size}"] = apps_loop(size, shape, config, args.device, steps)
        print(row("the app's loop", size, plain, plain["seconds"], flops, rate), flush=True)
        for variant in VARIANTS:
            if time.monotonic() > end:
                print(f"| {variant.name} | {size} | no time left |" + " |" * 5, flush=True)
                continue
            try:
                got = found[f"{variant.name}, {size}"] = measure(variant, size, shape, config, args.device, steps)
            except Exception as error:  # a try that does not work is a finding too
                print(
                    f"| {variant.name} | {size} | {type(error).__name__}: {' '.join(str(error).split())[:80]} |"
                    + " |" * 5,
                    flush=True,
                )
                continue
            print(row(variant.name, size, got, plain["seconds"], flops, rate), flush=True)
            keep(args.json, {"matmul TFLOP/s": rate, "flops an image": flops, "found": found})
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU, tiny shapes: no measurement"
    print(f"\n{name}, {time.strftime('%Y-%m-%d')}; torch {torch.__version__}; bf16 matrix product {rate:.1f} TFLOP/s")
    return 0
