"""Stable Diffusion 1.5's UNet on a GPU: the app's loop beside diffusers' text-to-image LoRA script, in one run.
`scripts/bench gpu`.

859.5 M parameters by its config, random weights; LoRA rank 8 on attention, 512 pixels, bf16. Ours trains from encoded
photos; diffusers' loop (examples/text_to_image/train_text_to_image_lora.py, written out here) decodes, encodes and
reads its loss in every step. Both at 8 images, ours also at the most that fit. Leaves a Markdown table. Without a GPU:
exit code 2; --device cpu --tiny shows that it runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from io import BytesIO

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from app import model
from app.config import RunConfig
from app.families import sd
from app.families.noise import Betas
from app.site import diffusion, train
from app.site.cache import Encoded
from app.site.gpu import Meter
from app.site.photos import images


@dataclass(frozen=True)
class Shape:
    """Widths of the three models. The defaults are Stable Diffusion 1.5's: its config files' numbers."""

    unet: tuple[int, ...] = (320, 640, 1280, 1280)
    layers: int = 2
    vae: tuple[int, ...] = (128, 256, 512, 512)
    text: int = 768
    text_layers: int = 12
    tokens: int = 77
    groups: int = 32
    resolution: int = 512

    @property
    def side(self) -> int:
        return self.resolution // 2 ** (len(self.vae) - 1)


TINY = Shape(unet=(16, 32), layers=1, vae=(8, 8), text=16, text_layers=1, tokens=24, groups=4, resolution=16)


def schedule() -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )


def objective() -> diffusion.Objective:
    """What the app learns with it."""
    return diffusion.Objective(sd.FAMILY, Betas(schedule()))


def new_unet(shape: Shape, device: str) -> torch.nn.Module:
    depth = len(shape.unet)
    with torch.device(device):
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=shape.side, cross_attention_dim=shape.text, block_out_channels=shape.unet,
            layers_per_block=shape.layers, norm_num_groups=shape.groups, attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock2D",) * (depth - 1) + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (depth - 1),
        )  # fmt: skip


def build_unet(shape: Shape, config: RunConfig, device: str) -> torch.nn.Module:
    """Frozen, in bf16 on a GPU as the app keeps it, with a fresh float32 adapter."""
    net = new_unet(shape, device)
    net = (net.to(torch.bfloat16) if device == "cuda" else net).requires_grad_(False)
    model.add_adapter(net, sd.FAMILY, config)
    return net.to(device)


def build_encoders(shape: Shape, device: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(autoencoder, text encoder), frozen, in the type in which diffusers' script keeps them."""
    with torch.device(device):
        vae = AutoencoderKL(
            block_out_channels=shape.vae, layers_per_block=shape.layers, latent_channels=4,
            norm_num_groups=shape.groups, down_block_types=("DownEncoderBlock2D",) * len(shape.vae),
            up_block_types=("UpDecoderBlock2D",) * len(shape.vae),
        )  # fmt: skip
        text = CLIPTextModel(CLIPTextConfig(
            hidden_size=shape.text, intermediate_size=4 * shape.text, num_hidden_layers=shape.text_layers,
            num_attention_heads=max(1, shape.text // 64), max_position_embeddings=shape.tokens, hidden_act="quick_gelu",
            projection_dim=shape.text,
        ))  # fmt: skip
    if device == "cuda":
        vae, text = vae.to(torch.bfloat16), text.to(torch.bfloat16)
    return vae.requires_grad_(False), text.requires_grad_(False)


def random_photos(shape: Shape, count: int) -> Encoded:
    draw = torch.Generator().manual_seed(1)
    text = torch.randn(count, shape.tokens, shape.text, generator=draw)
    return Encoded.of(
        torch.randn(count, 4, shape.side, shape.side, generator=draw), text, text[0], [str(n) for n in range(count)]
    )


def random_files(shape: Shape, count: int) -> list[bytes]:
    """Photos as JPEG files, for the loop that decodes them."""
    rng, files = np.random.default_rng(0), []
    for _ in range(count):
        out = BytesIO()
        small = rng.integers(0, 256, (shape.resolution // 8, shape.resolution // 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((shape.resolution, shape.resolution)).save(out, "JPEG", quality=90)
        files.append(out.getvalue())
    return files


def diffusers_fit(
    unet,
    vae,
    text_encoder,
    scheduler,
    files: list[bytes],
    shape: Shape,
    config: RunConfig,
    accelerator: Accelerator,
    seed: int,
) -> float:
    """`local-steps` steps as diffusers' script takes them; the mean loss."""
    draw, total, device = torch.Generator().manual_seed(seed), 0.0, accelerator.device
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=config.learning_rate, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    prepared, optimiser = accelerator.prepare(unet, optimiser)
    prepared.train()
    for _ in range(config.local_steps):
        pick = torch.randint(len(files), (config.batch_size,), generator=draw)
        pixels = torch.stack([images.to_pixels(images.rgb(files[i]), shape.resolution) for i in pick])
        ids = torch.randint(1000, (config.batch_size, shape.tokens), generator=draw).to(device)
        with accelerator.accumulate(prepared):
            latents = vae.encode(pixels.to(device, vae.dtype)).latent_dist.sample() * vae.config.scaling_factor
            noise = torch.randn_like(latents)
            t = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),), device=device).long()
            noisy = scheduler.add_noise(latents, noise, t)
            predicted = prepared(noisy, t, text_encoder(ids, return_dict=False)[0], return_dict=False)[0]
            loss = F.mse_loss(predicted.float(), noise.float(), reduction="mean")
            total += accelerator.gather(loss.repeat(config.batch_size)).mean().item()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            optimiser.zero_grad()
    return total / config.local_steps


