"""What a run's settings have to look like where a range does not say it, and which go with masks.

Enters: a value as the run's config has it. Leaves: whether it is one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

MOST_RANK = 512  # of any layer
OF_THE_MEAN = ("fedavg", "fedavgm", "fedadam")  # strategies whose result follows from the mean alone
Rule = tuple[str, Callable[[Any], bool], str]  # a field of RunConfig, whether its value fits, what would

WITH_MASKS: tuple[Rule, ...] = (  # what a run whose sites hide their updates has to be
    ("min_sites", lambda sites: sites >= 3, "3 or more"),
    ("strategy", lambda name: name in OF_THE_MEAN, "fedavg, fedavgm or fedadam"),
    ("norm_bound", lambda bound: bound == 0, "0, as update-clip bounds each update,"),
    ("wire_precision", lambda precision: precision == "fp32", "fp32"),
)


def are_sides(value: str) -> bool:
    """Several resolutions: multiples of 8, each once."""
    parts = [part.strip() for part in value.split(",")]
    fit = (re.fullmatch(r"[0-9]{2,4}", part) and 16 <= int(part) <= 2048 and not int(part) % 8 for part in parts)
    return all(fit) and len(parts) == len({int(part) for part in parts})


def is_rank_pattern(value: str) -> bool:
    """Names of layers, each with a rank."""
    parts = [re.fullmatch(r" *([\w.]+)=([0-9]{1,3}) *", part) for part in value.split(",")]
    return all(part and 1 <= int(part[2]) <= MOST_RANK for part in parts)
