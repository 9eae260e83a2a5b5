"""The base models of the benchmark: `mini`, or one with random weights, for which training means nothing.

sd: Stable Diffusion's shape, small: 7.6 M-parameter UNet on 8x8 latents of 64-pixel images (autoencoder of factor 8,
half as wide as Stable Diffusion's), mini's text encoder. tiny: the same, as narrow as can be, where only the way there
and back matters; wide: one whose adapter of rank 512 has 45 M numbers. sd15: Stable Diffusion
1.5's own sizes (859.5 M, 83.7 M and 123.1 M parameters), in bf16 files (2.1 GB); sd15-tiny: for a dry run of that.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from bouquet import ROOT

MINI = ROOT / "models" / "mini"
# of the UNet and of the autoencoder
WIDTHS = {
    "sd": ((128, 160), (64, 128, 256, 256)),
    "tiny": ((16, 32), (32, 32, 32, 32)),
    "wide": ((224, 304), (32, 32, 32, 32)),
}
SHAPED = ("sd15", "sd15-tiny")  # by benchmarks/gpu/gpu.py's Shape


def build(models: Path, kind: str) -> Path:
    """`models`/bench, in diffusers layout."""
    target = models / "bench"
    shutil.copytree(
        MINI,
        target,
        ignore=shutil.ignore_patterns("*.py", "*.md", "*.png", "judge*", "loss*", "comparison*", "__pycache__"),
    )
    if kind in SHAPED:
        _shape(target, kind)
    elif kind != "mini":
        _narrow(target, kind)
    return target


def _narrow(target: Path, kind: str) -> None:
    """mini's UNet in other widths, and an autoencoder of Stable Diffusion's depth."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    channels, wide = WIDTHS[kind]
    torch.manual_seed(0)
    config = json.loads((MINI / "unet" / "config.json").read_text()) | {
        "block_out_channels": channels,
        "sample_size": 8,
    }
    UNet2DConditionModel.from_config(config).save_pretrained(target / "unet")
    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, block_out_channels=wide,
        layers_per_block=2, latent_channels=4, sample_size=64,
    ).save_pretrained(target / "vae")  # fmt: skip


def _shape(target: Path, kind: str) -> None:
    """All three parts in Stable Diffusion 1.5's shape, and mini's tokenizer with as many tokens a caption."""
    import torch

    from benchmarks.gpu import gpu  # this module is read by commands that need none of its libraries

    shape = gpu.Shape() if kind == "sd15" else gpu.TINY
    torch.manual_seed(0)
    for part, net in zip(
        ("unet", "vae", "text_encoder"), (gpu.new_unet(shape, "cpu"), *gpu.build_encoders(shape, "cpu")), strict=True
    ):
        shutil.rmtree(target / part)
        net.to(torch.bfloat16).save_pretrained(target / part)
    file = target / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": shape.tokens}, indent=2) + "\n")
