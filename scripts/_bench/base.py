"""The base models of the benchmark: `mini`, or one in Stable Diffusion's shape with random weights, for which training means nothing.

sd: 7.6 M-parameter UNet on 8x8 latents of 64-pixel images (autoencoder of factor 8, half as wide as Stable Diffusion's), mini's text encoder.
tiny: the same, as narrow as can be, where only the way there and back matters.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from scripts._deployment import ROOT

MINI = ROOT / "models" / "mini"
WIDTHS = {"sd": ((128, 160), (64, 128, 256, 256)), "tiny": ((16, 32), (32, 32, 32, 32))}  # of the UNet and of the autoencoder


def build(models: Path, kind: str) -> Path:
    """`models`/bench, in diffusers layout."""
    target = models / "bench"
    shutil.copytree(MINI, target, ignore=shutil.ignore_patterns("*.py", "*.md", "*.png", "judge*", "loss*", "comparison*", "__pycache__"))
    if kind != "mini":
        channels, wide = WIDTHS[kind]
        torch.manual_seed(0)
        config = json.loads((MINI / "unet" / "config.json").read_text()) | {"block_out_channels": channels, "sample_size": 8}
        UNet2DConditionModel.from_config(config).save_pretrained(target / "unet")
        AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, block_out_channels=wide,
            layers_per_block=2, latent_channels=4, sample_size=64,
        ).save_pretrained(target / "vae")  # fmt: skip
    return target
