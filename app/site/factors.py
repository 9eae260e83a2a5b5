"""Which numbers of the adapter a site trains in a round: all, one half of each layer, or the first rows and columns.

Enters: a net with the global adapter, the run's config, the round's number, the site's own rank. Leaves: the parameters
that an optimiser takes; nothing else of the adapter moves, whatever the optimiser, FedProx or the noise of differential
privacy do. What a site does not train it does not send (lora.part), and the hub has it (lora.filled).
The hub's strategy=svd orders a layer's directions by their weight in the product, so that the first are those that a
lower rank keeps of it (Eckart and Young 1936).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from app import lora
from app.config import RunConfig
from app.model import Net


def trained(net: Net, config: RunConfig, number: int) -> list[torch.nn.Parameter]:
    """The parameters that round `number` trains; those of the other half, where there is one, are frozen meanwhile."""
    if half := lora.half(config, number):
        for name, parameter in net.named_parameters():
            if ".lora_" in name:
                parameter.requires_grad_(f".lora_{half}." in name)
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


class _Rows(torch.nn.Module):
    """A factor whose first numbers along `axis` are trained, and the others kept."""

    def __init__(self, whole: Tensor, rank: int, axis: int) -> None:
        super().__init__()
        self.rank, self.axis = rank, axis
        self.rest = whole.detach().narrow(axis, rank, whole.shape[axis] - rank).clone()

    def forward(self, first: Tensor) -> Tensor:
        return torch.cat([first, self.rest], self.axis)

    def right_inverse(self, whole: Tensor) -> Tensor:
        return whole.detach().narrow(self.axis, 0, self.rank).clone(memory_format=torch.contiguous_format)


@contextlib.contextmanager
def narrowed(net: Net, rank: int) -> Iterator[None]:
    """For a while only the first `rank` rows of each A and columns of each B are parameters; 0 is all of them.

    The others count as before, so that what the net computes, and the scale, stay what they are.
    """
    factors = [(own, int(".lora_B." in name)) for name, own in net.named_modules() if ".lora_" in name and rank]
    factors = [(own, axis) for own, axis in factors if hasattr(own, "weight") and own.weight.shape[axis] > rank]
    for own, axis in factors:
        parametrize.register_parametrization(own, "weight", _Rows(own.weight, rank, axis))
    try:
        yield
    finally:
        for own, _ in factors:
            own.parametrizations.weight.original.grad = None
            parametrize.remove_parametrizations(own, "weight")
