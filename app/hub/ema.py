"""The moving average of the global adapters over the rounds of a run, by `ema-decay`.

Enters: the adapter after each round. Leaves: the average, which is what final/ holds and the last evaluation is of;
sites always train from the round's own adapter. It begins with the first round's: avg ← decay · avg + (1 − decay) ·
adapter, number by number. A and B are averaged apart, as FedAvg does it. It lies among the server state of each
round's folder, so that it is written with the round in one step and goes on bit for bit when the run is taken up.
Source: Polyak and Juditsky 1992; as in diffusers' EMAModel, without its warm-up.
"""

from __future__ import annotations

from torch import Tensor

from app.model import Adapter

PREFIX = "ema/"  # of its tensors' names among the server state


class Average:
    """One run's average; none of a run that has no `ema-decay`."""

    def __init__(self, decay: float, state: dict[str, Tensor]) -> None:
        """state: the server state that a run goes on with; {} at its beginning."""
        self.decay = decay
        self.held = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}

    def take(self, adapter: Adapter) -> None:
        """One more round's adapter."""
        if self.decay and self.held:
            self.held = {key: self.held[key] * self.decay + value * (1 - self.decay) for key, value in adapter.items()}
        elif self.decay:
            self.held = dict(adapter)

    def result(self, adapter: Adapter) -> Adapter:
        """What the run leaves: the average, or the last round's adapter where there is none."""
        return self.held if self.decay and self.held else adapter

    def state(self) -> dict[str, Tensor]:
        """For the round's folder."""
        return {PREFIX + key: value.contiguous() for key, value in self.held.items()} if self.decay else {}
