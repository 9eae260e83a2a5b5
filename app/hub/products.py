"""What a round's averaging loses: A and B are averaged apart, where the sites trained products of them.

Enters: the replies that count, with their weights. Leaves: how long the difference is between the mean of the sites'
B·A and the product of the mean B and the mean A, as a share of the first's length (Frobenius, over all layers, each
with its scale): 0 where the sites agree in A or in B, or there is one. FedAvg, FedAvgM and FedAdam weigh by images; the
median and the trimmed mean count each site alike, and this is of their plain means; Krum takes one site's, and a run
with masks has no single one: nothing is said of either. The strategy svd averages the products, and folds the mean back
to the adapter's rank, layer by layer: the nearest there is (Eckart and Young 1936), and what is lost is what it leaves
out.

Nothing of the size of a layer is formed. With all sites' √w·B beside each other and √w·A below each other, a mean of
products is one product of factors of sites · rank columns, and so is the difference, as it is Σ w (B - mean B)·(A -
mean A). A product's length is that of the two factors' triangles (QR). Where so many columns would be more work than
the layer itself, the length is told by how far random vectors come, drawn alike in every run, within some per cent.
A layer at a time is in memory, of a few tensors read together.
Source: Sun et al. 2024, arXiv:2403.12313 (what averaging apart loses).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from app import lora
from app.config import RunConfig
from app.hub import spool
from app.hub.guard import Reply
from app.model import Adapter

ALIKE = ("median", "trimmed-mean")
WIDEST = 256  # columns of a factor, up to which it is worked out and not probed
PROBES = 64  # random vectors a layer


def lost(replies: Iterable[Reply], adapter: Adapter, config: RunConfig) -> float | None:
    """The share, or None where there is none to tell. adapter: the one that the round began with, for its shapes."""
    if config.strategy == "krum":
        return None
    replies, scales = sorted(replies, key=lambda reply: reply.site), lora.scales(adapter, config)
    counts = [1.0 if config.strategy in ALIKE else float(reply.images) for reply in replies]
    weights = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    apart = together = 0.0
    for layer, up, down in _layers(replies, adapter):
        difference, mean = (_left_out if config.strategy == "svd" else squares)(up, down, weights)
        apart, together = apart + scales[layer] ** 2 * difference, together + scales[layer] ** 2 * mean
    return math.sqrt(apart / together) if together else None


def squares(up_NOR: Tensor, down_NRI: Tensor, weights_N: Tensor) -> tuple[float, float]:
    """(squared length of the difference, of the mean of the products) of a layer; float64."""
    root = weights_N.sqrt()[:, None, None]
    means = ((weights_N[:, None, None] * factor).sum(0) for factor in (up_NOR, down_NRI))
    apart = [root * (factor - mean) for factor, mean in zip((up_NOR, down_NRI), means, strict=True)]
    return _square(*apart), _square(root * up_NOR, root * down_NRI)


def folded(replies: Iterable[Reply], adapter: Adapter) -> Adapter:
    """The mean of the sites' products, by images, as an adapter of the same shapes.

    A has orthogonal rows, as long together as the mean A of the sites, and B what makes the product of it: so the next
    round trains a pair of about the lengths that it began with, and a direction that no site used has a B of 0 and an A
    from which it can still be learned.
    """
    replies, new = sorted(replies, key=lambda reply: reply.site), Adapter()
    counts = torch.tensor([float(reply.images) for reply in replies], dtype=torch.float64)
    weights = counts / counts.sum()
    for layer, up, down in _layers(replies, adapter):
        left, core, right = _factored(up, down, weights)
        u, values, v = torch.linalg.svd(core, full_matrices=False)
        rank, keys = down.shape[1], (f"{layer}.lora_A.weight", f"{layer}.lora_B.weight")
        length = float((weights[:, None, None] * down).sum(0).norm()) / math.sqrt(min(rank, len(values))) or 1.0
        factors = length * v[:rank] @ right.T, left @ u[:, :rank] * values[:rank] / length
        room = [max(0, rank - len(values))]  # a layer narrower than its rank
        padded = F.pad(factors[0], (0, 0, 0, *room)), F.pad(factors[1], (0, *room))
        new |= {key: value.float().reshape(adapter[key].shape) for key, value in zip(keys, padded, strict=True)}
    return new


def _left_out(up_NOR: Tensor, down_NRI: Tensor, weights_N: Tensor) -> tuple[float, float]:
    """As `squares`, of what a mean of the adapter's own rank leaves out."""
    values = torch.linalg.svdvals(_factored(up_NOR, down_NRI, weights_N)[1]).square()
    return float(values[down_NRI.shape[1] :].sum()), float(values.sum())


def _factored(up_NOR: Tensor, down_NRI: Tensor, weights_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal L and R, and a small C, by which the mean of the products is L·C·Rᵀ."""
    root = weights_N.sqrt()[:, None, None]
    left, first = torch.linalg.qr((root * up_NOR).transpose(0, 1).flatten(1))
    right, second = torch.linalg.qr((root * down_NRI).flatten(0, 1).T)
    return left, first @ second.T, right


def _square(up_NOR: Tensor, down_NRI: Tensor) -> float:
    """Squared length of the sum of the products."""
    up, down = up_NOR.transpose(0, 1).flatten(1), down_NRI.flatten(0, 1)
    if up.shape[1] <= WIDEST:
        left, right = (torch.linalg.qr(factor, mode="r").R for factor in (up, down.T))
        return float((left @ right.T).square().sum())
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(down.shape[1], PROBES, generator=generator, dtype=torch.float64)
    return float((up @ (down @ vectors)).square().sum() / PROBES)


def _layers(replies: Sequence[Reply], adapter: Adapter) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, every site's B [N, O, R], every site's A [N, R, I]); a convolution's A with its window in I."""
    layers, part = sorted(lora.ranks_of(adapter)), list[str]()  # a file's order is not a fresh adapter's
    for layer in layers:
        part += (f"{layer}.lora_A.weight", f"{layer}.lora_B.weight")
        if layer != layers[-1] and len(replies) * sum(adapter[key].nbytes for key in part) < spool.MOST:
            continue
        read = [spool.some(reply.trained, part) for reply in replies]
        for at in range(0, len(part), 2):
            down, up = (torch.stack([site[key].double().flatten(1) for site in read]) for key in part[at : at + 2])
            yield part[at].removesuffix(".lora_A.weight"), up, down
        part = []
