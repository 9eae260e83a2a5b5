"""The floor: one warm process a site, encoded photos in memory, and nothing of a round but its arithmetic.

  python -m benchmarks.speed.floor SETTINGS.json  {"config", "models", "data", "cache", "rounds"}; prints s a round

The training loop is written out once more, in plain PyTorch, so that nothing of the app's own loop can hide in the
floor.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from app.config import RunConfig
from app.site import diffusion, train
from app.site.cache import Encoded
from benchmarks.speed.watch import memory_mb


def fit(unet, objective: diffusion.Objective, photos: Encoded, config: RunConfig, seed: int) -> float:
    """`local-steps` steps in float32; the mean loss. Draws in the order in which app.site.train.fit draws."""
    generator, total = torch.Generator().manual_seed(seed), 0.0
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
    unet.train()
    scheduler = objective.schedule.scheduler
    order, rows = torch.empty(0, dtype=torch.long), photos.text_NTD
    for _ in range(config.local_steps):
        while len(order) < config.batch_size:
            order = torch.cat([order, torch.randperm(len(photos.keys), generator=generator)])
        pick, order = order[: config.batch_size], order[config.batch_size :]
        blank = torch.rand(len(pick), 1, 1, generator=generator) < config.caption_dropout
        text = torch.where(blank, photos.blank_TD, rows[pick])
        clean = photos.latents_NChw[pick]
        noise = torch.randn(clean.shape, generator=generator)
        t = torch.randint(scheduler.config.num_train_timesteps, (len(pick),), generator=generator)
        loss = F.mse_loss(unet(scheduler.add_noise(clean, noise, t), t, text).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        total += loss.item()
    return total / config.local_steps


def evaluate(unet, objective: diffusion.Objective, photos: Encoded, config: RunConfig) -> float:
    unet.eval()
    size = train.WIDER * config.batch_size
    return diffusion.validation_loss(
        unet, objective, photos, torch.device("cpu"), timesteps=config.validation_timesteps, batch_size=size
    )


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text())
    config = RunConfig.read(asked["config"])
    site = train.Site(config, Path(asked["models"]), Path(asked["data"]), Path(asked["cache"]), "")
    rounds = []
    for number in range(asked["rounds"]):
        start = time.monotonic()
        evaluate(site.net, site.objective, site.held_out, config)
        middle = time.monotonic()
        fit(site.net, site.objective, site.train, config, number)
        rounds.append({"evaluate": middle - start, "train": time.monotonic() - middle})
    print(json.dumps({"rounds": rounds, "peak-mb": memory_mb("VmHWM")}))


if __name__ == "__main__":
    main()
