"""Noise, prediction, loss: pure functions; the UNet and the noise schedule, diffusers' own (Any), are arguments.

Shapes: latents_BChw, C=4, h=H/8 (mini: H/4), scaled by vae.config.scaling_factor; text_BTD, SD 1.5: T=77, D=768.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from app.errors import ConfigError

Digest = Callable[[str], bytes]


class Photos(Protocol):
    """Encoded photos, as cache.Encoded."""

    @property
    def latents_NChw(self) -> Tensor: ...
    @property
    def keys(self) -> Sequence[str]: ...
    def batch(self, pick_B: Tensor, /) -> tuple[Tensor, Tensor]: ...


def sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """From the host's memory without waiting for the GPU: it copies from pinned memory while the host prepares the next
    pass.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def noise_loss(
    unet: Any,
    scheduler: Any,
    latents_BChw: Tensor,
    text_BTD: Tensor,
    generator: torch.Generator,
    *,
    min_snr_gamma: float = 0.0,
) -> Tensor:
    """Mean squared error of the prediction, one random timestep an image.

    Returns: float32 scalar.
    Errors: ConfigError when the scheduler's prediction_type is neither epsilon nor v_prediction.
    Source: Ho et al. 2020, arXiv:2006.11239, eq. 14; weights by Hang et al. 2023, arXiv:2303.09556, eq. 8.
    """
    device = latents_BChw.device
    noise = to_device(torch.randn(latents_BChw.shape, generator=generator), device)
    t_B = to_device(
        torch.randint(scheduler.config.num_train_timesteps, latents_BChw.shape[:1], generator=generator), device
    )
    loss_B = losses(unet, scheduler, latents_BChw, text_BTD, noise, t_B)
    if min_snr_gamma:
        loss_B = loss_B * min_snr_weight(scheduler, t_B, min_snr_gamma)
    return loss_B.mean()


def losses(
    unet: Any, scheduler: Any, latents_BChw: Tensor, text_BTD: Tensor, noise_BChw: Tensor, t_B: Tensor
) -> Tensor:
    """Squared error of the UNet's prediction at the given noise and timesteps: float32 [B]."""
    noisy = scheduler.add_noise(latents_BChw, noise_BChw, t_B)
    predicted = unet(noisy.to(unet.dtype), t_B, text_BTD.to(unet.dtype)).sample
    target = _target(scheduler, latents_BChw, noise_BChw, t_B)
    return F.mse_loss(predicted.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))


def _target(scheduler: Any, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        velocity: Tensor = scheduler.get_velocity(latents, noise, t)
        return velocity
    raise ConfigError(
        "CONFIG-03",
        found=f"prediction_type = {kind!r}",
        fix="use a base model whose scheduler has prediction_type epsilon or v_prediction",
    )


def min_snr_weight(scheduler: Any, t_B: Tensor, gamma: float) -> Tensor:
    """min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) / (SNR + 1) for v: float32 [B]."""
    alpha: Tensor = scheduler.alphas_cumprod.to(t_B.device)[t_B].float()
    snr = alpha / (1 - alpha)
    bottom = snr if scheduler.config.prediction_type == "epsilon" else snr + 1
    return snr.clamp(max=gamma) / bottom


@torch.no_grad()
def validation_loss(
    unet: Any,
    scheduler: Any,
    photos: Photos,
    device: torch.device,
    *,
    timesteps: int,
    batch_size: int,
    digest: Digest = sha256,
) -> float:
    """Mean loss on encoded photos over fixed noise and stratified timesteps, the same for an image in every round of
    every run.

    Each image (known by its key) gets `timesteps` noise levels, one in each of as many equal parts of the schedule.
    `digest` makes its noise from its key: a site's own (privacy.py), so that nobody else can compute the loss.
    """
    shape, steps = photos.latents_NChw.shape[1:], scheduler.config.num_train_timesteps
    noise, t = (
        torch.cat(part)
        for part in zip(*(_fixed_noise(digest(key), shape, timesteps, steps) for key in photos.keys), strict=True)
    )
    image, totals = torch.arange(len(photos.keys)).repeat_interleave(timesteps), []
    for start in range(0, len(image), batch_size):
        part = slice(start, start + batch_size)
        latents, text = (to_device(rows, device) for rows in photos.batch(image[part]))
        totals.append(
            losses(unet, scheduler, latents, text, to_device(noise[part], device), to_device(t[part], device)).sum()
        )
    sums: list[float] = torch.stack(totals).tolist()
    return sum(sums) / len(image)


def _fixed_noise(digest: bytes, shape: torch.Size, strata: int, steps: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    where = (torch.arange(strata) + torch.rand(strata, generator=generator)) / strata
    return torch.randn((strata, *shape), generator=generator), (where * steps).long().clamp(max=steps - 1)
