"""The frozen base in 8 or 4 bits a number: layers that keep their numbers as codes and write them out when asked.

Enters: a loaded, frozen net and the run's `base-precision`. Leaves: the same net, every large linear layer of its
blocks in place of itself as codes and scales; what is outside the blocks, convolutions, norms and biases stay.
A layer's numbers are there in full only while it computes, forward and once more on the way back, so that none is kept
for the gradient. Adapters are on top of it, in float32, as on a base in full.

int8: whole numbers from -127 to 127 and one float32 scale an output: 1 byte and 4/in a number.
nf4: two numbers a byte, the sixteen levels that are equally likely under a normal distribution, and a bfloat16 scale
for each 64 numbers: 0.53125 bytes a number. Source: Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3; the
scales are bfloat16 in place of the paper's second quantisation, and the levels are picked by the scale as it is kept.
"""

from __future__ import annotations

import functools
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # numbers that share a scale in nf4
TAIL = 0.9677083  # the quantile of the outermost level: the mean of 1 - 1/30 and 1 - 1/32 (QLoRA, appendix E)


@cache
def levels() -> Tensor:
    """NF4's sixteen, rising from -1 to 1: quantiles of the normal distribution, seven below zero and eight above.
    float32 [16], on the CPU.
    """
    at = functools.partial(torch.linspace, dtype=torch.float64, device="cpu")
    below = -torch.special.ndtri(at(TAIL, 0.5, 8))[:-1]
    above = torch.special.ndtri(at(0.5, TAIL, 9))
    both = torch.cat([below, above])
    return (both / both.max()).float()


@cache
def _pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The two numbers of each byte, [256, 2]: its upper half's first."""
    every, table = torch.arange(256, device="cpu"), levels()
    return torch.stack([table[every // 16], table[every % 16]], dim=1).to(device, dtype)


class Coded(torch.nn.Linear):
    """A linear layer whose weight is codes; `dtype` is what it computes in. A Linear, so that PEFT takes it for one."""

    weight: torch.nn.Parameter
    scale: torch.nn.Parameter

    def __init__(self, layer: torch.nn.Linear, dtype: torch.dtype, device: torch.device) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features, self.dtype = layer.in_features, layer.out_features, dtype
        codes, scale = self.code(layer.weight.detach().to(device).float())
        self.weight = torch.nn.Parameter(codes, requires_grad=False)
        self.scale = torch.nn.Parameter(scale, requires_grad=False)
        self.bias = layer.bias if layer.bias is None else torch.nn.Parameter(layer.bias.to(device), requires_grad=False)

    @staticmethod
    def code(weight: Tensor) -> tuple[Tensor, Tensor]:
        """(codes, scales) of a float32 weight [out, in]."""
        raise NotImplementedError

    def whole(self) -> Tensor:
        """The weight that the codes stand for, [out, in] in `dtype`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Linear.apply(x.to(self.dtype), self)  # type: ignore[no-untyped-call]
        return y


class Int8(Coded):
    @staticmethod
    def code(weight: Tensor) -> tuple[Tensor, Tensor]:
        scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
        return (weight / scale).round().clamp(-127, 127).to(torch.int8), scale

    def whole(self) -> Tensor:
        return self.weight.to(self.dtype).mul_(self.scale)


class Nf4(Coded):
    @staticmethod
    def code(weight: Tensor) -> tuple[Tensor, Tensor]:
        blocks, table = weight.reshape(-1, BLOCK), levels().to(weight.device)
        scale = blocks.abs().amax(dim=1, keepdim=True).bfloat16()
        shares = blocks / scale.float().clamp(min=torch.finfo(torch.float32).tiny)
        codes = torch.bucketize(shares, (table[1:] + table[:-1]) / 2, out_int32=True).to(torch.uint8).reshape(-1)
        return codes[::2] * 16 + codes[1::2], scale

    def whole(self) -> Tensor:
        numbers = F.embedding(self.weight.int(), _pairs(self.dtype, self.weight.device))
        return numbers.view(-1, BLOCK).mul_(self.scale).view(self.out_features, self.in_features)


KINDS: dict[str, type[Coded]] = {"int8": Int8, "nf4": Nf4}  # by `base-precision`


class _Linear(torch.autograd.Function):
    """x W' + b, and the gradient of x alone; W is written out anew for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Coded) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.whole(), None if layer.bias is None else layer.bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.whole(), None


def quantise(net: Any, precision: str, dtype: torch.dtype, device: torch.device) -> None:
    """Put codes in the place of the net's large layers, one after another, on `device`; as-is changes nothing.

    dtype: in which they compute.
    """
    if (kind := KINDS.get(precision)) is None:
        return
    for name in layers(net):
        holder, _, last = name.rpartition(".")
        parent = net.get_submodule(holder)
        setattr(parent, last, kind(getattr(parent, last), dtype, device))


def in_full(net: Any) -> int:
    """Bytes that the weights behind the net's codes take as float32."""
    return sum(4 * m.in_features * m.out_features for m in net.modules() if isinstance(m, Coded))


def layers(net: Any) -> list[str]:
    """The names of the linear layers in a net's lists of blocks: all but those that read the picture, the text and the
    noise level first, and the last one.
    """
    lists = tuple(f"{name}." for name, module in net.named_modules() if isinstance(module, torch.nn.ModuleList))
    return [
        name
        for name, module in net.named_modules()
        if type(module) is torch.nn.Linear and name.startswith(lists) and module.weight.numel() % BLOCK == 0
    ]
