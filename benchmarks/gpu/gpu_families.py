"""What the large families cost on a card: images a second and memory, with and without gradient checkpointing.

  scripts/bench gpu-families [--device cuda|cpu] [--tiny] [--limit SECONDS] [--json FILE]

SDXL's UNet and Z-Image's transformer by their own settings with random weights, in bf16 with a float32 adapter of rank
16 on attention, through the app's own loop (train.fit) on random latents of 1024 pixels and random text. What does
not fit is a row of its own. Then the same with the base as int8 and as nf4 (`base-precision`), with checkpointing.
Beside it stands what the site's preflight would have expected (bouquet/site/estimate.py counts the same net without
weights): the two should be within 20 %.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import diffusers
import torch

from app import families, model
from app.config import RunConfig
from app.families.base import Family
from app.families.noise import Betas, Flow
from app.site import diffusion, quantised, train
from app.site.cache import Encoded
from benchmarks.gpu.gpu import no_gpu, schedule
from bouquet.site import estimate

GIB = 2**30
SDXL = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2, "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (5, 10, 20),
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "transformer_layers_per_block": (1, 2, 10),
    "projection_class_embeddings_input_dim": 2816, "cross_attention_dim": 2048,
}  # fmt: skip
SMALL = {  # the same kinds, a few thousand numbers
    "StableDiffusionXLPipeline": SDXL | {
        "block_out_channels": (32, 64, 64), "attention_head_dim": (2, 2, 2), "transformer_layers_per_block": 1,
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80, "cross_attention_dim": 64,
    },
    "ZImagePipeline": {
        "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 16,
        "axes_dims": [8, 4, 4], "axes_lens": [1024, 64, 64],
    },
}  # fmt: skip
WHOLE: dict[str, dict[str, Any]] = {"StableDiffusionXLPipeline": SDXL, "ZImagePipeline": {}}
KINDS = (("as-is", False), ("as-is", True), ("int8", True), ("nf4", True))  # base-precision, gradient checkpointing
TOKENS = 64  # of a random caption where the family pads none


@dataclass(frozen=True)
class Cost:
    """images a second; GiB by torch.cuda.max_memory_allocated, and expected; 0 where it does not fit."""

    images_s: float
    peak: float
    expected: float


def net_of(family: Family, settings: dict[str, Any], config: RunConfig, device: str) -> Any:
    """Random weights, made in bf16 on the card itself."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            net: Any = getattr(diffusers, family.classes[family.net][0])(**settings)
    finally:
        torch.set_default_dtype(before)
    for parameter in net.requires_grad_(False).parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    quantised.quantise(net, config.base_precision, dtype, torch.device(device))
    model.add_adapter(net, family, config)
    return net.to(device)


def photos_of(family: Family, net: Any, side: int, count: int = 8) -> Encoded:
    """Random latents and conditions of the net's own widths."""
    draw, settings = torch.Generator().manual_seed(1), net.config
    if family.pipeline == "ZImagePipeline":
        rows = [{"text": torch.randn(TOKENS, settings.cap_feat_dim, generator=draw)} for _ in range(count + 1)]
    else:
        pooled = settings.projection_class_embeddings_input_dim - 6 * settings.addition_time_embed_dim
        rows = [
            {"text": torch.randn(77, settings.cross_attention_dim, generator=draw), "pooled": torch.randn(pooled)}
            for _ in range(count + 1)
        ]
    latents = torch.randn(count, settings.in_channels, side, side, generator=draw)
    sizes = torch.tensor([[8 * side, 8 * side, 0, 0, 8 * side, 8 * side]]).expand(count, -1)
    return Encoded(latents, rows, torch.arange(count) + 1, sizes, [f"{n:064x}" for n in range(count)])


def objective_of(family: Family) -> diffusion.Objective:
    if family.pipeline == "ZImagePipeline":
        table = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        return diffusion.Objective(family, Flow(table.sigmas[: len(table.timesteps)], table.timesteps))
    return diffusion.Objective(family, Betas(schedule()))


