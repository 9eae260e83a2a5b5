"""Real parts, small: a complete base model of a few thousand random weights, sites' folders of drawn noise, a run's
config.

The base model has diffusers' full layout (UNet, autoencoder, text encoder, tokenizer, scheduler), takes 16-pixel
pictures to 4×8×8 latents, and is built once for all tests from a fixed seed.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity
from PIL import Image

from app import model
from app.config import RunConfig
from app.families import sd
from app.site import privacy
from app.site.photos import data
from bouquet import ROOT

RUN = {  # a run config, as Flower hands it over
    "base-model": "tiny",
    "resolution": 16,
    "rounds": 2,
    "local-steps": 3,
    "batch-size": 4,
    "learning-rate": 0.01,
    "lora-rank": 2,
    "precision": "fp32",
    "validation-fraction": 0.25,
    "validation-timesteps": 2,
    "wait-for-sites": 1,
    "round-timeout": 10,
    "round-retries": 0,
    "sample-prompts": "a red poppy, meadow background|a white lily, night background",
    "sample-steps": 2,
}
CONFIG = RunConfig.read(RUN)
CAPTIONS = ("a red poppy, meadow background", "a white lily, night background", "a pink lotus, sky background")


def config(**changes) -> RunConfig:
    return replace(CONFIG, **changes)


@functools.cache
def models() -> Path:
    """A folder of base models that holds one, `tiny`."""
    folder = Path(tempfile.mkdtemp(prefix="bouquet-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    build(folder / "tiny")
    return folder


def base() -> Path:
    return models() / "tiny"


def build(folder: Path, seed: int = 0) -> None:
    """Write the base model in diffusers' layout."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "models" / "mini" / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=16,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )
        vae = AutoencoderKL(
            sample_size=16,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            latent_channels=4,
            scaling_factor=0.5,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=tokenizer.model_max_length,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def unet(config: RunConfig = CONFIG, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The tiny UNet, frozen, with a fresh adapter."""
    net = model.load_net(base(), dtype)
    model.add_adapter(net, sd.FAMILY, config)
    return net


def adapter(seed: int, config: RunConfig = CONFIG) -> model.Adapter:
    """An adapter of the run's shape whose every tensor is random, so that it changes what the UNet says."""
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(value.shape, generator=generator) * 0.3 for key, value in fresh(config).items()}


@functools.lru_cache
def fresh(config: RunConfig = CONFIG) -> model.Adapter:
    return model.new_adapter(base(), config)


def batch(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(latents [count, 4, 8, 8], text [count, 24, 16])."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, 8, 8, generator=generator), torch.randn(count, 24, 16, generator=generator)


def site(folder: Path, count: int = 8, seed: int = 0, public: bool = True) -> Path:
    """A site's data folder: `count` pictures of noise with captions; where they are public, every figure can be
    repeated.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    lines = []
    for number in range(count):
        name = f"{number:04d}.png"
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": CAPTIONS[number % len(CAPTIONS)]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    if public and count > 1:
        privacy.declare_public(folder, data.scan(folder).photos)
    return folder


def be_the_hub(monkeypatch, run_id: int = 7) -> None:
    """Give this process the identity that Flower gives a ServerApp's, so that it may make messages."""
    for name, value in (("_run_id", run_id), ("_node_id", 1), ("_task_id", 1)):
        monkeypatch.setattr(TaskIdentity, name, value)


def equal(one: model.Adapter, other: model.Adapter) -> bool:
    """The same keys, and the same numbers bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def rates(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What AdamW has for a learning rate, at each step that is taken from now on."""
    seen: list[float] = []
    step = torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        seen.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    return seen
