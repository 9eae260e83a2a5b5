"""Ways of averaging LoRA that the app does not offer, for comparison: what a round makes of the sites' adapters.

Enters: a round's replies, each with the images that it counts for, and the scale of each layer. Leaves: the next
adapter, and by layer what is added to the frozen base [O, I] (a convolution's window in I); it is empty where the base
stays. Everything is worked out in float64 and left in float32.
Sources: exact, Singhal et al. 2024, arXiv:2410.09432, eq. 5 to 8; stacking, Wang et al. 2024, arXiv:2409.05976, eq. 7;
halves, Sun et al. 2024, arXiv:2403.12313 (B alone), and Chen et al. 2024, arXiv:2409.02346 (B and A in turn).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from app.hub.guard import Reply
from app.model import Adapter, Net

Dense = dict[str, Tensor]  # by layer


def shares(replies: Sequence[Reply]) -> list[float]:
    """What each reply counts, by images."""
    images = sum(reply.images for reply in replies)
    return [reply.images / images for reply in replies]


def product(adapter: Mapping[str, Tensor], layer: str) -> Tensor:
    """B·A [O, I], float64."""
    up, down = (adapter[f"{layer}.lora_{half}.weight"].double().flatten(1) for half in "BA")
    return up @ down


def mean(replies: Sequence[Reply]) -> Adapter:
    """A and B apart, as FedAvg."""
    each = list(zip(shares(replies), (reply.trained for reply in replies), strict=True))
    return {
        key: torch.stack([share * adapter[key].double() for share, adapter in each]).sum(0).float()
        for key in replies[0].trained
    }


def exact(replies: Sequence[Reply], scales: Mapping[str, float]) -> tuple[Adapter, Dense]:
    """FedEx-LoRA: the mean A and B, and what their product lacks to the mean of the products goes into the base."""
    averaged, products = mean(replies), stacked(replies, scales)
    return averaged, {layer: products[layer] - (s * product(averaged, layer)).float() for layer, s in scales.items()}


def stacked(replies: Sequence[Reply], scales: Mapping[str, float]) -> Dense:
    """FLoRA: the sites' B beside each other, each counted by its share, times their A below each other, for the base.

    That is the mean of the products.
    """
    counted = list(zip(shares(replies), (reply.trained for reply in replies), strict=True))
    dense = {}
    for layer, scale in scales.items():
        ups = [share * adapter[f"{layer}.lora_B.weight"].double().flatten(1) for share, adapter in counted]
        downs = [adapter[f"{layer}.lora_A.weight"].double().flatten(1) for _, adapter in counted]
        dense[layer] = (scale * torch.cat(ups, 1) @ torch.cat(downs)).float()
    return dense


def fresh(adapter: Mapping[str, Tensor], seed: int) -> Adapter:
    """An adapter like this one as none has trained it: B is 0, A drawn as PEFT's "gaussian" draws it, N(0, 1/rank)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(value.shape, generator=generator) / value.shape[0]
        if ".lora_A." in key
        else torch.zeros_like(value)
        for key, value in sorted(adapter.items())
    }


def shrunk(adapter: Mapping[str, Tensor], by: float) -> Adapter:
    """Weight decay towards the base (Krogh and Hertz 1991): every product B·A loses that part of itself."""
    return {key: value * (1 - by) if ".lora_B." in key else value for key, value in adapter.items()}


def into_base(net: Net, dense: Dense) -> None:
    """Add to the frozen layers' weights."""
    modules = dict(net.named_modules())
    for layer, more in dense.items():
        weight = modules[layer].get_base_layer().weight
        with torch.no_grad():
            weight.add_(more.reshape(weight.shape))


def train_only(net: Net, halves: str) -> None:
    """ "AB", "A" or "B": which halves of the adapter the next steps move."""
    for name, parameter in net.named_parameters():
        if ".lora_" in name:
            parameter.requires_grad_(any(f".lora_{half}." in name for half in halves))


def sent(adapter: Mapping[str, Tensor], halves: str) -> int:
    """Bytes of those halves."""
    return sum(value.nbytes for key, value in adapter.items() if any(f".lora_{half}." in key for half in halves))