@dataclass
class Cost:
    images_a_second: float
    peak_mib: float  # of the GPU, this process
    joules_an_image: float
    flops: float = 0.0  # an image


def measure(work: Callable[[], object], count: int, device: str) -> Cost:
    """One piece of work over `count` images."""
    with Meter(0.2) as meter:
        start = time.monotonic()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.monotonic() - start
    numbers = meter.numbers()
    return Cost(count / seconds, numbers.get("gpu-peak-mib", 0.0), numbers.get("gpu-joules", 0.0) / count)


def median(costs: list[Cost]) -> Cost:
    return Cost(
        *(
            statistics.median(getattr(c, name) for c in costs)
            for name in ("images_a_second", "peak_mib", "joules_an_image", "flops")
        )
    )


def matmul_rate(device: str, size: int) -> float:
    """TFLOP/s of a square bf16 matrix product."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(6):
        start = time.monotonic()
        for _ in range(4):
            left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - start)
    return 4 * 2 * size**3 / statistics.median(seconds[1:]) / 1e12


def flops_an_image(work: Callable[[], object], count: int) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / count


def largest_batch(fits: Callable[[int], bool], start: int, most: int) -> int:
    """The largest of start, 2·start, 4·start, … that fits; 0 where `start` does not."""
    best, size = 0, start
    while size <= most and fits(size):
        best, size = size, 2 * size
    return best


def table(rows: dict[str, Cost], rate: float) -> str:
    lines = [
        "| | images/s | of diffusers' | TFLOP/s | of the matrix rate | peak VRAM, GiB | J an image |",
        "| --- |" + " --- |" * 6,
    ]
    reference = rows["diffusers' loop, 8 images"].images_a_second
    for name, cost in rows.items():
        speed = cost.images_a_second * cost.flops / 1e12
        numbers = (
            f"{cost.images_a_second:.2f}",
            f"{cost.images_a_second / reference:.2f}",
            f"{speed:.2f}",
            f"{speed / rate:.0%}",
        )
        lines.append(
            f"| {name} | " + " | ".join((*numbers, f"{cost.peak_mib / 1024:.1f}", f"{cost.joules_an_image:.1f}")) + " |"
        )
    return "\n".join(lines)


def compare(device: str, shape: Shape, steps: int, repeats: int, most: int) -> tuple[dict[str, Cost], float]:
    """(costs by contender, TFLOP/s of a matrix product)."""
    settings = {
        "resolution": shape.resolution,
        "batch-size": 8,
        "lora-rank": 8,
        "lora-targets": "attention",
        "learning-rate": 1e-4,
    }
    config = RunConfig.read(settings | {"local-steps": steps, "precision": "bf16" if device == "cuda" else "fp32"})
    accelerator, scheduler, unet = train.accelerator(config), schedule(), build_unet(shape, config, device)
    encoders = list(build_encoders(shape, device))
    photos, files = random_photos(shape, 64), random_files(shape, 16)

    def ours(size: int, steps: int) -> Callable[[], object]:
        return lambda: train.fit(
            unet, objective(), photos, replace(config, batch_size=size, local_steps=steps), accelerator, 1
        )

    def theirs(steps: int) -> Callable[[], object]:
        return lambda: diffusers_fit(
            unet, *encoders, scheduler, files, shape, replace(config, local_steps=steps), accelerator, 1
        )

    def fits(size: int) -> bool:
        try:
            ours(size, 1)()
        except torch.OutOfMemoryError:
            unet.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            return False
        return True

    flops = {"ours, 8 images": flops_an_image(ours(8, 1), 8), "diffusers' loop, 8 images": flops_an_image(theirs(1), 8)}
    costs: dict[str, list[Cost]] = {name: [] for name in flops}
    for _ in range(repeats):
        costs["ours, 8 images"].append(measure(ours(8, steps), 8 * steps, device))
        costs["diffusers' loop, 8 images"].append(measure(theirs(steps), 8 * steps, device))
    found = {name: replace(median(of), flops=flops[name]) for name, of in costs.items()}
    encoders.clear()  # their memory is not the wide batches'
    if (size := largest_batch(fits, 16, most)) > 8:
        wide = [measure(ours(size, max(1, steps // 4)), size * max(1, steps // 4), device) for _ in range(repeats)]
        found[f"ours, {size} images"] = replace(median(wide), flops=flops["ours, 8 images"])
    return found, matmul_rate(device, 8192 if device == "cuda" else 256)


def no_gpu(command: str) -> int:
    print(
        f"bench {command}: no GPU: torch {torch.__version__} finds no CUDA device here, so nothing was measured.",
        file=sys.stderr,
    )
    print(
        f"  fix    run it where nvidia-smi shows a GPU; scripts/bench {command} --device cpu --tiny shows that it runs",
        file=sys.stderr,
    )
    return 2


def main(args: argparse.Namespace) -> int:
    if args.device == "cuda" and not torch.cuda.is_available():
        return no_gpu("gpu")
    shape = TINY if args.tiny else Shape()
    found, rate = compare(args.device, shape, *((2, 1, 16) if args.tiny else (20, 3, 256)))
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU, tiny shapes: no measurement"
    print(table(found, rate))
    print(f"\n{name}, {time.strftime('%Y-%m-%d')}; torch {torch.__version__}; bf16 matrix product {rate:.1f} TFLOP/s")
    from benchmarks.speed.__main__ import keep

    keep(args.json, {"device": name, "matmul TFLOP/s": rate, "found": {k: vars(v) for k, v in found.items()}})
    return 0
