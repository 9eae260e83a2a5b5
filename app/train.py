"""A site's share of a round: evaluate what arrived, take the local steps, and say what it cost.

Enters: a UNet that holds the global adapter, encoded photos and the run's config. Leaves: the UNet trained in place,
and metrics. `accelerate` drives device, precision and gradient accumulation; the base stays frozen.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator

from app import cache, data, diffusion, model
from app.config import RunConfig
from app.errors import ModelError


def accelerator(config: RunConfig) -> Accelerator:
    """bf16 where asked for, or where `auto` finds CUDA that has it; else float32."""
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    bf16 = config.precision == "bf16" or (config.precision == "auto" and has_bf16)
    return Accelerator(mixed_precision="bf16" if bf16 else "no", gradient_accumulation_steps=config.gradient_accumulation)


def seed_of(*parts: object) -> int:
    """A 63-bit seed from (run seed, site, round): the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


class Site:
    """One site's model and encoded photos, ready to take a round."""

    def __init__(self, config: RunConfig, models: Path, folder: Path, cached: Path, base_fingerprint: str) -> None:
        """Errors: MODEL-01..04, SITE-01..07. `base_fingerprint` is the hub's; '' skips the comparison."""
        self.config, self.clock = config, Clock()
        self.accelerator = accelerator(config)
        base = model.locate(config.base_model, models)
        sums = model.fingerprint(base, cached)
        if base_fingerprint and sums["base"] != base_fingerprint:
            raise ModelError(
                "MODEL-04",
                "The base model here is not the one the hub uses.",
                found=f"{config.base_model} in {base} has fingerprint {sums['base'][:16]}, the hub's is {base_fingerprint[:16]}",
                fix="copy the hub's version of the base model to this site",
            )
        device = self.accelerator.device
        partition, rows = cache.encode(data.scan(folder), base, sums, config.resolution, cached, device)
        train, held_out = data.split(partition.photos, config.validation_fraction, config.seed)
        self.partition, self.train, self.held_out = partition, rows(train).to(device), rows(held_out).to(device)
        self.clock.lap("encode")
        half = self.accelerator.mixed_precision == "bf16" and device.type == "cuda"
        self.scheduler = model.load_scheduler(base)
        self.unet = model.load_unet(base, torch.bfloat16 if half else torch.float32)
        model.add_adapter(self.unet, config)
        self.unet.to(device)
        self.clock.lap("load")

    def evaluate(self) -> float:
        """Loss on the held-out photos, over fixed noise and timesteps."""
        self.unet.eval()
        with self.accelerator.autocast():
            loss = diffusion.validation_loss(
                self.unet,
                self.scheduler,
                self.held_out.latents_NChw,
                self.held_out.text_NTD,
                self.held_out.keys,
                timesteps=self.config.validation_timesteps,
                batch_size=self.config.batch_size,
            )
        self.clock.lap("evaluate")
        return loss

    def fit(self, seed: int) -> float:
        """`local-steps` optimiser steps; returns their mean loss. Same seed, same steps, bit for bit on one CPU set-up."""
        loss = fit(self.unet, self.scheduler, self.train, self.config, self.accelerator, seed)
        self.clock.lap("train")
        return loss


def fit(unet, scheduler, encoded: cache.Encoded, config: RunConfig, accelerator: Accelerator, seed: int) -> float:
    """AdamW on the adapter alone; the optimiser starts afresh each round (its moments belong to another adapter)."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=config.learning_rate, weight_decay=0.0)
    model_, optimiser_ = accelerator.prepare(unet, optimiser)
    batches, total = _batches(len(encoded.keys), config.batch_size, generator), torch.zeros((), device=accelerator.device)
    unet.train()
    passes = config.local_steps * config.gradient_accumulation
    for _ in range(passes):
        pick = next(batches)
        blank = torch.rand(len(pick), 1, 1, generator=generator) < config.caption_dropout
        text = torch.where(blank.to(accelerator.device), encoded.blank_TD, encoded.text_NTD[pick])
        with accelerator.accumulate(model_), accelerator.autocast():
            loss = diffusion.noise_loss(
                unet, scheduler, encoded.latents_NChw[pick], text, generator, min_snr_gamma=config.min_snr_gamma
            )
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimiser_.step()
            optimiser_.zero_grad()
        total += loss.detach()
    return total.item() / passes


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Indices of one batch after another: every photo once before any photo twice."""
    left = torch.empty(0, dtype=torch.long)
    while True:
        while len(left) < size:
            left = torch.cat([left, torch.randperm(count, generator=generator)])
        yield left[:size]
        left = left[size:]


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.monotonic()

    def lap(self, phase: str) -> None:
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now
