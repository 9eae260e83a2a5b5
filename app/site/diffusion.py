"""Noise, prediction, loss: pure functions; the net, its family and the noise schedule are arguments.

Shapes: latents_BChw as the family makes them (SD 1.5: C=4, h=H/8; mini: H/4); given: a batch's conditions, "text"
[B, T, D] and what else the family's net wants (families/base.py); t_B: noise levels by index.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from app import families
from app.families.base import Conditions, Family
from app.families.noise import Schedule

Digest = Callable[[str], bytes]


def sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


class Photos(Protocol):
    """Encoded photos, as cache.Encoded."""

    @property
    def buckets(self) -> Sequence[Tensor]: ...
    @property
    def keys(self) -> Sequence[str]: ...
    def batch(self, pick_B: Tensor, /) -> tuple[Tensor, Conditions]: ...


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """From the host's memory without waiting for the GPU: it copies from pinned memory while the host prepares the next
    pass.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def moved(given: Conditions, device: torch.device) -> Conditions:
    """Conditions on the device, but where tokens are: whoever asks for that would wait for the GPU."""
    return {name: rows if name == "mask" else to_device(rows, device) for name, rows in given.items()}


@dataclass(frozen=True)
class Objective:
    """What a base model's net learns, and how it is asked: its family and its noise."""

    family: Family
    schedule: Schedule

    @classmethod
    def of(cls, base: Path) -> Objective:
        """Errors: MODEL-03, MODEL-05."""
        family = families.check(base)
        return cls(family, family.schedule(base))

    def at(self, sizes_B6: Tensor, resolution: int) -> Objective:
        """The same for a batch of these sizes (families/base.py), in a run whose usual pictures are `resolution`²."""
        height, width = sizes_B6[0, 4:].tolist()
        a_token = self.family.multiple**2
        return replace(self, schedule=self.schedule.at(height * width / a_token, resolution**2 / a_token))


def noise_loss(
    net: Any, objective: Objective, latents_BChw: Tensor, given: Conditions, generator: torch.Generator,
    *, min_snr_gamma: float = 0.0, noise_offset: float = 0.0, kept: bool = False,
) -> Tensor:  # fmt: skip
    """Mean squared error of the prediction, one random noise level an image; `kept`: of what the base model predicts.

    Returns: float32 scalar.
    Errors: ConfigError when the schedule's prediction_type is neither epsilon nor v_prediction.
    Source: Ho et al. 2020, arXiv:2006.11239, eq. 14; weights by Hang et al. 2023, arXiv:2303.09556, eq. 8; of flows
    Lipman et al. 2022, arXiv:2210.02747, eq. 23. The offset: Guttenberg 2023, "Diffusion with Offset Noise"; it is no
    part of validation, which compares runs.
    """
    device, schedule = latents_BChw.device, objective.schedule
    noise_ = torch.randn(latents_BChw.shape, generator=generator)
    if noise_offset:
        noise_ += noise_offset * torch.randn((*latents_BChw.shape[:2], 1, 1), generator=generator)
    noise = to_device(noise_, device)
    t_B = to_device(schedule.draw(len(latents_BChw), generator), device)
    loss_B = losses(net, objective, latents_BChw, given, noise, t_B, kept=kept)
    if min_snr_gamma:
        loss_B = loss_B * schedule.weight(t_B, min_snr_gamma)
    return loss_B.mean()


def predict(net: Any, family: Family, noisy_BChw: Tensor, told_B: Tensor, given: Conditions) -> Tensor:
    """The net is asked in its own type; whole numbers among the conditions stay whole."""
    given = {name: value.to(net.dtype) if value.is_floating_point() else value for name, value in given.items()}
    return family.predict(net, noisy_BChw.to(net.dtype), told_B, given)


@contextmanager
def without_adapter(net: Any) -> Iterator[None]:
    """The base model alone. Afterwards those numbers are trained that were before: PEFT trains every one of an adapter
    that it turns on again, and a round may train a half (factors.py).
    """
    trained = {id(parameter) for parameter in net.parameters() if parameter.requires_grad}
    net.disable_adapters()
    try:
        yield
    finally:
        net.enable_adapters()
        for parameter in net.parameters():
            parameter.requires_grad_(id(parameter) in trained)


def losses(
    net: Any, objective: Objective, latents_BChw: Tensor, given: Conditions, noise_BChw: Tensor, t_B: Tensor,
    *, kept: bool = False,
) -> Tensor:  # fmt: skip
    """Squared error of the net's prediction at the given noise and levels: float32 [B]. `kept`: against what the base
    model predicts there, as in Li and Hoiem 2016, arXiv:1606.09282, in place of what is so.
    """
    schedule = objective.schedule
    noisy = schedule.noisy(latents_BChw, noise_BChw, t_B)
    if kept:
        with without_adapter(net), torch.no_grad():
            target = predict(net, objective.family, noisy, schedule.told(t_B), given)
    else:
        target = schedule.target(latents_BChw, noise_BChw, t_B)
    predicted = predict(net, objective.family, noisy, schedule.told(t_B), given)
    return F.mse_loss(predicted.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))


@torch.no_grad()
def validation_loss(
    net: Any, objective: Objective, photos: Photos, device: torch.device,
    *, timesteps: int, batch_size: int, digest: Digest = sha256,
) -> float:  # fmt: skip
    """Mean loss on encoded photos (cache.Encoded) over fixed noise and stratified timesteps, the same for an image in
    every round of every run.

    Each image (known by its key) gets `timesteps` noise levels, one in each of as many equal parts of the schedule.
    `digest` makes its noise from its key: a site's own (privacy.py), so that nobody else can compute the loss.
    """
    totals, steps = [], objective.schedule.steps
    for bucket in photos.buckets:
        shape = photos.batch(bucket[:1])[0].shape[1:]
        keys = (photos.keys[number] for number in bucket.tolist())
        noise, t = (
            torch.cat(part)
            for part in zip(*(fixed_noise(digest(key), shape, timesteps, steps) for key in keys), strict=True)
        )
        image = bucket.repeat_interleave(timesteps)
        for part in torch.split(torch.arange(len(image)), batch_size):
            latents, given = photos.batch(image[part])
            latents, n, at = (to_device(rows, device) for rows in (latents, noise[part], t[part]))
            totals.append(losses(net, objective, latents, moved(given, device), n, at).sum())
    return float(sum(torch.stack(totals).tolist())) / (len(photos.keys) * timesteps)


def fixed_noise(digest: bytes, shape: torch.Size, strata: int, steps: int) -> tuple[Tensor, Tensor]:
    """An image's noise and its noise level in each of `strata` equal parts of the schedule, by its key's digest."""
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    where = (torch.arange(strata) + torch.rand(strata, generator=generator)) / strata
    return torch.randn((strata, *shape), generator=generator), (where * steps).long().clamp(max=steps - 1)