def cost(family: Family, net: Any, photos: Encoded, config: RunConfig, device: str) -> Cost:
    """Of `local-steps` steps, after one that sets things up."""
    accelerator, objective = train.accelerator(config), objective_of(family)
    if config.gradient_checkpointing:
        net.enable_gradient_checkpointing()
    else:
        net.disable_gradient_checkpointing()
    expected = expected_of(family, net, photos, config, device)
    try:
        train.fit(net, objective, photos, replace(config, local_steps=1), accelerator, 1)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.monotonic()
        train.fit(net, objective, photos, config, accelerator, 2)
        seconds = time.monotonic() - start
    except torch.OutOfMemoryError:
        net.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        return Cost(0.0, 0.0, expected)
    peak = torch.cuda.max_memory_allocated() / GIB if device == "cuda" else 0.0
    return Cost(config.local_steps * config.batch_size / seconds, peak, expected)


def expected_of(family: Family, net: Any, photos: Encoded, config: RunConfig, device: str) -> float:
    """GiB of the weights, the adapter and its optimiser, and the most of a step, counted without contents."""
    half, settings = device == "cuda", dict(net.config)
    empty = estimate.without_contents(type(net), settings, family, config, half)
    latents, given = photos.batch(torch.arange(config.batch_size) % len(photos.keys))
    meta = {name: rows if name == "mask" else rows.to("meta") for name, rows in given.items()}
    told = torch.empty(config.batch_size, device="meta")
    _, step = estimate.step_of(empty, family, estimate.Inputs(latents.to("meta"), told, meta), half=half)
    own = sum(p.numel() * p.element_size() * (4 if p.requires_grad else 1) for p in empty.parameters())
    return (own + step) / GIB


def main(args: argparse.Namespace) -> int:
    if args.device == "cuda" and not torch.cuda.is_available():
        return no_gpu("gpu-families")
    end, found = time.monotonic() + args.limit, dict[str, Cost]()
    sizes, steps, side = ((1,), 1, 8) if args.tiny else ((1, 2, 4, 8), 8, 128)
    print(
        "| family, 1024 pixels, rank 16 | images a step | images/s | GiB | expected |\n| --- |" + " --- |" * 4,
        flush=True,
    )
    for pipeline, settings in (SMALL if args.tiny else WHOLE).items():
        family = families.FAMILIES[pipeline]
        config = RunConfig.read(
            {"resolution": 8 * side, "lora-rank": 16, "lora-targets": "attention", "learning-rate": 1e-4}
            | {"local-steps": steps, "precision": "bf16" if args.device == "cuda" else "fp32"}
        )
        net = None
        for precision, checkpointing in KINDS:
            if net is None or config.base_precision != precision:
                net = None  # before the next one is made
                config = replace(config, base_precision=precision)
                net = net_of(family, settings, config, args.device)
                photos = photos_of(family, net, side)
            for size in sizes:
                if time.monotonic() > end:
                    print(f"| {family.label} | the time was up: --limit {args.limit:g} | | | |", flush=True)
                    break
                asked = replace(config, batch_size=size, gradient_checkpointing=checkpointing)
                one = cost(family, net, photos, asked, args.device)
                name = f"{family.label}{', checkpointing' * checkpointing}"
                name += f", {precision}" * (precision != "as-is")
                told = f"{one.images_s:.2f} | {one.peak:.1f}" if one.images_s else "does not fit | "
                print(f"| {name} | {size} | {told} | {one.expected:.1f} |", flush=True)
                found[f"{name}, {size}"] = one
        net = None
        if args.device == "cuda":
            torch.cuda.empty_cache()
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU, tiny shapes: no measurement"
    print(f"\n{name}, {time.strftime('%Y-%m-%d')}; torch {torch.__version__}")
    from benchmarks.speed.__main__ import keep

    keep(args.json, {"device": name, "found": {key: asdict(value) for key, value in found.items()}})
    return 0
