"""What a run's settings have to look like where a range does not say it, and which go with which.

Enters: a value as the run's config has it, or all of them. Leaves: whether it is one, and what would be.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

MOST_RANK = 512  # of any layer
OF_THE_MEAN = ("fedavg", "fedavgm", "fedadam", "alternate")  # strategies whose result follows from the mean alone
Rule = tuple[str, Callable[[Any], bool], str]  # a field of RunConfig, whether its value fits, what would

WITH_MASKS: tuple[Rule, ...] = (  # what a run whose sites hide their updates has to be
    ("min_sites", lambda sites: sites >= 3, "3 or more"),
    ("strategy", lambda name: name in OF_THE_MEAN, "fedavg, fedavgm, fedadam or alternate"),
    ("norm_bound", lambda bound: bound == 0, "0, as update-clip bounds each update,"),
    ("wire_precision", lambda precision: precision == "fp32", "fp32"),
)


ONLY = {  # what is read by some runs alone: a field, and the strategies or the secrecy that have it
    "server_learning_rate": ("fedavgm", "fedadam"),
    "server_momentum": ("fedavgm", "fedadam"),
    "trimmed_share": ("trimmed-mean",),
    "krum_malicious": ("krum",),
    "update_clip": ("masks",),
}


def clashes(config: Any) -> Iterator[tuple[str, str]]:
    """(a field that another one contradicts, what would fit) of a run's config."""
    if config.secrecy == "masks":
        for name, fits, expected in WITH_MASKS:
            if not fits(getattr(config, name)):
                yield name, f"{expected} with secrecy=masks, where the hub sees no site's adapter"
    for name, of in ONLY.items():
        usual = getattr(type(config), name)
        if getattr(config, name) != usual and not {config.strategy, config.secrecy} & {*of}:
            yield name, f"{usual:g}, its default: {' and '.join(of)} alone read it, and this run has another"
    if config.prior_target != type(config).prior_target and not config.prior_loss_weight:
        yield "prior_target", f"{type(config).prior_target}, its default, in a run without prior-loss-weight"
    if config.strategy == "svd" and config.ema_decay:
        yield "ema_decay", "0 with strategy=svd, which turns A and B each round, so that they have no average"
    if config.strategy == "alternate" and config.rounds < 2:
        yield "rounds", "2 or more with strategy=alternate, whose first round trains B alone"
    if config.strategy == "trimmed-mean" and not config.trimmed_share:
        yield "trimmed_share", "more than 0 with strategy=trimmed-mean, which is fedavg else"
    if config.min_sites < (least := least_sites(config)):
        yield "min_sites", f"{least} or more with strategy={config.strategy}: of fewer replies it bears no hostile one"


def least_sites(config: Any) -> int:
    """How many replies a strategy needs to bear a hostile one: the median of two is their mean, so is a mean that
    nothing is cut from, and Krum needs 2 f + 3 for f of them (Blanchard et al. 2017, arXiv:1703.02757).
    """
    if config.strategy == "trimmed-mean":
        return next((n for n in range(3, 10_000) if int(config.trimmed_share * n)), 10_000)
    return {"median": 3, "krum": 2 * int(config.krum_malicious) + 3}.get(config.strategy, 1)


def are_sides(value: str) -> bool:
    """Several resolutions: multiples of 8, each once."""
    parts = [part.strip() for part in value.split(",")]
    fit = (re.fullmatch(r"[0-9]{2,4}", part) and 16 <= int(part) <= 2048 and not int(part) % 8 for part in parts)
    return all(fit) and len(parts) == len({int(part) for part in parts})


def is_rank_pattern(value: str) -> bool:
    """Names of layers, each with a rank."""
    parts = [re.fullmatch(r" *([\w.]+)=([0-9]{1,3}) *", part) for part in value.split(",")]
    return all(part and 1 <= int(part[2]) <= MOST_RANK for part in parts)
