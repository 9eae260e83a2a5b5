"""DP-SGD on the adapter: a step learns of no photo more than its gradient, cut to a length, under noise.

Each photo is in a step by a draw of its own (Poisson sampling); of those that are, each one's gradient is computed
alone, in float32, and cut to `clip`; their sum gets normal noise of `noise` times `clip` and is divided by the number
expected, which nobody's photo changes. What follows (FedProx's pull, the optimiser) knows no photo. A photo comes once
in a step, with one of its captions and views, which are drawn anew each time. Source: Abadi et al. 2016,
arXiv:1607.00133, algorithm 1.

One photo a pass: right for every family, for layers that torch.func cannot batch (Flux.2, Z-Image, quantised ones) and
for hooks that are silently wrong on convolutions alike, and it takes the memory of one. docs/security.md has its cost.
Draws and noise are the operating system's (os.urandom): torch's generator on a CPU takes 32 bits of a seed, which can
be tried. Enters: a net with an adapter, encoded photos, the run's config, `Terms`. Leaves: the net trained in place.
"""

from __future__ import annotations

import math
import os
import secrets

import torch
from accelerate import Accelerator
from torch import Tensor

from app.config import RunConfig
from app.model import Net
from app.site import cache, diffusion, factors, optimisers, rate
from app.site.accountant import Terms


def fit(
    net: Net,
    objective: diffusion.Objective,
    encoded: cache.Encoded,
    config: RunConfig,
    accelerator: Accelerator,
    terms: Terms,
    number: int = 1,
) -> float:
    """`local-steps` steps of round `number` (1 is the first); returns the mean loss of the photos that were in one, or
    nan. The loss is of no noise: it is the site's own to see.
    """
    draws, device = torch.Generator().manual_seed(secrets.randbits(32)), accelerator.device
    trained = factors.trained(net, config, number)
    arrived = optimisers.anchors(config, trained)
    optimiser = optimisers.of(config, trained, device)
    net.train()
    factor, before = rate.factors(config), (number - 1) * config.local_steps
    total, seen = torch.zeros((), device=device), 0
    for step in range(before, before + config.local_steps):
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in trained]
        for photo in drawn(len(encoded.keys), terms.rate):
            net.zero_grad(set_to_none=True)
            loss = _loss(net, objective, encoded, photo, config, accelerator, draws)
            loss.backward()  # type: ignore[no-untyped-call]
            add_clipped(sums, [p.grad for p in trained], terms.clip)
            total, seen = total + loss.detach(), seen + 1
        noise = normal(sum(p.numel() for p in trained)).to(torch.float32)
        parts = zip(sums, torch.split(noise, [p.numel() for p in trained]), trained, strict=True)
        for sum_, part, parameter in parts:
            sum_.add_(part.view(sum_.shape).to(device), alpha=terms.noise * terms.clip)
            parameter.grad = sum_.div_(terms.rate * terms.photos)
        optimisers.pull(config, trained, arrived)
        optimiser.param_groups[0]["lr"] = config.learning_rate * factor(step)
        optimiser.step()
    net.zero_grad(set_to_none=True)
    return total.item() / seen if seen else math.nan


def _loss(
    net: Net, objective: diffusion.Objective, encoded: cache.Encoded, photo: int, config: RunConfig,
    accelerator: Accelerator, draws: torch.Generator,
) -> Tensor:  # fmt: skip
    """One photo's, as in a step without all this (train.fit)."""
    pick, device = torch.tensor([photo]), accelerator.device
    blank = torch.rand(1, generator=draws) < config.caption_dropout
    rows, given = encoded.batch(pick, blank, encoded.words(pick, draws), draws)
    latents, given = diffusion.to_device(rows, device), diffusion.moved(given, device)
    with accelerator.autocast():
        return diffusion.noise_loss(
            net, objective, latents, given, draws, min_snr_gamma=config.min_snr_gamma, noise_offset=config.noise_offset
        )


def add_clipped(sums: list[Tensor], gradients: list[Tensor | None], clip: float) -> None:
    """Add one photo's gradient, cut to the length `clip`; one that is not finite counts as none. Waits for no GPU."""
    there = [(total, own.float()) for total, own in zip(sums, gradients, strict=True) if own is not None]
    length = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(own) for _, own in there]))
    factor = torch.where(length.isfinite(), clip / length.clamp(min=clip), 0.0)
    for total, own in there:
        total.add_(torch.nan_to_num(own, 0.0, 0.0, 0.0) * factor)


def drawn(count: int, rate: float) -> list[int]:
    """Which of `count` photos are in a step, each by itself with the chance `rate`; there may be none."""
    return torch.nonzero(uniform(count) < rate).flatten().tolist()


def uniform(count: int) -> Tensor:
    """float64 in (0, 1), of the operating system's random bits."""
    bits = torch.frombuffer(bytearray(os.urandom(8 * max(count, 1))), dtype=torch.int64)[:count]
    return ((bits >> 11 & 2**53 - 1).double() + 0.5) / 2**53


def normal(count: int) -> Tensor:
    """float64, mean 0 and variance 1, of the same bits. Source: Box and Muller 1958."""
    radius, angle = uniform(count + count % 2).view(2, -1)
    radius, angle = (-2 * radius.log()).sqrt(), 2 * math.pi * angle
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count]
