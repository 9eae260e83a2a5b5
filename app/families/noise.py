"""How much noise: the two kinds of schedule that base models are made with, as arithmetic on tensors.

Shapes: z_BChw the latents, n_BChw noise, t_B the noise level as an index, 0 <= t < steps, long. Both kinds have the
same seven members, so that the loop, the loss and the validation know neither by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from app.errors import ConfigError


class Schedule(Protocol):
    """What the loss asks of either."""

    @property
    def steps(self) -> int:
        """How many noise levels there are."""

    def at(self, tokens: float, usual: float) -> Schedule:
        """The same for pictures of so many tokens, in a run whose usual ones have `usual`."""

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Random levels to train at: t_B."""

    def noisy(self, z: Tensor, n: Tensor, t: Tensor) -> Tensor:
        """The latents with that much of the noise."""

    def target(self, z: Tensor, n: Tensor, t: Tensor) -> Tensor:
        """What the net is to predict."""

    def told(self, t: Tensor) -> Tensor:
        """The timestep as the net hears it."""

    def weight(self, t: Tensor, gamma: float) -> Tensor:
        """min-SNR's weight of a level's loss: float32 [B]."""


@dataclass(frozen=True)
class Betas:
    """Variance-preserving noise by betas; the net predicts the noise (epsilon) or the velocity (v_prediction).

    Source: Ho et al. 2020, arXiv:2006.11239; Salimans and Ho 2022, arXiv:2202.00512. `scheduler`: a DDPMScheduler.
    """

    scheduler: Any

    @property
    def steps(self) -> int:
        return int(self.scheduler.config.num_train_timesteps)

    def at(self, tokens: float, usual: float) -> Betas:
        return self

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.steps, (count,), generator=generator)

    def noisy(self, z: Tensor, n: Tensor, t: Tensor) -> Tensor:
        noisy: Tensor = self.scheduler.add_noise(z, n, t)
        return noisy

    def target(self, z: Tensor, n: Tensor, t: Tensor) -> Tensor:
        """Errors: CONFIG-03 where the net predicts neither."""
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return n
        if kind == "v_prediction":
            velocity: Tensor = self.scheduler.get_velocity(z, n, t)
            return velocity
        raise ConfigError(
            "CONFIG-03",
            found=f"prediction_type = {kind!r}",
            fix="use a base model whose scheduler has prediction_type epsilon or v_prediction",
        )

    def told(self, t: Tensor) -> Tensor:
        return t

    def weight(self, t: Tensor, gamma: float) -> Tensor:
        """min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) / (SNR + 1) for v: Hang et al. 2023, arXiv:2303.09556,
        eq. 8.
        """
        alpha: Tensor = self.scheduler.alphas_cumprod.to(t.device)[t].float()
        snr = alpha / (1 - alpha)
        bottom = snr if self.scheduler.config.prediction_type == "epsilon" else snr + 1
        return snr.clamp(max=gamma) / bottom


@dataclass(frozen=True)
class Flow:
    """Flow matching on straight lines: x = (1 - sigma) z + sigma n, and the net predicts n - z.

    sigmas_K: float32, from 1 downwards, shifted as the base model's scheduler has them; timesteps_K: what the net is
    told, sigma times the number of steps. A level is drawn logit-normally and then taken from that table, as diffusers'
    training scripts do. Source: Lipman et al. 2022, arXiv:2210.02747; Esser et al. 2024, arXiv:2403.03206, section 3.1.

    slope: of a family whose pipeline shifts the levels by the picture's size, how much a token more adds to the
    logarithm of the shift. A larger picture needs more noise to be as hard to see: levels of another size than the
    run's usual one are drawn with the shift that the pipeline has more, or less, for it (section 5.3.2 there).
    """

    sigmas_K: Tensor
    timesteps_K: Tensor
    slope: float = 0.0
    shift: float = 1.0

    @property
    def steps(self) -> int:
        return len(self.timesteps_K)

    def at(self, tokens: float, usual: float) -> Flow:
        return replace(self, shift=math.exp(self.slope * (tokens - usual)))

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """u is 1 - sigma, and sigma becomes shift * sigma / (1 + (shift - 1) * sigma)."""
        u = torch.sigmoid(torch.normal(mean=0.0, std=1.0, size=(count,), generator=generator))
        u = u / (self.shift - (self.shift - 1) * u)
        return (u * self.steps).long().clamp(max=self.steps - 1)

    def _sigma(self, t: Tensor, like: Tensor) -> Tensor:
        return self.sigmas_K.to(t.device)[t].view(-1, *(1,) * (like.dim() - 1))

    def noisy(self, z: Tensor, n: Tensor, t: Tensor) -> Tensor:
        sigma = self._sigma(t, z)
        return (1.0 - sigma) * z + sigma * n

    def target(self, z: Tensor, n: Tensor, t: Tensor) -> Tensor:
        return n - z

    def told(self, t: Tensor) -> Tensor:
        return self.timesteps_K.to(t.device)[t]

    def weight(self, t: Tensor, gamma: float) -> Tensor:
        """One for every level: there is no such weighting (a run that asks for it is refused, `Family.check_run`)."""
        return torch.ones(t.shape, device=t.device)
