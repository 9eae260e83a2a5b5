"""What shape a run's adapter has and how strong it is: `lora-rank`, `lora-alpha`, `lora-scaling`, `rank-pattern`; and
which part of it a round trains, which alone travels back.

Enters: a run's config with a net's layers, or with an adapter. Leaves: each layer's rank and scale, and the same as
PEFT's settings. W + scale · B·A is what a layer computes: scale = alpha / rank (Hu et al. 2021, arXiv:2106.09685), or
alpha / √rank (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732). Hub and sites work the shapes out of the config alone, and
the half that a round of strategy=alternate trains out of its number: while the other half is the same at every site,
the product of the means is the mean of the products (RoLoRA, Chen et al. 2024, arXiv:2409.02346).
Errors: CONFIG-05 (a pattern that no layer has).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from app.config import RunConfig
from app.errors import ConfigError
from app.families.base import Family


def plain(config: RunConfig) -> RunConfig:
    """The run's config, but that alpha is the rank, one for all layers."""
    return replace(config, lora_alpha=0.0, lora_scaling="plain", rank_pattern="")


def ranks(modules: Iterable[str], family: Family, config: RunConfig) -> dict[str, int]:
    """The rank of each layer that gets an adapter, among a net's modules by name. Errors: CONFIG-05."""
    ends = tuple(f".{target}" for target in family.targets[config.lora_targets])
    layers, other, used = [name for name in modules if f".{name}".endswith(ends)], config.other_ranks, set[str]()
    found = dict.fromkeys(layers, config.lora_rank)
    for layer in layers if other else ():
        fits = [words for words in other if f".{words}." in f".{layer}."]
        used.update(fits)
        found[layer] = other[fits[0]] if fits else config.lora_rank
    if lost := [words for words in other if words not in used]:
        raise ConfigError(
            "CONFIG-05",
            family=family.label,
            found=f"rank-pattern: no layer of the adapter has {lost[0]!r} in its name; one is {max(layers, key=len)}",
            fix="give whole words between dots of such names, or lora-targets with those layers",
        )
    return found


def ranks_of(adapter: Mapping[str, Tensor]) -> dict[str, int]:
    """Each layer's, from its A [rank, …]."""
    return {key.rsplit(".lora_", 1)[0]: value.shape[0] for key, value in adapter.items() if ".lora_A." in key}


def half(config: RunConfig, number: int) -> str:
    """What of each layer round `number` trains: with strategy=alternate "B" in odd rounds, since it begins at 0, and
    "A" in even ones; "" is both.
    """
    return "" if config.strategy != "alternate" else "B" if number % 2 else "A"


def part(adapter: Mapping[str, Tensor], half: str = "", rank: int = 0) -> dict[str, Tensor]:
    """Of an adapter the `half` alone, and the first `rank` rows of each A and columns of each B; "" and 0 are all."""
    own = {key: value for key, value in adapter.items() if not half or f".lora_{half}." in key}
    if not rank:
        return own
    cut = ((key, value[:rank] if ".lora_A." in key else value[:, :rank]) for key, value in own.items())
    return {key: value.clone(memory_format=torch.contiguous_format) for key, value in cut}


def filled(part: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole adapter with a part of it in its place."""
    new = {key: part.get(key, value) for key, value in whole.items()}
    for key in (key for key, value in new.items() if value.shape != whole[key].shape):
        value, new[key] = new[key], whole[key].clone()
        new[key][tuple(map(slice, value.shape))] = value
    return new


def scale(rank: int, config: RunConfig) -> float:
    """How many times B·A of that rank counts."""
    return (config.lora_alpha or rank) / (math.sqrt(rank) if config.lora_scaling == "rs" else rank)


def scales(adapter: Mapping[str, Tensor], config: RunConfig) -> dict[str, float]:
    """Each layer's."""
    return {layer: scale(rank, config) for layer, rank in ranks_of(adapter).items()}


def folded(adapter: Mapping[str, Tensor], config: RunConfig, alpha: float | None = None) -> dict[str, Tensor]:
    """The adapter of the same effect in plain scaling with that alpha, None for each layer's rank: B takes the rest."""
    ranks = ranks_of(adapter)
    times = {layer: 1.0 if alpha is None else rank / alpha for layer, rank in ranks.items()}
    times = {layer: scale(rank, config) * times[layer] for layer, rank in ranks.items()}
    out = dict(adapter)
    for key in (key for key in adapter if ".lora_B." in key):
        if not math.isclose(more := times[key.rsplit(".lora_", 1)[0]], 1.0, rel_tol=1e-12):
            out[key] = (adapter[key].float() * more).to(adapter[key].dtype)
    return out


def settings(ranks: Mapping[str, int], targets: Iterable[str], config: RunConfig) -> dict[str, Any]:
    """As PEFT's LoraConfig takes them. A layer of another rank is named whole: `^` is a name's beginning there."""
    alpha = config.lora_alpha or config.lora_rank
    told: dict[str, Any] = {
        "r": config.lora_rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "target_modules": list(targets),
    }
    if config.lora_scaling == "rs":
        told["use_rslora"] = True
    if other := {f"^{layer}": rank for layer, rank in sorted(ranks.items()) if rank != config.lora_rank}:
        told["rank_pattern"] = other
        if not config.lora_alpha:
            told["alpha_pattern"] = other
    return told


def told(config: RunConfig) -> str:
    """In words, for a person."""
    alpha = f"{config.lora_alpha or config.lora_rank:g}"
    scaled = ", rank-stabilised" if config.lora_scaling == "rs" else ""
    return f"rank {config.lora_rank}{f' ({config.rank_pattern})' if config.rank_pattern else ''}, alpha {alpha}{scaled}"
